"""The one table of GPUs: memory, rates and what software they run. Published figures, measured ones where stated.

Rates are of the makers' data sheets and architecture white papers, dense (no sparsity), with fp32 accumulation:
GeForce Ampere and Ada run fp16 and bf16 with fp32 accumulation at half the headline rate, and that half stands here.
`memory_bytes` is what the driver shows (a "24 GB" card has 24,564 or 24,576 MiB, with ECC on less).
Link rates are bytes a second one way per GPU: NVLink's data-sheet totals halved; PCIe after its encoding.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from ..config.schema import Precision
from ..errors import ConfigError
from .sizes import MIB

#: One way, 16 lanes (8 for the laptop card: see its row), after 128b/130b encoding and packet headers.
PCIE3, PCIE4, PCIE5 = 12.5e9, 25e9, 50e9


@dataclass(frozen=True)
class GpuKind:
    """One kind of GPU.

    Attributes:
        key: what ``--gpu`` takes.
        title: as people know it.
        pattern: regular expression on NVML's name, lower case.
        memory_bytes: as the driver shows it.
        capability: CUDA compute capability.
        bandwidth: of its memory, bytes a second.
        half_flops: fp16 and, from capability 8.0 on, bf16 matrix products, FLOP a second.
        fp32_flops: fp32 products without TF32, FLOP a second.
        pcie: bytes a second one way.
        nvlink: bytes a second one way, all links together; 0 for none.
        peer_to_peer: GPUs of this kind read each other's memory over PCIe (the makers' driver forbids it to GeForce
            cards from Ampere on, so that NCCL goes through host memory).
    """

    key: str
    title: str
    pattern: str
    memory_bytes: int
    capability: tuple[int, int]
    bandwidth: float
    half_flops: float
    fp32_flops: float
    pcie: float = PCIE4
    nvlink: float = 0.0
    peer_to_peer: bool = True

    def matrix_flops(self, precision: Precision) -> float:
        """Peak rate of matrix products in a precision."""
        return self.fp32_flops if precision == "fp32" else self.half_flops


def _kind(
    key: str, title: str, pattern: str, memory_mib: int, capability: tuple[int, int], bandwidth_gb: float,
    half_tflops: float, fp32_tflops: float, pcie: float = PCIE4, nvlink_gb: float = 0, peer_to_peer: bool = True,
) -> GpuKind:  # fmt: skip
    return GpuKind(
        key, title, pattern, memory_mib * MIB, capability, bandwidth_gb * 1e9, half_tflops * 1e12, fp32_tflops * 1e12,
        pcie, nvlink_gb * 1e9, peer_to_peer,
    )  # fmt: skip


#: Order matters where patterns overlap: the first match wins.
_TABLE = (
    # Hopper and Blackwell, data centre
    _kind("h200", "NVIDIA H200", r"h200", 143_771, (9, 0), 4800, 989, 67, PCIE5, 450),
    _kind("h100-pcie", "NVIDIA H100 PCIe", r"h100.*pcie", 81_559, (9, 0), 2000, 756, 51, PCIE5),
    _kind("h100", "NVIDIA H100 SXM 80GB", r"h100", 81_559, (9, 0), 3350, 989, 67, PCIE5, 450),
    _kind("h20", "NVIDIA H20", r"\bh20\b", 97_871, (9, 0), 4000, 148, 44, PCIE5, 450),
    _kind("b200", "NVIDIA B200", r"b200", 183_359, (10, 0), 8000, 2250, 75, PCIE5, 900),
    # Ampere and Ada, data centre and workstation
    _kind("a100-80", "NVIDIA A100 80GB", r"a100.*80g", 81_920, (8, 0), 2039, 312, 19.5, PCIE4, 300),
    _kind("a100-40", "NVIDIA A100 40GB", r"a100", 40_960, (8, 0), 1555, 312, 19.5, PCIE4, 300),
    _kind("a800", "NVIDIA A800 80GB", r"a800", 81_920, (8, 0), 2039, 312, 19.5, PCIE4, 200),
    _kind("a30", "NVIDIA A30", r"\ba30\b", 24_576, (8, 0), 933, 165, 10.3),
    _kind("a40", "NVIDIA A40", r"\ba40\b", 46_068, (8, 6), 696, 150, 37.4),
    _kind("a10g", "NVIDIA A10G", r"a10g", 23_028, (8, 6), 600, 70, 31.5),
    _kind("a10", "NVIDIA A10", r"\ba10\b", 23_028, (8, 6), 600, 125, 31.2),
    _kind("l40s", "NVIDIA L40S", r"l40s", 46_068, (8, 9), 864, 362, 91.6),
    _kind("l40", "NVIDIA L40", r"\bl40\b", 46_068, (8, 9), 864, 181, 90.5),
    _kind("l4", "NVIDIA L4", r"\bl4\b", 23_034, (8, 9), 300, 121, 30.3),
    _kind("rtx6000-ada", "NVIDIA RTX 6000 Ada", r"rtx 6000 ada", 49_140, (8, 9), 960, 364, 91.1),
    _kind("a6000", "NVIDIA RTX A6000", r"rtx a6000", 49_140, (8, 6), 768, 155, 38.7),
    # GeForce
    _kind("rtx5090", "GeForce RTX 5090", r"rtx 5090", 32_607, (12, 0), 1792, 210, 105, PCIE5, 0, False),
    _kind("rtx4090", "GeForce RTX 4090", r"rtx 4090", 24_564, (8, 9), 1008, 165, 82.6, PCIE4, 0, False),
    _kind("rtx4080", "GeForce RTX 4080", r"rtx 4080", 16_376, (8, 9), 717, 97.5, 48.7, PCIE4, 0, False),
    _kind("rtx4070", "GeForce RTX 4070", r"rtx 4070", 12_282, (8, 9), 504, 58.3, 29.1, PCIE4, 0, False),
    _kind("rtx4060", "GeForce RTX 4060", r"rtx 4060", 8_188, (8, 9), 272, 30, 15.1, PCIE4 / 2, 0, False),
    _kind("rtx3090", "GeForce RTX 3090", r"rtx 3090", 24_576, (8, 6), 936, 71, 35.6, PCIE4, 0, False),
    _kind("rtx3080", "GeForce RTX 3080", r"rtx 3080", 10_240, (8, 6), 760, 59.5, 29.8, PCIE4, 0, False),
    _kind("rtx3060", "GeForce RTX 3060", r"rtx 3060", 12_288, (8, 6), 360, 25.5, 12.7, PCIE4, 0, False),
    _kind("rtx2080ti", "GeForce RTX 2080 Ti", r"rtx 2080 ti", 11_264, (7, 5), 616, 53.8, 13.4, PCIE3),
    _kind("gtx1080ti", "GeForce GTX 1080 Ti", r"gtx 1080 ti", 11_264, (6, 1), 484, 11.3, 11.3, PCIE3),
    # No matrix units: half precision at twice the fp32 rate. Four PCIe lanes.
    _kind("mx450", "GeForce MX450", r"mx450", 2_048, (7, 5), 64, 5.6, 2.8, PCIE3 / 4),
    # Turing and Volta, data centre
    _kind("t4", "Tesla T4", r"\bt4\b", 15_360, (7, 5), 320, 65, 8.1, PCIE3),
    _kind("v100-32", "Tesla V100 32GB", r"v100.*32g", 32_768, (7, 0), 900, 125, 15.7, PCIE3, 150),
    _kind("v100-16", "Tesla V100 16GB", r"v100", 16_384, (7, 0), 900, 125, 15.7, PCIE3, 150),
)
GPUS = {kind.key: kind for kind in _TABLE}
#: Names that people use for a row of the table; the smaller card where two share a name.
_ALIASES = {"a100": "a100-40", "v100": "v100-16", "h100-sxm": "h100", "2080ti": "rtx2080ti", "1080ti": "gtx1080ti"}


def find_gpu(name: str) -> GpuKind:
    """The kind that ``--gpu`` means. Case, spaces and dashes do not matter, nor a leading ``rtx`` or ``nvidia``.

    Raises:
        ConfigError: unknown; the message names the nearest rows.
    """
    wanted = _plain(name)
    spellings = {_plain(key): key for key in GPUS} | {_plain(alias): key for alias, key in _ALIASES.items()}
    spellings |= {key.removeprefix("rtx"): row for key, row in list(spellings.items()) if key.startswith("rtx")}
    if wanted in spellings:
        return GPUS[spellings[wanted]]
    by_driver = match_name(name)
    if by_driver is not None:
        return by_driver
    near = list(dict.fromkeys(spellings[found] for found in difflib.get_close_matches(wanted, spellings, n=3)))
    suggestion = f"The nearest known are {', '.join(near)}. " if near else ""
    raise ConfigError(
        f"--gpu {name}: no such GPU is in zerofit's table. {suggestion}Known: {', '.join(GPUS)}. Any other card: give "
        f"its memory, as in --gpus 4 --gpu-memory 24GiB."
    )


def _plain(name: str) -> str:
    text = re.sub(r"[\s_-]+", "", name.lower())
    return text.removeprefix("nvidia").removeprefix("geforce").removeprefix("tesla").removesuffix("gb")


def match_name(name: str, memory_bytes: int | None = None) -> GpuKind | None:
    """The kind of a card by the name that its driver gives, such as ``NVIDIA GeForce RTX 4090``.

    Two sizes of one card share a name at times (V100, A100): then the one nearest to `memory_bytes` is meant.
    """
    found = [kind for kind in _TABLE if re.search(kind.pattern, name.lower())]
    if not found or memory_bytes is None:
        return found[0] if found else None
    sized = re.fullmatch(r"(.*)-\d+", found[0].key)
    alike = [kind for kind in _TABLE if sized and re.fullmatch(rf"{sized.group(1)}-\d+", kind.key)]
    return min(alike or found[:1], key=lambda kind: abs(kind.memory_bytes - memory_bytes))


def slowest_of_size(memory_bytes: int) -> GpuKind:
    """The slowest kind with about this memory: what a card is taken for when only its memory is known."""
    nearest = min(abs(kind.memory_bytes - memory_bytes) for kind in _TABLE)
    alike = [kind for kind in _TABLE if abs(kind.memory_bytes - memory_bytes) <= max(nearest, 0.07 * memory_bytes)]
    return min(alike, key=lambda kind: kind.half_flops)


def software_for(capability: tuple[int, int]) -> str:
    """Which PyTorch builds run on a card, and what it lacks. Source: PyTorch's release matrix (RELEASE.md)."""
    if capability < (5, 0):
        return "no current PyTorch build runs on it"
    if capability < (7, 5):
        lacks = "no bf16" if capability >= (7, 0) else "no bf16, no matrix units, torch.compile needs 7.0"
        return f"needs a CUDA 12.6 build of PyTorch (left out of CUDA 12.8 builds and later); {lacks}"
    if capability < (8, 0):
        return "any current PyTorch build; no bf16, no flash attention (memory-efficient attention instead)"
    if capability >= (10, 0):
        return "a PyTorch build for CUDA 12.8 or later"
    return "any current PyTorch build"
