"""What this machine has, read without making a CUDA context. The only file in `planning` that probes anything."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..config.models import Section
from ..errors import ConfigError
from .gpus import GPUS, GpuKind, match_name, software_for
from .sizes import GIB

Value = TypeVar("Value")
#: Most NVLinks that a GPU has.
_NVLINKS = 18


class Gpu(Section):
    """One GPU as its driver describes it."""

    name: str
    memory_bytes: int
    """Whole memory of the card, or of the slice of it that this machine has."""
    free_bytes: int
    """Free when the plan was made."""
    capability: tuple[int, int]
    """CUDA compute capability, such as (9, 0)."""
    rates_of: str = ""
    """Row of `planning.gpus` whose rates it has; empty when it is in no row."""
    assumed: bool = False
    """The row is a guess from the memory's size."""

    @property
    def has_bf16(self) -> bool:
        """bf16 matrix units came with compute capability 8.0 (Ampere)."""
        return self.capability >= (8, 0)

    @property
    def kind(self) -> GpuKind | None:
        """Its row in the table."""
        return GPUS.get(self.rates_of)

    @property
    def software(self) -> str:
        """Which PyTorch builds run on it, and what it lacks."""
        return software_for(self.capability)


class Hardware(Section):
    """What a run may use. Sizes and counts are of one node; all nodes are alike."""

    gpus: tuple[Gpu, ...] = ()
    nodes: int = 1
    link: Literal["nvlink", "pcie"] = "pcie"
    """What connects the GPUs of a node."""
    network_bytes_per_second: float | None = None
    """Between nodes, one way a node; None for one node."""
    cpu_cores: int
    host_memory_bytes: int
    """Memory that this process may use: the smaller of the machine's and its control group's."""
    disk_free_bytes: int | None = None
    """Where checkpoints go; None when unknown."""
    nvme_free_bytes: int | None = None
    """Where offloaded states go; None when there is no such place."""
    system: str
    """``Linux``, ``Darwin`` or ``Windows``."""
    has_deepspeed: bool
    described: bool = False
    """Typed in, not probed."""

    @property
    def world_size(self) -> int:
        """GPUs on all nodes."""
        return self.nodes * len(self.gpus)


def probe(runs_dir: Path = Path(), nvme_path: Path | None = None) -> Hardware:
    """Read this machine: NVML for GPUs (``CUDA_VISIBLE_DEVICES`` respected), /proc and the control group for memory.

    Args:
        runs_dir: folder whose disk takes the checkpoints; need not exist yet.
        nvme_path: folder for offload to NVMe.
    """
    gpus, link = _visible_gpus()
    return Hardware(
        gpus=tuple(gpus),
        link=link,
        cpu_cores=cpu_cores(),
        host_memory_bytes=_host_memory_bytes(),
        disk_free_bytes=_free_bytes(runs_dir),
        nvme_free_bytes=_free_bytes(nvme_path) if nvme_path else None,
        system=platform.system(),
        has_deepspeed=importlib.util.find_spec("deepspeed") is not None,
    )


def _visible_gpus() -> tuple[list[Gpu], Literal["nvlink", "pcie"]]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library, or a driver that does not answer: all mean that there is no GPU
        return [], "pcie"
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        chosen = _select(pynvml, handles)
        linked = bool(chosen) and all(_has_nvlink(pynvml, handle) for handle in chosen)
        return [describe_gpu(pynvml, handle) for handle in chosen], "nvlink" if linked else "pcie"
    finally:
        pynvml.nvmlShutdown()


def _select(pynvml: Any, handles: list[Any]) -> list[Any]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` names, by index, by UUID or as MIG instance.

    CUDA stops at the first unknown one, and uses one MIG instance only: of a GPU that is cut up, its first.
    """
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        instances = [instance for handle in handles if (instance := _first_instance(pynvml, handle)) is not None]
        return instances[:1] or handles
    uuids = {pynvml.nvmlDeviceGetUUID(handle): handle for handle in handles}
    chosen: list[Any] = []
    for item in (part.strip() for part in wanted.split(",")):
        matching = [handle for uuid, handle in uuids.items() if item and uuid.startswith(item)]
        if item.startswith("MIG-"):
            instance = _ask(pynvml, pynvml.nvmlDeviceGetHandleByUUID, item)
            return [] if instance is None else [instance]
        if item.isdigit() and int(item) < len(handles):
            chosen.append(handles[int(item)])
        elif len(matching) == 1:
            chosen.append(matching[0])
        else:
            break
    return chosen


def _first_instance(pynvml: Any, handle: Any) -> Any | None:
    """The first MIG instance of a GPU that is cut up, else None."""
    mode = _ask(pynvml, pynvml.nvmlDeviceGetMigMode, handle)
    if not mode or not mode[0]:
        return None
    return _ask(pynvml, pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, 0)


def _ask(pynvml: Any, question: Callable[..., Value], *arguments: Any) -> Value | None:
    """NVML's answer; None where this card, slice or driver has none."""
    try:
        return question(*arguments)
    except pynvml.NVMLError:
        return None


def describe_gpu(pynvml: Any, handle: Any) -> Gpu:
    """What NVML says of a card, the gaps filled from the table: vGPU slices and MIG instances answer partly.

    Raises:
        ConfigError: neither NVML nor the table knows its memory or its capability.
    """
    name = _ask(pynvml, pynvml.nvmlDeviceGetName, handle) or "unnamed GPU"
    name = name.decode() if isinstance(name, bytes) else name
    memory = _ask(pynvml, pynvml.nvmlDeviceGetMemoryInfo, handle)
    kind = match_name(name, memory.total if memory else None)
    whole = _ask(pynvml, pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle) or handle
    capability = _ask(pynvml, pynvml.nvmlDeviceGetCudaComputeCapability, whole) or (kind and kind.capability)
    total = memory.total if memory else (kind and kind.memory_bytes)
    if not total or not capability:
        raise ConfigError(
            f"The driver does not tell the {'memory' if not total else 'compute capability'} of {name}, and it is not "
            f"in zerofit's table. Describe it, as in `zerofit plan --gpus 1 --gpu-memory 24GiB`, or set device cpu."
        )
    free = memory.free if memory else total
    return Gpu(
        name=name,
        memory_bytes=total,
        free_bytes=free,
        capability=(int(capability[0]), int(capability[1])),
        rates_of=kind.key if kind else "",
        # A slice has a part of the card's rates, and which part is not told.
        assumed=kind is not None and total < 0.8 * kind.memory_bytes,
    )


def _has_nvlink(pynvml: Any, handle: Any) -> bool:
    return any(_ask(pynvml, pynvml.nvmlDeviceGetNvLinkState, handle, link) for link in range(_NVLINKS))


def cpu_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _host_memory_bytes() -> int:
    """Installed memory, or the control group's limit when that is lower (containers, Slurm)."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 8 * GIB  # Windows: the standard library does not tell; a cautious guess, for the plan only
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [installed]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits)


def _free_bytes(folder: Path) -> int | None:
    """Free on the disk of a folder that may not exist yet; None when that cannot be read."""
    folder = folder.absolute()
    existing = next((path for path in (folder, *folder.parents) if path.exists()), None)
    try:
        return shutil.disk_usage(existing).free if existing else None
    except OSError:
        return None
