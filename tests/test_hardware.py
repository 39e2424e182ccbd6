"""Sizes, the table of GPUs, described hardware, and what NVML leaves out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerofit.errors import ConfigError
from zerofit.planning.described import Description, described_hardware
from zerofit.planning.gpus import GPUS, find_gpu, match_name, slowest_of_size, software_for
from zerofit.planning.hardware import Hardware, describe_gpu, probe
from zerofit.planning.sizes import GIB, MIB, format_bytes, format_seconds, parse_bytes

HERE = Hardware(cpu_cores=4, host_memory_bytes=8 * GIB, system="Linux", has_deepspeed=True)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("24GB", 24 * 10**9),
        ("24 GB", 24 * 10**9),
        ("24GiB", 24 * GIB),
        ("24g", 24 * GIB),
        ("24Gi", 24 * GIB),
        ("24564MiB", 24564 * MIB),
        ("1.5TB", 1_500_000_000_000),
        ("25,769,803,776", 24 * GIB),
        (" 512 mb ", 512 * 10**6),
    ],
)
def test_sizes_in_every_usual_spelling(text: str, size_bytes: int) -> None:
    assert parse_bytes(text, "--gpu-memory") == size_bytes


@pytest.mark.parametrize("text", ["", "GB", "24 GX", "-3GB", "0GB", "24", "1e3GB", "twenty"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory"):
        parse_bytes(text, "--gpu-memory")


@given(st.integers(GIB, 10**15))
def test_a_size_survives_being_read_back(size_bytes: int) -> None:
    assert parse_bytes(format_bytes(size_bytes), "x") == pytest.approx(size_bytes, rel=0.05)


def test_times_as_people_read_them() -> None:
    shown = [format_seconds(seconds) for seconds in (0.0051, 0.184, 2.82, 61, 600, 12_000, 500_000)]
    assert shown == ["5.1 ms", "184 ms", "2.82 s", "61 s", "10 min", "3 h 20 min", "5.8 days"]


@pytest.mark.parametrize(
    ("name", "memory_gib", "key"),
    [
        ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
        ("NVIDIA H200", 140, "h200"),
        ("NVIDIA H100 80GB HBM3", 80, "h100"),
        ("NVIDIA H100 PCIe", 80, "h100-pcie"),
        ("Tesla V100-SXM2-32GB", 32, "v100-32"),
        ("Tesla V100-SXM2-16GB", 16, "v100-16"),
        ("Tesla V100-SXM3", 32, "v100-32"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80"),
        ("NVIDIA A100-PCIE-40GB", 40, "a100-40"),
        ("NVIDIA A10G", 22, "a10g"),
        ("NVIDIA A10", 22, "a10"),
        ("NVIDIA L40S", 45, "l40s"),
        ("NVIDIA L4", 22, "l4"),
        ("Tesla T4", 15, "t4"),
        ("NVIDIA GeForce MX450", 2, "mx450"),
    ],
)
def test_the_drivers_names_are_known(name: str, memory_gib: int, key: str) -> None:
    kind = match_name(name, memory_gib * GIB)
    assert kind is not None
    assert kind.key == key


def test_an_unknown_card_is_in_no_row() -> None:
    assert match_name("Radeon RX 7900", 24 * GIB) is None


@pytest.mark.parametrize("text", ["rtx4090", "RTX 4090", "4090", "NVIDIA GeForce RTX 4090", "rtx-4090"])
def test_a_card_under_all_its_names(text: str) -> None:
    assert find_gpu(text).key == "rtx4090"


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="nearest known are rtx4090"):
        find_gpu("rtx4909")
    with pytest.raises(ConfigError, match="--gpu-memory"):
        find_gpu("voodoo2")


def test_every_row_is_plausible() -> None:
    for kind in GPUS.values():
        assert 2 * GIB <= kind.memory_bytes < 200 * GIB
        assert kind.fp32_flops <= kind.half_flops
        assert 1e9 < kind.pcie <= 64e9
        assert find_gpu(kind.key) is kind
        known = match_name(kind.title, kind.memory_bytes)
        assert known is not None
        assert known.key.partition("-")[0] == kind.key.partition("-")[0]


def test_what_software_a_card_runs() -> None:
    assert "CUDA 12.6" in software_for(GPUS["v100-16"].capability)
    assert "no bf16" in software_for(GPUS["t4"].capability)
    assert "12.8" in software_for(GPUS["rtx5090"].capability)
    assert "bf16" not in software_for(GPUS["rtx4090"].capability)


def test_described_hardware() -> None:
    flags = Description(gpus="4", gpu="a100-80", nodes="2", link="infiniband:200gbit", host_memory="512GiB", disk="1TB")
    found = described_hardware(flags, HERE)
    assert (len(found.gpus), found.world_size, found.link) == (4, 8, "nvlink")
    assert found.network_bytes_per_second == 25e9
    assert (found.host_memory_bytes, found.disk_free_bytes) == (512 * GIB, 10**12)
    assert found.has_deepspeed


def test_memory_alone_is_taken_for_the_slowest_card_of_that_size() -> None:
    gpu = described_hardware(Description(gpus="4", gpu_memory="24GiB"), HERE).gpus[0]
    assert gpu.assumed
    assert gpu.memory_bytes == 24 * GIB
    assert gpu.kind is slowest_of_size(24 * GIB)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"gpus": "4"}, "name one"),
        ({"gpus": "0", "gpu": "t4"}, "whole number from 1"),
        ({"gpus": "four", "gpu": "t4"}, "whole number from 1"),
        ({"gpu": "rtx4090", "link": "nvlink"}, "no NVLink"),
        ({"gpu": "t4", "link": "pigeon"}, "nvlink, pcie, ethernet"),
        ({"gpu": "t4", "link": "ethernet:100gbit"}, "--nodes 2"),
        ({"gpu": "t4", "host_memory": "much"}, "--host-memory"),
    ],
)
def test_impossible_hardware_is_refused(flags: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        described_hardware(Description(**flags), HERE)


class _Nvml(SimpleNamespace):
    """A driver that answers some questions; the others raise as NVML's do."""

    class NVMLError(Exception):
        pass

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: object) -> object:
            raise self.NVMLError(name)

        return refuse


def test_a_slice_that_answers_partly_is_known_hardware() -> None:
    nvml = _Nvml(
        nvmlDeviceGetName=lambda handle: b"GRID V100-16C",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=8 * GIB, free=7 * GIB),
    )
    gpu = describe_gpu(nvml, object())
    assert (gpu.memory_bytes, gpu.free_bytes, gpu.capability) == (8 * GIB, 7 * GIB, (7, 0))
    assert gpu.assumed  # a part of the card has a part of its rates
    named = describe_gpu(_Nvml(nvmlDeviceGetName=lambda handle: "NVIDIA A10"), object())
    assert named.memory_bytes == GPUS["a10"].memory_bytes


def test_a_card_of_which_nothing_is_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="--gpu-memory"):
        describe_gpu(_Nvml(nvmlDeviceGetName=lambda handle: "Radeon"), object())


def test_the_probe_knows_the_disk() -> None:
    free = probe().disk_free_bytes
    assert free is not None
    assert free > 0
