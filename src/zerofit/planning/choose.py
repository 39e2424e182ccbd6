"""From wishes and hardware to a plan: the least sharding that fits. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..config.schema import Config, Offload, Precision, Strategy
from ..errors import ConfigError, DoesNotFit, MissingDependency
from .batch import BatchSplit, possible_splits
from .hardware import GIB, Hardware
from .memory import peak_items, state_bytes
from .plan import OptimizerPlan, Plan, ZeroPlan

#: Share of the free memory that a candidate may use; the rest covers fragmentation and the coarse estimate.
SAFE_SHARE = 0.9
#: Least sharding first: each next one communicates more or moves more over PCIe.
LADDER: tuple[tuple[Strategy, Offload, Offload], ...] = (
    ("single", "none", "none"),
    ("ddp", "none", "none"),
    ("zero1", "none", "none"),
    ("zero2", "none", "none"),
    ("zero3", "none", "none"),
    ("zero2", "cpu", "none"),
    ("zero3", "cpu", "cpu"),
)


@dataclass(frozen=True)
class Candidate:
    """One way to run, and whether it fits."""

    plan: Plan
    items: dict[str, int]
    """Bytes at the peak on one rank, by item."""
    limit_bytes: int
    """What one rank may use."""

    @property
    def peak_bytes(self) -> int:
        """Bytes at the peak on one rank."""
        return sum(self.items.values())

    @property
    def fits(self) -> bool:
        """True when the peak stays below the limit."""
        return self.peak_bytes <= self.limit_bytes


@dataclass(frozen=True)
class Choice:
    """The plan, and what else was considered (one candidate a strategy)."""

    plan: Plan
    candidates: tuple[Candidate, ...]
    warnings: tuple[str, ...]

    @property
    def split(self) -> BatchSplit:
        """How the plan spreads its batch."""
        return BatchSplit(self.plan.micro_batch, self.plan.accumulation_steps, self.plan.world_size)


def choose(config: Config, hardware: Hardware) -> Choice:
    """Decide everything that the configuration leaves open.

    Raises:
        ConfigError: contradictory batch numbers, more processes than GPUs, a precision the GPU lacks.
        MissingDependency: a ZeRO strategy was asked for and DeepSpeed is not installed.
        DoesNotFit: ``strategy: auto`` and nothing fits.
    """
    device = _device(config, hardware)
    world_size = _world_size(config, hardware, device)
    precision, warnings = _precision(config, hardware, device)
    splits = possible_splits(config, world_size)
    limit = _limit_bytes(hardware, device, world_size)
    candidates: list[Candidate] = []
    for strategy, offload, offload_parameters in _allowed(config, hardware, world_size):
        options = (
            _candidate(config, split, device, precision, strategy, offload, offload_parameters, limit)
            for split in splits
        )
        best = _first_that_fits(options)
        candidates.append(best)
    fitting = [c for c in candidates if c.fits]
    if not fitting and config.strategy == "auto":
        raise DoesNotFit(_nothing_fits(candidates, limit))
    chosen = (fitting or candidates)[0]
    if not fitting:
        warnings.append(
            f"{describe(chosen.plan)} may not fit: about {format_bytes(chosen.peak_bytes)} at the peak against "
            f"{format_bytes(limit)} that one rank may use (a coarse estimate); it is tried because it was asked for."
        )
    if config.compile and not chosen.plan.compile:
        warnings.append("compile is off: under ZeRO-3 it gives wrong gradients on GPUs (docs/experiments.md).")
    plan = chosen.plan.model_copy(update={"reason": _reason(config, chosen, candidates)})
    return Choice(plan, tuple(candidates), tuple(warnings))


def _first_that_fits(options: Iterator[Candidate]) -> Candidate:
    """The first option (largest micro-batch) that fits, else the last (smallest)."""
    option = next(options)
    for following in options:
        if option.fits:
            break
        option = following
    return option


def _device(config: Config, hardware: Hardware) -> str:
    if config.device == "cuda" and not hardware.gpus:
        raise ConfigError(
            "device cuda: no NVIDIA GPU is visible. Check nvidia-smi and CUDA_VISIBLE_DEVICES, or use device cpu."
        )
    if config.device != "auto":
        return config.device
    return "cuda" if hardware.gpus else "cpu"


def _world_size(config: Config, hardware: Hardware, device: str) -> int:
    wanted = config.num_gpus or (1 if config.strategy == "single" else max(len(hardware.gpus), 1))
    wanted = (config.num_gpus or 1) if device == "cpu" else wanted
    if device == "cuda" and wanted > len(hardware.gpus):
        raise ConfigError(
            f"{wanted} processes on {len(hardware.gpus)} visible GPUs: each process needs a GPU of its own. Use "
            f"num_gpus {len(hardware.gpus)}, or device cpu for a slow trial without GPUs."
        )
    if config.strategy == "single" and wanted > 1:
        raise ConfigError(
            f"strategy single with num_gpus {wanted}: single is one process. Use strategy ddp, or num_gpus 1."
        )
    if config.compile and hardware.system == "Windows":
        raise ConfigError("compile true: torch.compile needs Triton, which Windows lacks here. Use compile false.")
    return wanted


def _precision(config: Config, hardware: Hardware, device: str) -> tuple[Precision, list[str]]:
    has_bf16 = device == "cpu" or all(gpu.has_bf16 for gpu in hardware.gpus)
    if config.precision == "auto":
        if device == "cpu":
            return "fp32", []
        return ("bf16" if has_bf16 else "fp16"), []
    if config.precision == "bf16" and not has_bf16:
        names = ", ".join(sorted({gpu.name for gpu in hardware.gpus if not gpu.has_bf16}))
        raise ConfigError(f"precision bf16 on {names}: bf16 came with compute capability 8.0. Use precision fp16.")
    slow = device == "cpu" and config.precision == "fp16"
    return config.precision, ["fp16 on a CPU is emulated and slow; it is for trying things out."] if slow else []


def _limit_bytes(hardware: Hardware, device: str, world_size: int) -> int:
    if device == "cuda":
        return int(SAFE_SHARE * min(gpu.free_bytes for gpu in hardware.gpus))
    return int(SAFE_SHARE * hardware.host_memory_bytes / world_size)


def _allowed(config: Config, hardware: Hardware, world_size: int) -> list[tuple[Strategy, Offload, Offload]]:
    """The rungs of the ladder that the configuration and the machine leave open."""
    if config.strategy != "auto":
        if config.strategy.startswith("zero"):
            _require_deepspeed(config, hardware)
        return [(config.strategy, config.offload, config.offload_parameters)]
    rungs = [rung for rung in LADDER if _possible(rung[0], world_size, hardware)]
    if config.offload != "none":
        rungs = [rung for rung in rungs if rung[1] == config.offload]
        if not rungs:
            _require_deepspeed(config, hardware)
            raise ConfigError(
                f"strategy auto with offload {config.offload}: only ZeRO-3 swaps to NVMe. Use strategy zero3."
            )
    return rungs


def _possible(strategy: Strategy, world_size: int, hardware: Hardware) -> bool:
    if strategy == "single":
        return world_size == 1
    if strategy == "ddp":
        return world_size > 1
    return hardware.has_deepspeed and hardware.system == "Linux"


def _require_deepspeed(config: Config, hardware: Hardware) -> None:
    if hardware.system != "Linux":
        raise ConfigError(
            f"strategy {config.strategy} on {hardware.system}: ZeRO runs through DeepSpeed, which zerofit supports on "
            f"Linux only. Use strategy single or ddp."
        )
    if not hardware.has_deepspeed:
        raise MissingDependency(
            f"strategy {config.strategy}, offload {config.offload}: ZeRO and offload run through DeepSpeed, which is "
            f"not installed. Run `pip install 'zerofit[deepspeed]'`, or use strategy single or ddp without offload."
        )


def _candidate(
    config: Config,
    split: BatchSplit,
    device: str,
    precision: Precision,
    strategy: Strategy,
    offload: Offload,
    offload_parameters: Offload,
    limit_bytes: int,
) -> Candidate:
    plan = Plan.model_validate(
        {
            "model": config.model,
            "parameters": config.model.parameter_count(),
            "strategy": strategy,
            "offload": offload,
            "offload_parameters": offload_parameters,
            "nvme_path": config.nvme_path,
            "device": device,
            "world_size": split.world_size,
            "micro_batch": split.micro_batch,
            "accumulation_steps": split.accumulation_steps,
            "precision": precision,
            "gradient_dtype": config.gradient_dtype,
            "activation_checkpointing_every": {"none": 0, "full": 1}.get(
                str(config.activation_checkpointing), config.activation_checkpointing
            ),
            "compile": config.compile and strategy != "zero3",  # see Config: wrong gradients
            "compile_mode": config.compile_mode,
            "deterministic": config.deterministic,
            "seed": config.seed,
            "optimizer": _optimizer(config),
            "loss_scale": config.loss_scale,
            "zero": _zero(config, device),
            "collective_timeout_seconds": config.collective_timeout_seconds,
        }
    )
    plan = plan.model_copy(update={"state_bytes": state_bytes(plan)})
    return Candidate(plan, peak_items(plan), limit_bytes)


def _optimizer(config: Config) -> OptimizerPlan:
    names = set(OptimizerPlan.model_fields)
    return OptimizerPlan(**{k: v for k, v in config.optimizer.model_dump().items() if k in names})


def _zero(config: Config, device: str) -> ZeroPlan:
    wishes = {name: value for name, value in config.zero.model_dump().items() if value is not None}
    # Page-locking needs a driver to lock for.
    return ZeroPlan(**{"pin_memory": device == "cuda", **wishes})


def _reason(config: Config, chosen: Candidate, candidates: list[Candidate]) -> str:
    name, peak, limit = describe(chosen.plan), format_bytes(chosen.peak_bytes), format_bytes(chosen.limit_bytes)
    if config.strategy != "auto":
        return f"{name} was asked for; it needs about {peak} of the {limit} that one rank may use."
    passed = [c for c in candidates[: candidates.index(chosen)] if not c.fits]
    if not passed:
        return f"{name}: the least sharding fits, with about {peak} of the {limit} that one rank may use."
    before = passed[-1]
    return (
        f"{name} is the least sharding that fits: about {peak} of {limit}; {describe(before.plan)} would need about "
        f"{format_bytes(before.peak_bytes)} even at micro-batch {before.plan.micro_batch}."
    )


def _nothing_fits(candidates: list[Candidate], limit_bytes: int) -> str:
    least = min(candidates, key=lambda c: c.peak_bytes)
    needs = "; ".join(f"{describe(c.plan)} {format_bytes(c.peak_bytes)}" for c in candidates)
    cheaper = "" if least.plan.activation_checkpointing_every == 1 else "activation_checkpointing full, "
    return (
        f"No strategy fits: one rank may use {format_bytes(limit_bytes)}, and the estimated peaks are: {needs} (each "
        f"at its smallest micro-batch). The nearest is {describe(least.plan)}. Try {cheaper}a shorter block_size, "
        f"more GPUs, or a smaller model."
    )


def describe(plan: Plan) -> str:
    names = {"single": "single", "ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
    offload = {"none": "", "cpu": " + CPU offload", "nvme": " + NVMe offload"}[plan.offload]
    return names[plan.strategy] + offload


def format_bytes(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes >= GIB else f"{size_bytes / 1024**2:.1f} MiB"
