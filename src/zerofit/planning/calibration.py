"""Rates of a machine: measured ones where there are any, else the table's with a stated error.

``zerofit plan --calibrate`` measures this machine's kind of GPU once and stores it below the user's configuration
folder; the H200's measurements are shipped. Everything in bytes or FLOP a second, per GPU and one way.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.models import Section
from ..errors import ConfigError
from .gpus import GpuKind
from .hardware import Hardware
from .memory import DeviceConstants, device_constants

#: Share of the data sheet's rate that large matrix products reach; measured on the H200: 790 of 989 TFLOP/s.
MATRIX_SHARE = 0.80
#: TF32 against half precision on tensor cores, by the data sheets of Ampere and later.
TF32_SHARE = 0.5
#: Share of the memory's rate that streaming kernels reach: 4.2 of 4.8 TB/s on the H200 (assumed for the rest).
BANDWIDTH_SHARE = 0.875
#: NCCL's bus bandwidth as a share of NVLink's rate one way: 342 of 450 GB/s on 4 H200s.
NVLINK_SHARE = 0.76
#: The same over PCIe: with reads between GPUs, and through host memory. Assumed, not measured here.
PCIE_SHARE, PCIE_THROUGH_HOST_SHARE = 0.75, 0.45
#: The same over a network between nodes. Assumed.
NETWORK_SHARE = 0.85
#: Device to host against host to device, all GPUs of a node at once: 37 against 51 GB/s on 4 H200s.
D2H_SHARE = 0.73
#: What AdamW on the CPU moves a second: a core, and a node at most. Fitted to GPT-2 XL under ZeRO-2 with CPU offload:
#: 838 ms a step on one H200 with 16 cores, 761 on four with 64 (docs/experiments.md).
ADAM_BYTES_A_CORE, ADAM_BYTES_A_NODE = 5.3e9, 84e9
#: A local NVMe drive, shared by the node's ranks. Assumed.
NVME_BYTES = 3e9


class Calibration(Section):
    """What was measured on one kind of GPU. None: not measured (one GPU has no all-reduce)."""

    kind: str
    source: str
    """Where and when."""
    matrix_flops: float | None = None
    """bf16, or fp16 where there is no bf16: large square products, best of several sizes."""
    memory_bandwidth: float | None = None
    all_reduce: float | None = None
    """NCCL bus bandwidth, bytes a second; holds for NVLink or PCIe as that machine has it."""
    all_gather: float | None = None
    reduce_scatter: float | None = None
    host_to_device: float | None = None
    device_to_host: float | None = None
    adam_bytes_a_node: float | None = None
    context_bytes: int | None = None
    nccl_bytes: int | None = None
    workspace_bytes: int | None = None


#: 4 x NVIDIA H200 of one host, NVLink, driver 580, torch 2.11 with CUDA 13.0, November 2026.
SHIPPED = {
    "h200": Calibration(
        kind="h200",
        source="measured on 4 x NVIDIA H200, driver 580, torch 2.11.0+cu130",
        matrix_flops=790e12,
        all_reduce=342e9,
        all_gather=311e9,
        reduce_scatter=303e9,
        host_to_device=51e9,
        device_to_host=37e9,
        adam_bytes_a_node=84e9,
    )
}


@dataclass(frozen=True)
class Rates:
    """What the speed model multiplies with.

    Attributes:
        peak_flops: of the data sheet, in the plan's precision: what MFU is a share of.
        matrix_flops: that large matrix products reach.
        bandwidth: that streaming kernels reach.
        all_reduce, all_gather, reduce_scatter: bus bandwidth between all ranks.
        shares_units: collectives run on the GPU's own units at NVLink's rate and slow what they overlap with.
        host_to_device, device_to_host: PCIe.
        adam_bytes: AdamW on the CPU, the whole node.
        nvme: the whole node.
        source: for people.
        error: relative, of a step's time; stated, not computed.
        convolution_flops: as `matrix_flops`, for convolutions: PyTorch lets those of fp32 run in TF32 where the GPU has
            it, at half of the half-precision rate.
    """

    peak_flops: float
    matrix_flops: float
    bandwidth: float
    all_reduce: float
    all_gather: float
    reduce_scatter: float
    shares_units: bool
    host_to_device: float
    device_to_host: float
    adam_bytes: float
    nvme: float
    source: str
    error: float
    convolution_flops: float = 0.0


def rates(hardware: Hardware, precision: str) -> Rates | None:
    """The rates of a machine's GPUs; None without a GPU, or with one that is in no table."""
    kind = hardware.gpus[0].kind if hardware.gpus else None
    if kind is None:
        return None
    found = _published(kind, hardware, precision)
    measured = calibration_of(kind.key)
    if measured is not None:
        found = _with_measured(found, measured, kind, hardware, precision)
    if hardware.gpus[0].assumed:
        found = replace(
            found,
            source=f"assumed to be those of {kind.title}, {found.source.removesuffix(f' of {kind.title}')}",
            error=0.5,
        )
    tf32 = TF32_SHARE * MATRIX_SHARE * kind.half_flops if kind.capability >= (8, 0) and precision == "fp32" else 0.0
    return _between_nodes(replace(found, convolution_flops=max(found.matrix_flops, tf32)), hardware)


def _published(kind: GpuKind, hardware: Hardware, precision: str) -> Rates:
    peak = kind.fp32_flops if precision == "fp32" else kind.half_flops
    over_pcie = kind.pcie * (PCIE_SHARE if kind.peer_to_peer else PCIE_THROUGH_HOST_SHARE)
    bus = kind.nvlink * NVLINK_SHARE if hardware.link == "nvlink" and kind.nvlink else over_pcie
    return Rates(
        peak_flops=peak,
        matrix_flops=peak * MATRIX_SHARE,
        bandwidth=kind.bandwidth * BANDWIDTH_SHARE,
        all_reduce=bus,
        all_gather=bus,
        reduce_scatter=bus,
        shares_units=hardware.link == "nvlink",
        host_to_device=kind.pcie,
        device_to_host=kind.pcie * D2H_SHARE,
        adam_bytes=min(ADAM_BYTES_A_CORE * hardware.cpu_cores, ADAM_BYTES_A_NODE),
        nvme=NVME_BYTES,
        source=f"published rates of {kind.title}",
        error=0.3,
    )


def _with_measured(found: Rates, measured: Calibration, kind: GpuKind, hardware: Hardware, precision: str) -> Rates:
    """The measured rates in place of the published ones; links only where the machine has the same."""
    values: dict[str, Any] = {
        "bandwidth": measured.memory_bandwidth,
        "host_to_device": measured.host_to_device,
        "device_to_host": measured.device_to_host,
        "matrix_flops": measured.matrix_flops if precision != "fp32" else None,
    }
    if hardware.link == "nvlink" or not kind.nvlink:
        values |= {name: getattr(measured, name) for name in ("all_reduce", "all_gather", "reduce_scatter")}
    if measured.adam_bytes_a_node:
        values["adam_bytes"] = min(ADAM_BYTES_A_CORE * hardware.cpu_cores, measured.adam_bytes_a_node)
    known = {name: value for name, value in values.items() if value is not None}
    return replace(found, **known, source=measured.source, error=0.15)


def _between_nodes(found: Rates, hardware: Hardware) -> Rates:
    """A ring over nodes passes each node's network once: no collective is faster than that."""
    if hardware.nodes == 1 or hardware.network_bytes_per_second is None:
        return found
    network = hardware.network_bytes_per_second * NETWORK_SHARE
    limited = {name: min(getattr(found, name), network) for name in ("all_reduce", "all_gather", "reduce_scatter")}
    return replace(found, **limited, error=max(found.error, 0.3))


#: A training run loads more kernels than a calibration: 768 MiB of context beside 597 (4 H200, docs/experiments.md).
MORE_KERNELS_BYTES = 171 * 1024**2


def constants(hardware: Hardware) -> DeviceConstants:
    """What a process costs on this machine's GPUs beside its tensors: measured here, or the planner's own table."""
    kind = hardware.gpus[0].kind if hardware.gpus else None
    if not hardware.gpus:
        return device_constants("cpu")
    base = device_constants(kind.key if kind else "")
    measured = calibration_of(kind.key) if kind else None
    if measured is None:
        return base
    return DeviceConstants(
        context_bytes=measured.context_bytes + MORE_KERNELS_BYTES if measured.context_bytes else base.context_bytes,
        nccl_bytes=measured.nccl_bytes or base.nccl_bytes,
        workspace_bytes=measured.workspace_bytes or base.workspace_bytes,
    )


def calibration_path() -> Path:
    """Where ``--calibrate`` stores what it measured: ``$XDG_CONFIG_HOME/zerofit/calibration.json``."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "zerofit" / "calibration.json"


def calibration_of(kind: str) -> Calibration | None:
    """This user's measurement of a kind of GPU, over the shipped one."""
    shipped, stored = SHIPPED.get(kind), _stored().get(kind)
    if shipped is None or stored is None:
        return stored or shipped
    return shipped.model_copy(update=stored.model_dump(exclude_none=True))


def store_calibration(measured: Calibration) -> Path:
    """Remember a measurement; what was known of the same kind and was not measured again stays. Returns the file."""
    path, known = calibration_path(), _stored()
    before = known[measured.kind].model_dump(exclude_none=True) if measured.kind in known else {}
    known[measured.kind] = Calibration.model_validate({**before, **measured.model_dump(exclude_none=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    content = {name: value.model_dump(exclude_none=True) for name, value in known.items()}
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def _stored() -> dict[str, Calibration]:
    path = calibration_path()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return {}
    try:
        return {name: Calibration.model_validate(value) for name, value in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} holds what `zerofit plan --calibrate` measured, and it cannot be read ({error}). Delete it, and "
            f"calibrate again."
        ) from error
