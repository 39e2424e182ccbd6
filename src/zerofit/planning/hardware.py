"""What this machine has, read without making a CUDA context. The only file in `planning` that probes anything."""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path

from ..config.models import Section

GIB = 1024**3


class Gpu(Section):
    """One GPU as its driver describes it."""

    name: str
    memory_bytes: int
    """Whole memory of the card."""
    free_bytes: int
    """Free when the plan was made."""
    capability: tuple[int, int]
    """CUDA compute capability, such as (9, 0)."""

    @property
    def has_bf16(self) -> bool:
        """bf16 matrix units came with compute capability 8.0 (Ampere)."""
        return self.capability >= (8, 0)


class Hardware(Section):
    """What a run may use on this node."""

    gpus: tuple[Gpu, ...] = ()
    cpu_cores: int
    host_memory_bytes: int
    """Memory that this process may use: the smaller of the machine's and its control group's."""
    system: str
    """``Linux``, ``Darwin`` or ``Windows``."""
    has_deepspeed: bool


def probe() -> Hardware:
    """Read this machine: NVML for GPUs (``CUDA_VISIBLE_DEVICES`` respected), /proc and the control group for memory."""
    return Hardware(
        gpus=tuple(_visible_gpus()),
        cpu_cores=cpu_cores(),
        host_memory_bytes=_host_memory_bytes(),
        system=platform.system(),
        has_deepspeed=importlib.util.find_spec("deepspeed") is not None,
    )


def _visible_gpus() -> list[Gpu]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library, or a driver that does not answer: all mean that there is no GPU
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [_describe(pynvml, handle) for handle in _select(pynvml, handles)]
    finally:
        pynvml.nvmlShutdown()


def _select(pynvml: object, handles: list[object]) -> list[object]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` names, by index or by UUID; CUDA stops at the first unknown one."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return handles
    uuids = {pynvml.nvmlDeviceGetUUID(handle): handle for handle in handles}  # type: ignore[attr-defined]
    chosen: list[object] = []
    for item in (part.strip() for part in wanted.split(",")):
        matching = [handle for uuid, handle in uuids.items() if item and uuid.startswith(item)]
        if item.isdigit() and int(item) < len(handles):
            chosen.append(handles[int(item)])
        elif len(matching) == 1:
            chosen.append(matching[0])
        else:
            break
    return chosen


def _describe(pynvml: object, handle: object) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)  # type: ignore[attr-defined]
    name = pynvml.nvmlDeviceGetName(handle)  # type: ignore[attr-defined]
    return Gpu(
        name=name.decode() if isinstance(name, bytes) else name,
        memory_bytes=memory.total,
        free_bytes=memory.free,
        capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),  # type: ignore[attr-defined]
    )


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
