"""From wishes and hardware to a plan: what serves the goal best of all that fits. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config.models import GPT2Config
from ..config.optimizers import why_not
from ..config.schema import Config, Goal, Precision
from ..errors import ConfigError, DoesNotFit, MissingDependency
from .batch import BatchSplit, possible_splits
from .calibration import Rates, constants, rates
from .candidates import (
    LADDER,
    LOW_BIT,
    SAFE_SHARE_DISK,
    Builder,
    Candidate,
    Checkpointing,
    Rung,
    checkpointing_of,
    describe,
)
from .dimensions import dimension_notes, fallback_warnings
from .hardware import Hardware
from .plan import Plan
from .remedies import remedies, roomier
from .search import search
from .sizes import format_bytes, format_seconds

#: Predicted speeds closer than this are the same; then the least sharding wins.
SAME_SPEED = 0.03
#: How much of the speed ``goal: balanced`` gives for less memory.
BALANCED_SHARE = 0.10
#: Compiling is proposed where it would make steps faster by this share.
WORTH_COMPILING = 0.05


GOALS: tuple[Goal, ...] = ("speed", "memory", "balanced", "largest-batch")


@dataclass(frozen=True)
class Choice:
    """What was considered, and what was chosen of it."""

    hardware: Hardware
    rates: Rates | None
    goal: Goal
    candidates: tuple[Candidate, ...]
    """Of each strategy with its offload: the fastest that fits, and other ends of it; or its nearest miss."""
    chosen: Candidate | None
    """None when nothing that was asked for fits."""
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Sizes of the model that cost speed, and the better ones."""

    @property
    def plan(self) -> Plan:
        """The chosen plan.

        Raises:
            DoesNotFit: there is none.
        """
        if self.chosen is None:
            raise DoesNotFit(nothing_fits(self.candidates))
        return self.chosen.plan

    @property
    def split(self) -> BatchSplit:
        """How the plan spreads its batch."""
        plan = self.plan
        return BatchSplit(plan.micro_batch, plan.accumulation_steps, plan.world_size)

    @property
    def rows(self) -> tuple[Candidate, ...]:
        """One candidate a strategy, and the chosen one where that is another."""
        return tuple(c for c in self.candidates if c.variant == "fastest" or c is self.chosen)


def choose(config: Config, hardware: Hardware) -> Choice:
    """Decide everything that the configuration leaves open.

    Raises:
        ConfigError: contradictory batch numbers, more processes than GPUs, a precision the GPU lacks.
        MissingDependency: a ZeRO strategy was asked for and DeepSpeed is not installed.
        DoesNotFit: ``strategy: auto`` and nothing fits.
    """
    choice = survey(config, hardware)
    chosen = choice.chosen
    if chosen is not None:
        return choice
    if config.strategy == "auto":
        raise DoesNotFit(nothing_fits(choice.candidates))
    nearest = _nearest_miss([candidate for candidate in choice.candidates if candidate.asked])
    warning = (
        f"{describe(nearest.plan)} may not fit: it {nearest.verdict} ({nearest.memory.basis}); it is tried because it "
        f"was asked for. {_first_remedy(nearest)}"
    )
    tried = _explained(nearest, f"{describe(nearest.plan)} was asked for; it {nearest.verdict}.")
    candidates = tuple(tried if candidate is nearest else candidate for candidate in choice.candidates)
    return replace(choice, candidates=candidates, chosen=tried, warnings=(*choice.warnings, warning))


def survey(config: Config, hardware: Hardware, *, everything: bool = False) -> Choice:
    """The same, without refusing when nothing fits: then there are remedies and no choice.

    Strategies that were not asked for are looked at too, for comparison, where their batch can be split at all. Of each
    strategy the fastest is looked for and what serves the configuration's goal, or with `everything` every goal.
    """
    if "auto" in (config.optimizer.state, config.optimizer.master):
        return _least_lossy(config, hardware, everything)
    device = _device(config, hardware)
    world_size = _world_size(config, hardware, device)
    precision, warnings = _precision(config, hardware, device)
    _check_master(config, precision)
    found = rates(hardware, precision) if device == "cuda" else None
    builder = Builder(config, hardware, device, precision, found, constants(hardware))
    asked = _asked(config, hardware, world_size)
    candidates: list[Candidate] = []
    for rung in _considered(config, hardware, world_size, asked):
        wanted = rung in asked
        ranks = 1 if rung.strategy == "single" else world_size
        if not wanted and not _splittable(config, ranks):
            continue
        ends = search(builder, rung, possible_splits(config, ranks), GOALS if everything else (config.goal,))
        candidates += [_with_remedies(builder, replace(candidate, asked=wanted)) for candidate in ends]
    chosen = _best([c for c in candidates if c.asked and c.fits], config.goal)
    if chosen is not None:
        recorded = builder.recorded(chosen)
        candidates = [recorded if candidate is chosen else candidate for candidate in candidates]
        explained = _explained(recorded, _reason(config, recorded, candidates))
        candidates = [explained if candidate is recorded else candidate for candidate in candidates]
        chosen = explained
        warnings += _warnings(config, hardware, chosen)
    faster = [] if chosen is None else _compiled_faster(builder, chosen)
    notes = (*dimension_notes(config.model, precision, device), *faster)
    return Choice(hardware, found, config.goal, tuple(candidates), chosen, tuple(warnings), notes)


def _least_lossy(config: Config, hardware: Hardware, everything: bool) -> Choice:
    """With ``optimizer.state`` or ``master`` left open: fp32 where that fits, else what loses least and fits."""
    wish = config.optimizer
    levels = [(s, m) for s, m in LOW_BIT if wish.state in ("auto", s) and wish.master in ("auto", m)]
    for state, master in levels:
        decided = wish.model_copy(update={"state": state, "master": master})
        try:
            choice = survey(config.model_copy(update={"optimizer": decided}), hardware, everything=everything)
        except ConfigError:
            if (state, master) == levels[0]:
                raise
            break  # a bf16 master in another precision: what was found before stands
        if choice.chosen is not None:
            break
    return choice


def _check_master(config: Config, precision: Precision) -> None:
    """A bf16 master is the compute copy itself.

    Raises:
        ConfigError: in another precision, or with fp32 gradients under ZeRO, whose gradients have the master's type.
    """
    if config.optimizer.master != "bf16":
        return
    if precision != "bf16":
        raise ConfigError(
            f"optimizer.master bf16 with precision {precision}: the compute copy is what is updated, so it must be "
            f"bf16. Set precision bf16, or optimizer.master fp32."
        )
    if config.gradient_dtype == "fp32" and config.strategy.startswith("zero"):
        raise ConfigError(
            f"optimizer.master bf16 with gradient_dtype fp32 under {config.strategy}: DeepSpeed hands the optimizer "
            f"gradients of the master's type. Use gradient_dtype compute, or optimizer.master fp32."
        )


def _carries(config: Config, rung: Rung) -> bool:
    """Whether the rung can run the optimizer."""
    optimizer = config.optimizer
    if why_not(optimizer.kind, optimizer.state, optimizer.master, rung.strategy, rung.offload) is not None:
        return False
    if optimizer.master == "bf16" and config.gradient_dtype == "fp32" and rung.strategy.startswith("zero"):
        return False
    return config.ema_decay is None or rung.offload != "nvme"


def _with_remedies(builder: Builder, candidate: Candidate) -> Candidate:
    if not candidate.asked or (candidate.fits and not candidate.squeezed):
        return candidate
    return replace(candidate, remedies=(roomier if candidate.squeezed else remedies)(builder, candidate))


def _explained(candidate: Candidate, reason: str) -> Candidate:
    """The candidate whose plan says why it was chosen and what is expected of it."""
    plan = candidate.plan.model_copy(update={"reason": reason, "prediction": candidate.prediction})
    return replace(candidate, plan=plan)


def _device(config: Config, hardware: Hardware) -> str:
    if config.device == "cuda" and not hardware.gpus:
        raise ConfigError(
            "device cuda: no NVIDIA GPU is visible. Check nvidia-smi and CUDA_VISIBLE_DEVICES, or use device cpu."
        )
    if config.device != "auto":
        return config.device
    return "cuda" if hardware.gpus else "cpu"


def _world_size(config: Config, hardware: Hardware, device: str) -> int:
    """Ranks on all nodes; ``num_gpus`` counts those of one."""
    wanted = config.num_gpus or (1 if config.strategy == "single" else max(len(hardware.gpus), 1))
    wanted = (config.num_gpus or 1) if device == "cpu" else wanted
    if device == "cuda" and wanted > len(hardware.gpus):
        raise ConfigError(
            f"{wanted} processes on {len(hardware.gpus)} visible GPUs: each process needs a GPU of its own. Use "
            f"num_gpus {len(hardware.gpus)}, or device cpu for a slow trial without GPUs."
        )
    nodes = hardware.nodes if config.strategy != "single" else 1
    if config.strategy == "single" and wanted > 1:
        raise ConfigError(
            f"strategy single with num_gpus {wanted}: single is one process. Use strategy ddp, or num_gpus 1."
        )
    if config.strategy == "fsdp2" and nodes * wanted == 1:
        raise ConfigError(
            "strategy fsdp2 on one GPU: it shards parameters, gradients and optimizer states over GPUs, and here is "
            "one. Use strategy single, which needs as much memory and gathers nothing (a checkpoint of fsdp2 resumes "
            "under it), or strategy zero2 with offload cpu for less."
        )
    if config.compile and (reason := _why_not_compiled(hardware, device)):
        raise ConfigError(f"compile true{reason}. Use compile false.")
    return nodes * wanted


def _why_not_compiled(hardware: Hardware, device: str) -> str:
    """What ends "compile true" on a machine without torch.compile; empty where there is one."""
    if hardware.system == "Windows":
        return ": torch.compile needs Triton, which Windows lacks here"
    if device == "cuda" and any(gpu.capability < (7, 0) for gpu in hardware.gpus):
        capability = ".".join(map(str, hardware.gpus[0].capability))
        return (
            f" on {hardware.gpus[0].name}: torch.compile's Triton needs compute capability 7.0, and this GPU has "
            f"{capability}"
        )
    return ""


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


def _asked(config: Config, hardware: Hardware, world_size: int) -> list[Rung]:
    """What the configuration and the machine leave open, least sharding first."""
    rungs = [rung for rung in LADDER if _within_wishes(config, rung) and _carries(config, rung)]
    if config.strategy == "auto":
        rungs = [rung for rung in rungs if _possible(rung, world_size, hardware)]
    elif config.strategy.startswith("zero"):
        _require_deepspeed(config, hardware)
    has_nvme = config.nvme_path is not None or hardware.nvme_free_bytes is not None
    rungs = [rung for rung in rungs if has_nvme or rung.offload != "nvme"]
    if not rungs:
        _require_deepspeed(config, hardware)
        raise ConfigError(
            f"strategy {config.strategy} with offload {config.offload} and offload_parameters "
            f"{config.offload_parameters}, optimizer.kind {config.optimizer.kind}: no strategy has that here. Only "
            f"ZeRO-3 swaps to NVMe and offloads parameters, and only single and ddp leave matrices whole, as muon and "
            f"adafactor want them."
        )
    return rungs


def _within_wishes(config: Config, rung: Rung) -> bool:
    return (
        config.strategy in ("auto", rung.strategy)
        and config.offload in ("auto", rung.offload)
        and config.offload_parameters in ("auto", rung.offload_parameters)
    )


def _considered(config: Config, hardware: Hardware, world_size: int, asked: Sequence[Rung]) -> list[Rung]:
    """The rungs asked for, and every other that this machine can run, for comparison; NVMe only where there is some."""
    has_nvme = config.nvme_path is not None or hardware.nvme_free_bytes is not None
    shown = [r for r in LADDER if r.strategy == "single" or _possible(r, world_size, hardware)]
    shown = [r for r in shown if _carries(config, r)]
    return [rung for rung in LADDER if rung in asked or (rung in shown and (has_nvme or rung.offload != "nvme"))]


def _possible(rung: Rung, world_size: int, hardware: Hardware) -> bool:
    if rung.strategy == "single":
        return world_size == 1
    if rung.strategy in ("ddp", "fsdp2"):
        return world_size > 1
    return hardware.has_deepspeed and hardware.system == "Linux"


def _splittable(config: Config, ranks: int) -> bool:
    try:
        return bool(possible_splits(config, ranks))
    except ConfigError:
        return False


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


def _best(fitting: Sequence[Candidate], goal: Goal) -> Candidate | None:
    """What serves the goal best; of equals the one that shards least. What must be squeezed in is the last resort."""
    if not fitting:
        return None
    fitting = [candidate for candidate in fitting if not candidate.squeezed] or fitting
    if goal == "memory":
        return min(fitting, key=lambda c: (c.peak_bytes, *_slowness(c)))
    if goal == "largest-batch":
        return min(fitting, key=lambda c: (-c.plan.micro_batch, *_slowness(c)))
    fastest = min(fitting, key=_slowness)
    slack = BALANCED_SHARE if goal == "balanced" else SAME_SPEED
    near = [candidate for candidate in fitting if _speed(candidate) >= (1 - slack) * _speed(fastest)]
    if goal == "balanced":
        return min(near, key=lambda c: (c.peak_bytes, *_slowness(c)))
    return min(near, key=lambda c: (_sharding(c), *_slowness(c)))


def _speed(candidate: Candidate) -> float:
    """Tokens a second; without a prediction all are the same."""
    return candidate.step.tokens_per_second if candidate.step else 1.0


def _slowness(candidate: Candidate) -> tuple[float, int, float, int]:
    """A sorting key: predicted time; without one, sharding, recomputation, then the largest micro-batch."""
    plan = candidate.plan
    recomputed = Checkpointing(plan.activation_checkpointing_every, plan.recomputation).recomputed
    return (1 / _speed(candidate), _sharding(candidate), recomputed, -plan.micro_batch)


def _sharding(candidate: Candidate) -> int:
    plan = candidate.plan
    return LADDER.index(Rung(plan.strategy, plan.offload, plan.offload_parameters))


def _nearest_miss(candidates: Sequence[Candidate]) -> Candidate:
    return min(candidates, key=_shortfall)


def _reason(config: Config, chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    """Two sentences with numbers: what was chosen and how it fits, and why not the next."""
    name, room = describe(chosen.plan), _room(chosen)
    if config.strategy != "auto":
        return f"{name} was asked for. It needs {room}"
    words = {
        "speed": "the fastest that fits" if chosen.step else "the least sharding that fits",
        "memory": "what needs the least GPU memory",
        "balanced": "the least memory within a tenth of the fastest",
        "largest-batch": "the largest micro-batch that fits",
    }
    return f"{name} is {words[config.goal]}: {room} {_why_not(chosen, candidates)}".rstrip()


def _room(chosen: Candidate) -> str:
    """What it needs of what it may use, and its speed; of one that is squeezed in, what that rests on."""
    peak, limit, memory = format_bytes(chosen.peak_bytes), format_bytes(chosen.limit_bytes), chosen.memory
    if not chosen.squeezed:
        return f"about {peak} of the {limit} that one rank may use{_pace(chosen)}."
    reserve_bytes = memory.reserved_bytes - memory.allocated_bytes
    return (
        f"about {format_bytes(chosen.peak_bytes - reserve_bytes)} of the {limit} that one rank may use{_pace(chosen)}. "
        f"It is tight: with the {format_bytes(reserve_bytes)} that PyTorch's allocator holds in reserve it would be "
        f"{peak}, and it fits because a full GPU makes PyTorch give that back; steps may then take much longer."
    )


def _pace(candidate: Candidate) -> str:
    if candidate.step is None:
        return ""
    pace = f"{candidate.step.tokens_per_second:,.0f} {candidate.plan.model.items}/s"
    return f", {format_seconds(candidate.step.step_seconds)} a step, {pace}"


def _why_not(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    """The nearest alternative: what shards less and does not fit, else the next fastest."""
    rivals = [c for c in candidates if c.asked and c.variant == "fastest" and describe(c.plan) != describe(chosen.plan)]
    missed = [c for c in rivals if not c.fits and _sharding(c) < _sharding(chosen)]
    if missed:
        nearest = _nearest_miss(missed)
        return f"{describe(nearest.plan)} {nearest.verdict}, even at micro-batch {nearest.plan.micro_batch}."
    others = [c for c in rivals if c.fits and c.step is not None]
    if not others:
        return ""
    following = min(others, key=_slowness)
    share = _speed(following) / _speed(chosen) - 1
    pace = f"{share:+.0%} {chosen.plan.model.items}/s"
    return f"Next comes {describe(following.plan)} with {pace} at {format_bytes(following.peak_bytes)}."


def _warnings(config: Config, hardware: Hardware, chosen: Candidate) -> list[str]:
    """What a person should know although it can run."""
    found = []
    if config.activation_offload == "cpu" and chosen.plan.device == "cpu":
        found.append("activation_offload does nothing without a GPU: activations are in host memory anyway.")
    if config.compile and not chosen.plan.compile:
        found.append("compile is off: under ZeRO-3 it gives wrong gradients on GPUs (docs/experiments.md).")
    if config.cuda_graphs is True and not chosen.plan.cuda_graphs:
        found.append(
            f"cuda_graphs is off: {describe(chosen.plan)} cannot be recorded; that takes one GPU without sharding and "
            f"recomputation (strategy single, activation_checkpointing none)."
        )
    free = hardware.disk_free_bytes
    if free is not None and not hardware.described and chosen.disk_bytes > SAFE_SHARE_DISK * free:
        found.append(
            f"checkpoints may fill the disk: {format_bytes(chosen.checkpoint_bytes)} each, "
            f"{format_bytes(chosen.disk_bytes)} kept at once, {format_bytes(free)} free. Lower "
            f"keep_checkpoints; saving pauses while the disk is full."
        )
    if chosen.plan.device == "cuda":
        found += fallback_warnings(config.model, hardware.gpus[0].capability, chosen.plan.micro_batch)
    if chosen.plan.device == "cuda" and hardware.gpus[0].capability < (7, 5):
        found.append(f"{hardware.gpus[0].name} {hardware.gpus[0].software}.")
    return found


def _compiled_faster(builder: Builder, chosen: Candidate) -> list[str]:
    """Where launching kernels one by one holds the GPU up, what compiling the blocks would give."""
    plan, step = chosen.plan, chosen.step
    if step is None or step.parts["launch"] == 0 or plan.compile or plan.strategy == "zero3":
        return []
    if plan.activation_checkpointing_every and plan.recomputation != "full":
        return []  # which a compiled block does not have
    faster = builder.speed(plan.model_copy(update={"compile": True}))
    if faster is None or _why_not_compiled(builder.hardware, plan.device):
        return []
    gain = step.step_seconds / faster.step_seconds - 1
    if gain < WORTH_COMPILING:
        return []
    return [
        f"the GPU waits for its kernels to be launched; compile true would give about {gain:.0%} more "
        f"{plan.model.items}/s."
    ]


def _first_remedy(candidate: Candidate) -> str:
    return f"It {candidate.remedies[0]}." if candidate.remedies else ""


def nothing_fits(candidates: Sequence[Candidate]) -> str:
    """Why nothing that was asked for fits, and the cheapest ways out, one paragraph."""
    asked = [candidate for candidate in candidates if candidate.asked]
    nearest = _nearest_miss(asked)
    needs = "; ".join(f"{describe(c.plan)} {c.verdict}" for c in asked)
    recomputed = checkpointing_of(nearest.plan)
    ways = [
        f"{describe(c.plan)} {', or '.join(c.remedies[:2])}" for c in sorted(asked, key=_shortfall)[:3] if c.remedies
    ]
    other = _best([c for c in candidates if not c.asked and c.fits], "speed")
    if other is not None:
        tightly = " tightly" if other.squeezed else ""
        ways.append(f"strategy {other.plan.strategy}, offload {other.plan.offload} fits{tightly} as it is")
    model = nearest.plan.model
    length = "block_size" if isinstance(model, GPT2Config) else "max_seq_length"
    shorter = "a smaller data.image_size" if model.items == "images" else f"a shorter model.{length}"
    return (
        f"No strategy fits (each at its smallest: the nearest is {describe(nearest.plan)} at micro-batch "
        f"{nearest.plan.micro_batch}, activation checkpointing {recomputed}): {needs}. Ways to make it fit: "
        f"{'; '.join(ways)}; or {shorter}, or a smaller model."
    )


def _shortfall(candidate: Candidate) -> float:
    return max(need.needed_bytes / max(need.limit_bytes, 1) for need in candidate.needs)
