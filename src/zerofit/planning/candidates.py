"""One way to run: its plan, its memory, its speed, and whether the machine has room for it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..config.models import Recomputation
from ..config.schema import Config, Offload, Precision, Strategy
from .batch import BatchSplit
from .calibration import Rates
from .hardware import Hardware
from .memory import DeviceConstants, MemoryPrediction, fits_within, predict_memory, state_bytes
from .optimizer_states import checkpoint_bytes_a_parameter
from .pictures import pictures_ahead
from .plan import OptimizerPlan, Plan, Prediction, ZeroPlan
from .sizes import format_bytes
from .speed import StepPrediction, predict_step

#: Share of the free GPU memory that a candidate may use; the rest is the safety margin, wider for a coarse estimate.
SAFE_SHARE_TRACED, SAFE_SHARE_COARSE = 0.95, 0.90
#: The same of host memory and of disks.
SAFE_SHARE_HOST, SAFE_SHARE_DISK = 0.90, 0.95
#: Types of the optimizer's means and of the master, from what loses nothing to what is smallest.
LOW_BIT = (("fp32", "fp32"), ("8bit", "fp32"), ("8bit", "bf16"))
#: ``cuda_graphs: auto`` records models of these kinds, none of which waits for the device, where waiting for launches
#: is this share of a step at least.
RECORDED_KINDS, LAUNCH_SHARE = ("gpt2", "mamba", "resnet"), 0.05
#: Buckets for tight memory: a fifth of the usual; ZeRO-3 keeps less gathered.
TIGHT = {
    "reduce_bucket_elements": 10_000_000,
    "prefetch_bucket_elements": 10_000_000,
    "max_live_elements": 200_000_000,
    "max_reuse_distance_elements": 100_000_000,
}


@dataclass(frozen=True)
class Checkpointing:
    """Which blocks recompute their activations, and what of them.

    Attributes:
        every: every n-th block; 0 none.
        recomputation: see `config.models.Recomputation`.
    """

    every: int = 0
    recomputation: Recomputation = "full"

    @property
    def recomputed(self) -> float:
        """Share of a forward pass that is computed again; an ordering for when no rates are known."""
        return {"light": 0.03, "selective": 0.2, "full": 1.0}[self.recomputation] / self.every if self.every else 0.0

    @property
    def dropped(self) -> tuple[float, float]:
        """Share of the activations that is not kept: at least, and at most. Bounds, wide where models differ."""
        bounds = {"light": (0.15, 0.7), "selective": (0.25, 0.9), "full": (1.0, 1.0)}[self.recomputation]
        return (bounds[0] / self.every, bounds[1] / self.every) if self.every else (0.0, 0.0)


def checkpointings(config: Config) -> tuple[Checkpointing, ...]:
    """What the configuration leaves open; ``auto``: none, the model's ways between, every fourth and second block,
    all."""
    wish = config.activation_checkpointing
    if isinstance(wish, int):
        return (Checkpointing(wish),)
    if wish != "auto":
        return (Checkpointing() if wish == "none" else Checkpointing(1, wish),)
    everywhere = [way for way in config.model.recomputations if way == "full" or not config.compile]
    if config.activation_offload == "cpu":
        return tuple(Checkpointing(1, way) for way in everywhere)
    partial = [way for way in everywhere if way != "full"]
    return (Checkpointing(), *(Checkpointing(1, way) for way in partial), *(Checkpointing(n) for n in (4, 2, 1)))


def recordable(strategy: str, checkpointing: Checkpointing, device: str) -> bool:
    """Whether a micro-step can be recorded as a CUDA graph: one GPU, no collectives, no random numbers set back."""
    return strategy == "single" and checkpointing.every == 0 and device == "cuda"


@dataclass(frozen=True)
class Rung:
    """A strategy with its offload."""

    strategy: Strategy
    offload: Offload = "none"
    offload_parameters: Offload = "none"


#: Least sharding first: each next one communicates more or moves more over PCIe.
LADDER = (
    Rung("ddp"),
    Rung("single"),
    Rung("zero1"),
    Rung("zero2"),
    Rung("fsdp2"),
    Rung("zero3"),
    Rung("zero1", "cpu"),
    Rung("zero2", "cpu"),
    Rung("zero3", "cpu"),
    Rung("zero3", "cpu", "cpu"),
    Rung("zero3", "nvme"),
    Rung("zero3", "nvme", "nvme"),
)


@dataclass(frozen=True)
class Need:
    """Something of which a candidate needs a number of bytes, and the machine has a limit."""

    what: str
    needed_bytes: int
    available_bytes: int
    share: float
    """Of what is available, that may be used; the rest is the safety margin."""

    @property
    def limit_bytes(self) -> int:
        """What may be used."""
        return int(self.share * self.available_bytes)

    @property
    def met(self) -> bool:
        """True when the limit suffices."""
        return self.needed_bytes <= self.limit_bytes


@dataclass(frozen=True)
class Candidate:
    """One way to run, and whether it fits."""

    plan: Plan
    memory: MemoryPrediction
    step: StepPrediction | None
    """None where no rates are known."""
    needs: tuple[Need, ...]
    """GPU first; then host, disk and NVMe where they are limited."""
    host_peak_bytes: int
    """Of a node."""
    checkpoint_bytes: int
    """One checkpoint."""
    disk_bytes: int
    """All checkpoints that the retention keeps at once, and the one that is being written."""
    asked: bool = True
    """Within the configuration's wishes; others are there for comparison and never chosen."""
    squeezed: bool = False
    """It fits because PyTorch gives back what it holds in reserve when the GPU is full; then a step takes longer."""
    variant: str = "fastest"
    """Of its strategy: ``fastest``, ``least memory`` or ``largest batch``."""
    frozen: MemoryPrediction | None = None
    """Of the phase with a frozen backbone, where there is one; `memory` is that of the phase that needs more."""
    frozen_step: StepPrediction | None = None
    """A step of that phase, where it is known."""
    remedies: tuple[str, ...] = ()
    """For one that does not fit: the nearest changes that would."""

    @property
    def items(self) -> dict[str, int]:
        """Bytes on the GPU at the peak by item, what lies outside PyTorch's allocator included."""
        fragmentation = self.memory.reserved_bytes - self.memory.allocated_bytes
        outside = self.memory.driver_bytes - self.memory.reserved_bytes
        more = {"fragmentation": fragmentation, "context": outside}
        return {**self.memory.items, **{name: size for name, size in more.items() if size > 0}}

    @property
    def peak_bytes(self) -> int:
        """What the driver shows at the peak of one rank."""
        return self.memory.driver_bytes

    @property
    def limit_bytes(self) -> int:
        """What one rank may use."""
        return self.needs[0].limit_bytes

    @property
    def fits(self) -> bool:
        """True when every need is met; of the GPU's memory when squeezed."""
        return all(need.met for need in self.needs[1:]) and (self.squeezed or self.needs[0].met)

    @property
    def prediction(self) -> Prediction:
        """What goes into the plan, for the scorecard."""
        memory, step = self.memory, self.step
        return Prediction(
            gpu_peak_bytes=memory.allocated_bytes,
            gpu_reserved_bytes=memory.reserved_bytes,
            gpu_driver_bytes=memory.driver_bytes,
            gpu_items=memory.items,
            peak_phase=memory.peak_phase,
            memory_basis=memory.basis,
            host_peak_bytes=self.host_peak_bytes,
            step_seconds=step.step_seconds if step else None,
            step_parts=step.parts if step else None,
            tokens_per_second=step.tokens_per_second if step else None,
        )

    @property
    def split(self) -> BatchSplit:
        """How it spreads its batch."""
        return BatchSplit(self.plan.micro_batch, self.plan.accumulation_steps, self.plan.world_size)

    @property
    def verdict(self) -> str:
        """Fits or not, with the number that decides."""
        if self.squeezed:
            return f"fits in {format_bytes(self.limit_bytes)} when PyTorch gives back what it holds in reserve"
        missing = [need for need in self.needs if not need.met]
        if missing:
            worst = max(missing, key=lambda need: need.needed_bytes / max(need.limit_bytes, 1))
            return (
                f"needs {format_bytes(worst.needed_bytes)} of {worst.what}, and {format_bytes(worst.limit_bytes)} may "
                f"be used"
            )
        tightest = max(self.needs, key=lambda need: need.needed_bytes / max(need.limit_bytes, 1))
        return f"fits: {format_bytes(tightest.needed_bytes)} of {format_bytes(tightest.limit_bytes)} {tightest.what}"


@dataclass
class Builder:
    """Makes candidates of one configuration on one machine; remembers model states, which are slow to add up."""

    config: Config
    hardware: Hardware
    device: str
    precision: Precision
    rates: Rates | None
    constants: DeviceConstants
    _states: dict[tuple[object, ...], dict[str, int]] = field(default_factory=dict)
    _base: Plan | None = None

    def plan(self, rung: Rung, split: BatchSplit, checkpointing: Checkpointing, tight: bool) -> Plan:
        """The plan of one option."""
        if self._base is None:
            self._base = self._validated(rung, split)
        zero = zero_plan(self.config, self.device, self._base.parameters, tight, rung.offload_parameters)
        plan = self._base.model_copy(
            update={
                "strategy": rung.strategy,
                "offload": rung.offload,
                "offload_parameters": rung.offload_parameters,
                "world_size": split.world_size,
                "ranks_per_node": -(-split.world_size // self.hardware.nodes),
                "micro_batch": split.micro_batch,
                "accumulation_steps": split.accumulation_steps,
                "activation_checkpointing_every": checkpointing.every,
                "recomputation": checkpointing.recomputation,
                "activation_offload": self.config.activation_offload,
                "compile": self.config.compile and rung.strategy != "zero3",  # see Config: wrong gradients
                "cuda_graphs": self.config.cuda_graphs is True
                and recordable(rung.strategy, checkpointing, self.device),
                "zero": zero,
            }
        )
        key = (rung, split.world_size, split.accumulation_steps > 1, zero, plan.cuda_graphs)
        if key not in self._states:
            self._states[key] = state_bytes(plan)
        return plan.model_copy(update={"state_bytes": self._states[key]})

    def _validated(self, rung: Rung, split: BatchSplit) -> Plan:
        config, names = self.config, set(OptimizerPlan.model_fields)
        wishes = {name: value for name, value in config.optimizer.model_dump().items() if value is not None}
        return Plan(
            model=config.model,
            parameters=config.model.parameter_count(),
            strategy=rung.strategy,
            nvme_path=config.nvme_path,
            device="cuda" if self.device == "cuda" else "cpu",
            world_size=split.world_size,
            micro_batch=split.micro_batch,
            accumulation_steps=split.accumulation_steps,
            precision=self.precision,
            gradient_dtype=config.gradient_dtype,
            compile_mode=config.compile_mode,
            deterministic=config.deterministic,
            seed=config.seed,
            optimizer=OptimizerPlan(
                **{name: value for name, value in wishes.items() if name in names},
                seed=config.seed,
                ema_decay=config.ema_decay,
            ),
            pictures=pictures_ahead(config),
            loss_scale=config.loss_scale,
            fsdp=config.fsdp,
            collective_timeout_seconds=config.collective_timeout_seconds,
        )

    def speed(self, plan: Plan) -> StepPrediction | None:
        """Its step's time; cheap."""
        return predict_step(plan, self.rates)

    def candidate(self, plan: Plan) -> Candidate:
        """The plan with its memory, its speed and the machine's limits."""
        free = min(gpu.free_bytes for gpu in self.hardware.gpus) if self.device == "cuda" else None
        memory = predict_memory(plan, self.constants, free_bytes=free)
        frozen = None
        if getattr(plan.model, "freeze_epochs", 0):
            frozen = predict_memory(plan.frozen_phase(), self.constants, free_bytes=free)
            if frozen.driver_bytes > memory.driver_bytes:
                # Of the host and of NVMe the phase counts that needs most there: offloading is for the whole network.
                fuller = max(frozen, memory, key=lambda phase: phase.host_peak_bytes)
                memory = frozen = replace(
                    frozen,
                    host_items=fuller.host_items,
                    host_peak_bytes=fuller.host_peak_bytes,
                    nvme_bytes=max(frozen.nvme_bytes, memory.nvme_bytes),
                )
        ranks = plan.ranks_per_node or plan.world_size
        host = 0 if self.device == "cpu" else ranks * memory.host_peak_bytes
        checkpoint, disk = checkpoint_bytes(self.config, plan.parameters)
        return Candidate(
            plan=plan,
            memory=memory,
            step=self.speed(plan),
            needs=tuple(self._needs(memory, ranks, host, disk)),
            host_peak_bytes=host,
            checkpoint_bytes=checkpoint,
            disk_bytes=disk,
            frozen=frozen,
            frozen_step=self.speed(plan.frozen_phase()) if frozen is not None else None,
        )

    def recorded(self, candidate: Candidate) -> Candidate:
        """The same with CUDA graphs where the configuration leaves that open, launching holds the GPU up, and there is
        room; else as it is."""
        plan, step = candidate.plan, candidate.step
        way = Checkpointing(plan.activation_checkpointing_every, plan.recomputation)
        if self.config.cuda_graphs != "auto" or plan.model.kind not in RECORDED_KINDS or step is None:
            return candidate
        if not recordable(plan.strategy, way, plan.device) or step.parts["launch"] < LAUNCH_SHARE * step.step_seconds:
            return candidate
        with_graphs = plan.model_copy(update={"cuda_graphs": True})
        with_graphs = with_graphs.model_copy(update={"state_bytes": state_bytes(with_graphs)})
        found = replace(self.candidate(with_graphs), asked=candidate.asked, variant=candidate.variant)
        return found if found.fits else candidate

    def squeeze(self, missed: Candidate) -> Candidate:
        """The same, fitting after all where a full GPU makes PyTorch's allocator give back its reserve."""
        memory, limit = missed.memory, missed.limit_bytes
        least = memory.allocated_bytes + memory.driver_bytes - memory.reserved_bytes
        if missed.frozen is not None and missed.frozen.driver_bytes > limit:
            return missed
        if missed.needs[0].met or least > limit or not fits_within(missed.plan, limit, self.constants):
            return missed
        return replace(missed, squeezed=True)

    def _needs(self, memory: MemoryPrediction, ranks: int, host: int, disk: int) -> Iterator[Need]:
        hardware = self.hardware
        share = SAFE_SHARE_TRACED if memory.basis.startswith("traced") else SAFE_SHARE_COARSE
        if self.device == "cpu":
            yield Need("memory a process", memory.driver_bytes, hardware.host_memory_bytes // ranks, share)
            return
        yield Need("GPU memory", memory.driver_bytes, min(gpu.free_bytes for gpu in hardware.gpus), share)
        yield Need("host memory a node", host, hardware.host_memory_bytes, SAFE_SHARE_HOST)
        if hardware.described and hardware.disk_free_bytes is not None:
            yield Need("disk for checkpoints", disk, hardware.disk_free_bytes, SAFE_SHARE_DISK)
        if memory.nvme_bytes and hardware.nvme_free_bytes is not None:
            yield Need("NVMe a node", ranks * memory.nvme_bytes, hardware.nvme_free_bytes, SAFE_SHARE_DISK)


def zero_plan(config: Config, device: str, parameters: int, tight: bool, offload_parameters: Offload) -> ZeroPlan:
    """DeepSpeed's knobs: the configuration's where it names them. A bucket larger than the model would be wasted."""
    wishes = {name: value for name, value in config.zero.model_dump().items() if value is not None}
    bucket = min(ZeroPlan().reduce_bucket_elements, parameters)
    # Page-locking needs a driver to lock for.
    usual = {"pin_memory": device == "cuda", "reduce_bucket_elements": bucket}
    narrow = {**TIGHT, "reduce_bucket_elements": min(bucket, TIGHT["reduce_bucket_elements"])} if tight else {}
    return ZeroPlan(**{**usual, **narrow, **wishes})


def checkpoint_bytes(config: Config, parameters: int) -> tuple[int, int]:
    """One checkpoint, and all that lie on the disk at once: the newest, the best, the ends of stages, and the one being
    written."""
    one = checkpoint_bytes_a_parameter(config.optimizer.kind, config.ema_decay is not None) * parameters
    if config.save_interval == "never" and not config.save_on_improvement:
        # A frozen phase ends in a checkpoint, whatever else is saved.
        return one, one if getattr(config.model, "freeze_epochs", 0) else 0
    stages = 0 if config.save_interval == "never" else max(len(config.stages) - 1, 0)  # the last one is the newest
    return one, one * (config.keep_checkpoints + (config.keep_best or 1) + stages + 1)


def checkpointing_of(plan: Plan) -> str | int:
    """As the configuration spells it: ``none``, ``light``, ``selective``, ``full`` or every n-th."""
    every = plan.activation_checkpointing_every
    return {0: "none", 1: plan.recomputation}.get(every, every)


def describe(plan: Plan) -> str:
    """The strategy and its offload in words."""
    zero = {"zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
    names = {"single": "single", "ddp": "DDP", "fsdp2": "FSDP2", **zero}
    offload = {"none": "", "cpu": " + CPU offload", "nvme": " + NVMe offload"}[plan.offload]
    return names[plan.strategy] + offload + (" + parameters" if plan.offload_parameters != "none" else "")


def describe_states(optimizer: OptimizerPlan) -> str:
    """Low-bit states with what they cost, in words; empty for fp32."""
    means = {"fp32": "", "bf16": "bf16 moments", "8bit": "8-bit moments"}[optimizer.state]
    parts = [*(["bf16 master"] if optimizer.master == "bf16" else []), *([means] if means else [])]
    costs = [*(["each step rounds the weights to 8 bits of mantissa"] if optimizer.master == "bf16" else []),
             *(["running means carry rounding noise"] if means else [])]  # fmt: skip
    return f"{' and '.join(parts)} ({', '.join(costs)}; unbiased: rounded stochastically)" if parts else ""
