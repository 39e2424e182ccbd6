"""What a plan needs on the busiest rank: GPU bytes at the peak and when, host bytes, NVMe bytes.

P parameters, N ranks, h bytes of the compute type (2 or 4). Model states follow the engines as implemented (the
conformance suite compares them with the engines' own tensors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .coarse import coarse_items
from .plan import Plan
from .memory_replicated import ReplicatedModel
from .memory_zero2 import Zero2Model
from .memory_zero3 import Zero3Model
from .template import ModuleEvent, StepEvent
from .timeline import EngineModel, Ledger
from .zero_memory import zero_state_bytes

MIB = 1024**2


@dataclass(frozen=True)
class DeviceConstants:
    """What one process costs on one kind of GPU, beside its tensors. Measured once per kind.

    Attributes:
        context_bytes: CUDA context and loaded kernels, outside PyTorch's allocator.
        nccl_bytes: more of that with more than one rank, after the first collectives.
        workspace_bytes: cuBLAS workspace per handle and stream, inside PyTorch's allocator.
    """

    context_bytes: int
    nccl_bytes: int
    workspace_bytes: int


#: Measured on 4 NVIDIA H200 (driver 580, torch 2.11 with CUDA 13.0): 986 MiB after init with NCCL, 1,460 MiB after
#: the first collectives. cuBLAS takes 32 MiB a handle and stream on Hopper.
H200 = DeviceConstants(context_bytes=600 * MIB, nccl_bytes=860 * MIB, workspace_bytes=32 * MIB)
#: Not measured: other GPUs load fewer kernels; before Hopper cuBLAS takes 8.125 MiB a handle and stream.
OTHER_GPU = DeviceConstants(context_bytes=500 * MIB, nccl_bytes=700 * MIB, workspace_bytes=8_519_680)
#: Without a GPU there is no context, and gloo's buffers are small.
NO_GPU = DeviceConstants(context_bytes=0, nccl_bytes=0, workspace_bytes=0)
_BY_KIND: Mapping[str, DeviceConstants] = {"h100": H200, "h200": H200}


def device_constants(kind: str) -> DeviceConstants:
    """The constants of a kind of GPU (``h200``, ``rtx4090``, …; ``cpu`` for none)."""
    return NO_GPU if kind == "cpu" else _BY_KIND.get(kind, OTHER_GPU)


@dataclass(frozen=True)
class MemoryPrediction:
    """One rank, the busiest. On the device ``cpu`` the "GPU" is the process's memory.

    Attributes:
        items: bytes on the GPU at the peak, by item; their sum is `allocated_bytes`.
        peak_phase: when that is: ``init``, ``forward``, ``backward`` or ``step``.
        phases: phase -> items at that phase's own peak.
        allocated_bytes: what PyTorch's allocator has handed out at the peak.
        reserved_bytes: what PyTorch's allocator holds, splits and rounding included.
        driver_bytes: what the driver shows: reserved, the context and NCCL.
        host_items: bytes in host memory, by item; pinned blocks rounded up to a power of two.
        host_peak_bytes: their sum.
        nvme_bytes: files of this rank.
        basis: ``traced``, or ``coarse: REASON`` when the model's activations come from a closed formula.
    """

    items: dict[str, int]
    peak_phase: str
    phases: dict[str, dict[str, int]]
    allocated_bytes: int
    reserved_bytes: int
    driver_bytes: int
    host_items: dict[str, int]
    host_peak_bytes: int
    nvme_bytes: int
    basis: str


def predict_memory(plan: Plan, device: DeviceConstants = H200) -> MemoryPrediction:
    """The plan's memory. Needs no GPU, no DeepSpeed, and no torch when the model's trace is known."""
    if plan.device == "cpu":
        device = NO_GPU
    items = coarse_items(plan)
    allocated = sum(items.values())
    host = {} if plan.device == "cpu" else {k: v for k, v in plan.state_bytes.items() if k.startswith("host_")}
    outside = device.context_bytes + (device.nccl_bytes if plan.world_size > 1 else 0)
    return MemoryPrediction(
        items=items,
        peak_phase="backward",
        phases={"backward": items},
        allocated_bytes=allocated,
        reserved_bytes=allocated,
        driver_bytes=allocated + outside,
        host_items=host,
        host_peak_bytes=sum(host.values()),
        nvme_bytes=0,
        basis="coarse: the model was not traced",
    )


def peak_items(plan: Plan) -> dict[str, int]:
    """Bytes that the driver will show at the peak, by item."""
    found = predict_memory(plan)
    return {**found.items, "context": found.driver_bytes - found.allocated_bytes}


def state_bytes(plan: Plan) -> dict[str, int]:
    """Model states between two steps, by item; what `Engine.memory` reports. ``host_*`` items lie in host memory."""
    if plan.strategy.startswith("zero"):
        return zero_state_bytes(plan)
    return _replicated_state_bytes(plan)


def _replicated_state_bytes(plan: Plan) -> dict[str, int]:
    """single, DDP. Parameters hP; moments 8P; half precision adds masters 4P; DDP's gradient buckets stay: hP."""
    p, h = plan.parameters, 2 if plan.mixed else 4
    items = {"parameters": h * p, "moments": 8 * p}
    if plan.mixed:
        items["master"] = 4 * p
    if plan.mixed and plan.gradient_dtype == "fp32":
        items["gradients"] = 4 * p
    elif plan.world_size > 1:
        items["gradients"] = h * p
    return items


def engine_model(plan: Plan, ledger: Ledger, host: Ledger, events: Sequence[StepEvent]) -> EngineModel:
    """The plan's engine, as far as it allocates."""
    if plan.strategy == "zero3":
        return Zero3Model(plan, ledger, host, [event for event in events if isinstance(event, ModuleEvent)])
    if plan.strategy in ("zero1", "zero2"):
        return Zero2Model(plan, ledger, host)
    return ReplicatedModel(plan, ledger)
