"""What a plan needs on the busiest rank: GPU bytes at the peak and when, host bytes, NVMe bytes.

A traced micro-step of the model (`template`, `trace`) is played against a model of the engine (`memory_replicated`,
`memory_zero2`, `memory_zero3`, `memory_fsdp`); the sequence of allocations goes through a simulation of PyTorch's
allocator. The tests compare each engine model with the engine itself, and model states with what engines report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256

from . import store
from .allocator import ROUND_BYTES, simulate_allocator
from .coarse import coarse_items
from .memory_fsdp import FSDPModel, fsdp_state_bytes
from .memory_replicated import ReplicatedModel, replicated_state_bytes
from .memory_zero2 import Zero2Model
from .memory_zero3 import Zero3Model
from .pictures import page_locked_bytes, play_pictures
from .plan import Plan, input_bytes
from .saving import decodes, play_save
from .template import ModuleEvent, StepEvent, compose
from .timeline import EngineModel, Ledger, parameter_elements, simulate
from .zero_memory import pinned_bytes, swapped_bytes, zero_state_bytes

MIB = 1024**2
#: One rank's process before it holds anything of ours: interpreter, PyTorch, CUDA's libraries. Not measured.
PROCESS_BYTES = 2048 * MIB


@dataclass(frozen=True)
class DeviceConstants:
    """What one process costs on one kind of GPU, beside its tensors. Measured once per kind.

    Attributes:
        context_bytes: CUDA context and loaded kernels, outside PyTorch's allocator.
        nccl_bytes: more of that with a process group of several ranks that all-reduces, as DDP does.
        workspace_bytes: cuBLAS workspace per handle and stream, inside PyTorch's allocator.
    """

    context_bytes: int
    nccl_bytes: int
    workspace_bytes: int


#: Measured on NVIDIA H200 (driver 580, torch 2.11 with CUDA 13.0): the driver showed 751 to 771 MiB more than PyTorch
#: held in 16 cases of one process, 1,600 to 1,620 MiB under DDP on 2 and 4 GPUs
#: (benchmarks/results/2026-11-21-h200-memory-*gpu.json). cuBLAS takes 32 MiB a handle and stream on Hopper.
H200 = DeviceConstants(context_bytes=768 * MIB, nccl_bytes=850 * MIB, workspace_bytes=32 * MIB)
#: Not measured: other GPUs load fewer kernels; before Hopper cuBLAS takes 8.125 MiB a handle and stream.
OTHER_GPU = DeviceConstants(context_bytes=600 * MIB, nccl_bytes=850 * MIB, workspace_bytes=8_519_680)
#: Multiples of `DeviceConstants.nccl_bytes`: DeepSpeed uses more communicators, and ZeRO on one rank has a group too.
#: In the files named above: DDP 850 MiB, ZeRO-1 and 2 1,330, ZeRO-3 1,050, ZeRO on one GPU 950 to 1,000.
#: FSDP2 was not measured: taken to be ZeRO-3's, which gathers and reduce-scatters in one communicator as well.
GROUPS = {"ddp": 1.0, "zero1": 1.57, "zero2": 1.57, "zero3": 1.24, "fsdp2": 1.24}
ZERO_ALONE_GROUP = 1.15
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
        peak_phase: when that is: ``init``, ``forward``, ``backward``, ``step``, or ``save`` with low-bit states.
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


def predict_memory(plan: Plan, device: DeviceConstants = H200, *, free_bytes: int | None = None) -> MemoryPrediction:
    """The plan's memory. Needs no GPU, no DeepSpeed, and no torch when the model's trace is known.

    Remembered in the user's cache folder, see `store`.

    Args:
        free_bytes: what the GPU has free for one process; None: enough. Where it is short, DeepSpeed starts up through
            host memory.
    """
    if plan.device == "cpu":
        device = NO_GPU
    known, key = store.predictions(), _plan_key(plan, device)
    found = known.get(key)
    if found is None:
        found = asdict(_predict(plan, device, None))
        if found["basis"] == "traced":
            known.put(key, found)
    prediction = MemoryPrediction(**found)
    starts_short = free_bytes is not None and prediction.phases.get("init") and prediction.driver_bytes > free_bytes
    if not starts_short or prediction.peak_phase != "init" or plan.strategy not in ("zero1", "zero2"):
        return prediction
    return _predict_short(plan, device, free_bytes, key)


def _predict_short(plan: Plan, device: DeviceConstants, free_bytes: int | None, key: str) -> MemoryPrediction:
    """The plan's memory on a GPU that has less free than the start would like."""
    assert free_bytes is not None
    known, key = store.predictions(), f"{key}-{free_bytes}"
    found = known.get(key)
    if found is not None:
        return MemoryPrediction(**found)
    prediction = _predict(plan, device, free_bytes - _outside_bytes(plan, device))
    if prediction.basis == "traced":
        known.put(key, asdict(prediction))
    return prediction


def _plan_key(plan: Plan, device: DeviceConstants) -> str:
    """What decides about memory, hashed."""
    decides = plan.model_dump_json(exclude={"reason", "state_bytes", "seed", "loss_scale", "nvme_path"})
    return sha256(f"{decides}{device}".encode()).hexdigest()[:24]


def fits_within(plan: Plan, limit_bytes: int, device: DeviceConstants = H200) -> bool:
    """Whether the plan runs where the driver gives one process `limit_bytes`.

    Closer than comparing `MemoryPrediction.driver_bytes`: a full GPU makes PyTorch give back what it holds in reserve.
    """
    if predict_memory(plan, device).driver_bytes <= limit_bytes:
        return True
    if plan.device == "cpu":
        return False
    outside = _outside_bytes(plan, device)
    try:
        micro_step = _micro_step(plan)
        for rank in _ranks(plan):
            ledger, _ = _play(plan, device, *micro_step, limit_bytes - outside, rank)
            simulate_allocator(ledger.sequence, limit_bytes - outside)
    except Exception:  # out of memory, or a model that cannot be traced, whose coarse estimate has just been compared
        return False
    return True


def _outside_bytes(plan: Plan, device: DeviceConstants) -> int:
    """What one process takes of the GPU outside PyTorch's allocator."""
    alone = ZERO_ALONE_GROUP if plan.strategy.startswith("zero") else 0.0
    share = alone if plan.world_size == 1 else GROUPS[plan.strategy]
    return device.context_bytes + int(share * device.nccl_bytes)


def _predict(plan: Plan, device: DeviceConstants, room_bytes: int | None = None) -> MemoryPrediction:
    try:
        micro_step = _micro_step(plan)
    except Exception as reason:  # a model that cannot be traced, or no torch to trace it with
        return _coarse(plan, device, f"{type(reason).__name__}: {reason}")
    answers = [_of_rank(plan, device, micro_step, room_bytes, rank) for rank in _ranks(plan)]
    largest = max(answers, key=lambda answer: answer.allocated_bytes)
    fullest = max(answers, key=lambda answer: answer.reserved_bytes)
    return replace(largest, reserved_bytes=fullest.reserved_bytes, driver_bytes=fullest.driver_bytes)


def _ranks(plan: Plan) -> tuple[int | None, ...]:
    """Those whose memory differs: under ZeRO-1 and 2 the last one's allocations are the highest, and rank 0's leave the
    most in PyTorch's reserve (see `Zero2Model`)."""
    differ = plan.strategy in ("zero1", "zero2") and plan.world_size > 1 and plan.device == "cuda"
    return (None, 0) if differ else (None,)


def _of_rank(
    plan: Plan,
    device: DeviceConstants,
    micro_step: tuple[list[StepEvent], list[int]],
    room_bytes: int | None,
    rank: int | None,
) -> MemoryPrediction:
    """What one rank needs; None: the one that allocates most."""
    ledger, host = _play(plan, device, *micro_step, room_bytes, rank)
    phases = {phase: {k: v for k, v in items.items() if v} for phase, (_, items) in ledger.peaks.items()}
    phase = max(ledger.peaks, key=lambda name: ledger.peaks[name][0])
    allocated = reserved = ledger.peaks[phase][0]
    if plan.device == "cuda":
        peaks = simulate_allocator(ledger.sequence)
        allocated, reserved = max(allocated, peaks.allocated_bytes), peaks.reserved_bytes
        phases[phase]["rounding"] = allocated - ledger.peaks[phase][0]
    return _answer(plan, device, phases, phase, allocated, reserved, _host_items(plan, host), "traced")


def _micro_step(plan: Plan) -> tuple[list[StepEvent], list[int]]:
    """The events of one micro-step, and the bytes of each input."""
    every, depth = plan.activation_checkpointing_every, plan.model.depth
    if not plan.model.blocks_alike:
        whole = store.template(plan, recompute=every > 0)
        inputs = [slope * plan.micro_batch + offset for slope, offset in whole.inputs]
        return list(compose(whole, None, depth, 0, plan.micro_batch)), inputs
    plain = store.template(plan, recompute=False)
    recomputed = store.template(plan, recompute=True) if every else None
    events = list(compose(plain, recomputed, depth, every, plan.micro_batch))
    return events, [slope * plan.micro_batch + offset for slope, offset in plain.inputs]


def _play(
    plan: Plan,
    device: DeviceConstants,
    events: Sequence[StepEvent],
    inputs: Sequence[int],
    room_bytes: int | None = None,
    rank: int | None = None,
) -> tuple[Ledger, Ledger]:
    """The run on a rank's GPU and in host memory (the same without a GPU)."""
    on_gpu = plan.device == "cuda"
    ledger = Ledger(ROUND_BYTES if on_gpu else 1)
    host = Ledger() if on_gpu else ledger
    workspace = device.workspace_bytes if on_gpu else 0
    for name, shape in plan.model.buffer_shapes().items():
        ledger.alloc(("buffer", name), 4 * math.prod(shape) if shape else 8, "buffers")
    if average := _average_bytes(plan):
        ledger.alloc("average of buffers", average, "buffers")
    for item, size in frozen_bytes(plan).items():
        (host if item.startswith("host_") else ledger).alloc(item, size, item)
    play_pictures(plan, ledger)
    save = partial(play_save, plan, ledger) if decodes(plan) else None
    simulate(plan, ledger, engine_model(plan, ledger, host, events, room_bytes, rank), events, inputs, workspace, save)
    return ledger, host


def _coarse(plan: Plan, device: DeviceConstants, reason: str) -> MemoryPrediction:
    states = state_bytes(plan)
    items = coarse_items(plan, states)
    allocated = sum(items.values())
    host = Ledger()
    for name, size_bytes in states.items():
        if name.startswith("host_"):
            host.alloc(name, size_bytes, name)
    host.begin("init")
    answer = _answer(plan, device, {"backward": items}, "backward", allocated, allocated, _host_items(plan, host), "")
    return replace(answer, basis=f"coarse: {reason}")


def _answer(
    plan: Plan,
    device: DeviceConstants,
    phases: dict[str, dict[str, int]],
    phase: str,
    allocated: int,
    reserved: int,
    host_items: dict[str, int],
    basis: str,
) -> MemoryPrediction:
    outside = _outside_bytes(plan, device)
    return MemoryPrediction(
        items=phases[phase],
        peak_phase=phase,
        phases=phases,
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        driver_bytes=reserved + outside,
        host_items=host_items,
        host_peak_bytes=sum(host_items.values()),
        nvme_bytes=swapped_bytes(plan),
        basis=basis,
    )


def _host_items(plan: Plan, host: Ledger) -> dict[str, int]:
    """Beside a GPU: the process itself, what is offloaded, and reading the largest parameter (fp32, twice)."""
    if plan.device == "cpu":
        return {}
    largest = max((items for _, items in host.peaks.values()), key=lambda items: sum(items.values()), default={})
    loading = 2 * 4 * max(parameter_elements(plan).values())
    inputs = {}
    if plan.activation_offload == "cpu":
        inputs = {"activations": sum(map(pinned_bytes, input_bytes(plan)))}
    return {
        "process": PROCESS_BYTES,
        "loading": loading,
        **inputs,
        **({"pictures": locked} if (locked := page_locked_bytes(plan)) else {}),
        **{name: size for name, size in largest.items() if size},
    }


def engine_model(
    plan: Plan,
    ledger: Ledger,
    host: Ledger,
    events: Sequence[StepEvent],
    room_bytes: int | None = None,
    rank: int | None = None,
) -> EngineModel:
    """The plan's engine, as far as it allocates.

    Args:
        ledger: of the GPU.
        host: of host memory; the same ledger when there is no GPU.
        events: one micro-step, whose module events ZeRO-3 follows.
        room_bytes: of the GPU for PyTorch's allocator; None: enough.
        rank: whose; None: the one that allocates most.
    """
    if plan.strategy == "zero3":
        return Zero3Model(plan, ledger, host, [event for event in events if isinstance(event, ModuleEvent)])
    if plan.strategy == "fsdp2":
        return FSDPModel(plan, ledger, events)
    if plan.strategy in ("zero1", "zero2"):
        return Zero2Model(plan, ledger, host, room_bytes, rank)
    return ReplicatedModel(plan, ledger)


def state_bytes(plan: Plan) -> dict[str, int]:
    """Model states between two steps, by item; what `Engine.memory` reports. ``host_*`` items lie in host memory."""
    if plan.strategy == "fsdp2":
        items = fsdp_state_bytes(plan)
    else:
        items = zero_state_bytes(plan) if plan.strategy.startswith("zero") else replicated_state_bytes(plan)
    buffers = buffer_bytes(plan)
    return items | ({"buffers": buffers} if buffers else {}) | frozen_bytes(plan)


def frozen_bytes(plan: Plan) -> dict[str, int]:
    """Of parameters that are not trained: the compute copy, whole on every rank; in half precision a share of their
    fp32 values in host memory. Mirrors `engines.frozen`."""
    elements = sum(math.prod(shape) for shape in plan.frozen_shapes().values())
    if not plan.frozen:
        return {}
    host = {"host_frozen": 4 * -(-elements // plan.world_size)} if plan.mixed else {}
    return {"frozen": (2 if plan.mixed else 4) * elements, **host}


def buffer_bytes(plan: Plan) -> int:
    """Whole on every rank: fp32 statistics, counters of 8 bytes, and the statistics' average where the weights have
    one. Mirrors `engines.buffers`."""
    shapes = plan.model.buffer_shapes().values()
    return sum(4 * math.prod(shape) if shape else 8 for shape in shapes) + _average_bytes(plan)


def _average_bytes(plan: Plan) -> int:
    if plan.optimizer.ema_decay is None:
        return 0
    return sum(4 * math.prod(shape) for shape in plan.model.buffer_shapes().values() if shape)
