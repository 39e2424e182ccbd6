"""The plan as people and programs read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config.durations import ENDLESS_STEPS
from ..config.schema import Config, DataConfig
from ..config.stages import describe_data, describe_stages, has_last_step, spans
from .candidates import Candidate, checkpointing_of, describe, describe_states
from .choose import Choice
from .hardware import Hardware
from .recipes import MOST_SAMPLES, Recipe
from .sizes import format_bytes, format_seconds
from .speed import FORMULAS, why_not_predicted

#: Columns that say something on GPUs only, and those that a terminal narrower than `WIDE` has no room for.
GPU_COLUMNS = ("host", "step", "tokens/s", "MFU")
WIDE, WIDE_COLUMNS, WIDE_GPU_COLUMNS = (
    120,
    ("recompute",),
    ("recompute", "states", "activations", "host", "tokens/s", "MFU"),
)
BAR_WIDTH = 40
#: Items of the memory bar, by the letter that fills it.
_BAR = (
    ("p", "parameters", ("parameters", "gathered")),
    ("o", "optimizer states", ("master", "moments", "ema", "decoded states")),
    ("g", "gradients and buckets", ("gradients", "buckets")),
    ("a", "activations and logits", ("activations", "logits")),
    ("c", "context and NCCL", ("context",)),
)


def print_choice(console: Console, config: Config, choice: Choice, *, everything: bool = False) -> None:
    """The table of candidates, memory bars, the choice and its reason, the batch equation, warnings.

    Args:
        console: where to.
        config: for the number of steps.
        choice: what to show; without a chosen candidate the remedies are shown.
        everything: all candidates, not one a strategy.
    """
    print_heading(console, choice)
    shown = choice.candidates if everything else choice.rows
    console.print(candidate_table(choice, shown, wide=console.width >= WIDE))
    if choice.candidates[0].plan.device == "cuda":
        console.print(memory_bars(choice, shown))
    for candidate in shown:
        if candidate.remedies:
            _say(console, f"{describe(candidate.plan)} {candidate.verdict}: {'; '.join(candidate.remedies)}.")
    if choice.chosen is not None:
        _print_chosen(console, config, choice, choice.chosen)
    for note in choice.notes:
        _say(console, f"Note: {note}.")
    for warning in choice.warnings:
        console.print(f"Warning: {warning}", style="yellow", highlight=False, soft_wrap=True)


def print_heading(console: Console, choice: Choice) -> None:
    """Model, precision, machine, and where the rates come from."""
    plan = max(choice.candidates, key=lambda candidate: candidate.plan.world_size).plan
    _say(
        console,
        f"Plan for {plan.model.kind} with {plan.parameters:,} parameters, {plan.precision}, on "
        f"{describe_hardware(choice.hardware, plan.world_size, plan.device)}:",
    )
    if choice.rates is not None and why_not_predicted(plan, choice.rates) is None:
        counted = " A timm model's are counted, and none was measured." if plan.model.kind == "timm" else ""
        _say(console, f"Speeds: {choice.rates.source}; expect them within {choice.rates.error:.0%}.{counted}")
    if reason := why_not_predicted(plan, choice.rates):
        _say(console, f"Speeds are not predicted: {reason}.")


def describe_hardware(hardware: Hardware, ranks: int, device: str) -> str:
    """The machine in words."""
    if device == "cpu":
        return f"{ranks} x CPU process"
    gpu = hardware.gpus[0]
    nodes = f" on {hardware.nodes} nodes" if hardware.nodes > 1 else ""
    linked = f", {'NVLink' if hardware.link == 'nvlink' else 'PCIe'}" if len(hardware.gpus) > 1 else ""
    network = hardware.network_bytes_per_second
    between = f", {network * 8 / 1e9:.0f} Gbit/s between nodes" if network else ""
    # A card that is known by its memory alone has it in its name.
    size = "" if gpu.assumed else f" ({format_bytes(gpu.memory_bytes)})"
    return f"{ranks} x {gpu.name}{size}{nodes}{linked}{between}"


def _print_chosen(console: Console, config: Config, choice: Choice, chosen: Candidate) -> None:
    plan = chosen.plan
    _say(console, plan.reason)
    states = describe_states(plan.optimizer)
    if states:
        _say(console, f"Optimizer states: {states}.")
    if plan.cuda_graphs:
        _say(console, "Forward and backward pass are recorded as a CUDA graph after a few steps, and replayed.")
    run = f", about {format_seconds(config.max_steps * chosen.step.step_seconds)}" if chosen.step else ""
    items = f"{plan.global_batch * plan.model.items_per_sample:,} {plan.model.items} a step"
    length = f"{config.max_steps:,} steps{run}" if config.max_steps < ENDLESS_STEPS else f"for {config.duration}"
    _say(
        console,
        f"Batch: {choice.split.equation()}; {items}, {length}.",
    )
    if chosen.frozen is not None:
        _say(console, describe_frozen(chosen, why_not_predicted(chosen.plan.frozen_phase(), choice.rates)))
    for line in describe_stages(config):
        _say(console, line)
    if isinstance(config.data, DataConfig) and config.data.sources and not config.stages:
        _say(console, f"Data: {describe_data(config.data)}.")
    if chosen.disk_bytes:
        _say(
            console,
            f"Checkpoints: {format_bytes(chosen.checkpoint_bytes)} each, up to {format_bytes(chosen.disk_bytes)} on "
            f"disk.",
        )


def describe_frozen(candidate: Candidate, unpredicted: str | None) -> str:
    """What a frozen phase trains, needs and takes, in two sentences.

    Args:
        unpredicted: why its steps' time is not predicted.
    """
    plan, frozen = candidate.plan, candidate.frozen
    assert frozen is not None
    phase, epochs = plan.frozen_phase(), getattr(plan.model, "freeze_epochs", 0)
    larger = "" if candidate.memory is frozen else ", less than the whole network after it"
    step = candidate.frozen_step
    pace = f" Its steps are not predicted: {unpredicted}." if unpredicted else ""
    if step is not None:
        rate = f"{step.tokens_per_second:,.0f} {plan.model.items}/s"
        pace = f" One of its steps takes about {format_seconds(step.step_seconds)}, {rate}."
    return (
        f"Frozen backbone for the first {'epoch' if epochs == 1 else f'{epochs} epochs'}: the head alone "
        f"({phase.parameters:,} of {plan.parameters:,} parameters) trains, as {describe(phase)}; that phase's peak is "
        f"{format_bytes(frozen.driver_bytes)}{larger}.{pace}"
    )


def candidate_table(choice: Choice, shown: tuple[Candidate, ...], *, wide: bool) -> Table:
    """One row a candidate: batch, recomputation, the peak and its largest parts, host, speed, and whether it fits.

    On a narrow terminal the columns that the memory bars show too are left out.
    """
    on_gpu = choice.candidates[0].plan.device == "cuda"
    first = choice.candidates[0].needs[0]
    table = Table(
        caption=f"Estimated bytes of one rank at its peak; it may use {format_bytes(first.limit_bytes)} "
        f"({first.share:.0%} of what is free). In brackets: not asked for, shown for comparison.",
        caption_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("strategy", no_wrap=True)
    names = [name for name in _columns(choice.candidates[0]) if on_gpu or name not in GPU_COLUMNS]
    names = [name for name in names if wide or name not in (WIDE_GPU_COLUMNS if on_gpu else WIDE_COLUMNS)]
    for name in names:
        heading = name.replace("tokens", choice.candidates[0].plan.model.items)
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    short = " offload, all" if wide else ", all"
    for candidate in shown:
        chosen, fits = (
            candidate is choice.chosen,
            "no" if not candidate.fits else "tight" if candidate.squeezed else "yes",
        )
        columns = _columns(candidate)
        table.add_row(
            # The whole name stands in the bars and sentences; here it would push columns off a terminal.
            ("> " if chosen else "  ") + describe(candidate.plan).replace(" offload + parameters", short),
            *(columns[name] for name in names),
            fits if candidate.asked else f"({fits})",
            style="bold" if chosen else None if candidate.asked else "dim",
        )
    return table


def _columns(candidate: Candidate) -> dict[str, str]:
    """What the table says of a candidate, by column."""
    states, activations, peak = (format_bytes(size) for size in _large_parts(candidate))
    step = candidate.step
    return {
        "batch": _batch(candidate),
        "recompute": _recompute(candidate),
        "states": states,
        "activations": activations,
        "peak": peak,
        "host": format_bytes(candidate.host_peak_bytes),
        "step": format_seconds(step.step_seconds) if step else "-",
        "tokens/s": f"{step.tokens_per_second:,.0f}" if step else "-",
        "MFU": f"{step.mfu:.0%}" if step else "-",
    }


def _batch(candidate: Candidate) -> str:
    steps = candidate.plan.accumulation_steps
    return f"{candidate.plan.micro_batch} x {steps}" if steps > 1 else str(candidate.plan.micro_batch)


def _recompute(candidate: Candidate) -> str:
    every, way = candidate.plan.activation_checkpointing_every, candidate.plan.recomputation
    return {0: "none", 1: "all" if way == "full" else way}.get(every, f"1 in {every}")


def _large_parts(candidate: Candidate) -> tuple[int, int, int]:
    """Model states, activations with logits, and the peak."""
    items = candidate.items
    states = sum(size for name, size in items.items() if name in candidate.plan.state_bytes or name == "gradients")
    return states, sum(items.get(name, 0) for name in ("activations", "logits")), candidate.peak_bytes


def memory_bars(choice: Choice, shown: tuple[Candidate, ...]) -> Text:
    """A bar per candidate: what fills one GPU, and the mark of what may be used."""
    widest = max(*(c.peak_bytes for c in shown), choice.candidates[0].limit_bytes)
    text = Text()
    for candidate in shown:
        text.append(f"  {describe(candidate.plan):34s} ")
        text.append(memory_bar(candidate, widest), style="green" if candidate.fits else "red")
        text.append("\n")
    legend = ", ".join(f"{letter} {name}" for letter, name, _ in _BAR)
    return text.append(f"  {legend}, . the rest; | what one rank may use", style="dim")


def memory_bar(candidate: Candidate, widest_bytes: int) -> str:
    """The items as letters in proportion, `BAR_WIDTH` characters for `widest_bytes`."""
    items, bar, seen = candidate.items, "", 0
    for letter, _, names in (*_BAR, (".", "", ())):
        seen += sum(items.get(name, 0) for name in names) if names else candidate.peak_bytes - seen
        bar = bar.ljust(round(BAR_WIDTH * seen / widest_bytes), letter)
    mark = min(round(BAR_WIDTH * candidate.limit_bytes / widest_bytes), BAR_WIDTH)
    bar = bar.ljust(BAR_WIDTH)
    return bar[:mark] + "|" + bar[mark:]


def print_formulas(console: Console, choice: Choice) -> None:
    """Every item and part of the chosen candidate (of the nearest, when none fits), its formula and its source."""
    shown = choice.chosen or choice.candidates[-1]
    _say(
        console,
        f"{describe(shown.plan)}: GPU bytes of one rank at its peak ({shown.memory.peak_phase}), {shown.memory.basis}",
    )
    for name, size in sorted(shown.items.items(), key=lambda item: -item[1]):
        _say(console, f"  {name:16} {format_bytes(size):>12}")
    for name, size in shown.memory.host_items.items():
        _say(console, f"  {name:16} {format_bytes(size):>12} (host, one rank)")
    if shown.step is not None:
        _say(console, f"One step, {format_seconds(shown.step.step_seconds)}:")
        for name, seconds in shown.step.parts.items():
            _say(console, f"  {name:16} {format_seconds(seconds):>12}")
    _say(console, "Speed, formula by formula (h bytes of the compute type, M tokens of a micro-batch, N ranks):")
    for name, formula, source in FORMULAS:
        _say(console, f"  {name}: {formula}. Source: {source}.")
    _say(
        console,
        "Memory: model states 2P + 4P + 8P with half precision (parameters, masters, moments) and gradients 2P; ZeRO-1 "
        "shards masters and moments over N, ZeRO-2 gradients too, ZeRO-3 and FSDP2 parameters too (Rajbhandari et al. "
        "2020); buckets, partitions and padding as in the sources of DeepSpeed 0.19.8 and PyTorch; activations from a "
        "trace of the model's own operations, or from a closed formula where it says coarse. docs/planner.md has "
        "every item.",
    )
    for gpu in dict.fromkeys(choice.hardware.gpus):
        _say(console, f"{gpu.name}: compute capability {'.'.join(map(str, gpu.capability))}; {gpu.software}.")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def print_recipes(console: Console, found: Sequence[Recipe], batch: int) -> None:
    """The largest micro-batch of each way to save memory on one GPU, and how many come to `batch`."""
    if not found:
        return
    _say(console, "Largest micro-batch on one GPU (accumulation reaches any batch; batch norm sees micro-batches):")
    for recipe in found:
        steps, peak = recipe.accumulation_for(batch), format_bytes(recipe.candidate.peak_bytes)
        if steps is None:
            _say(console, f"  {recipe.name}: none, one picture takes {peak}")
            continue
        most = f"{recipe.micro_batch}{' or more' if recipe.micro_batch == MOST_SAMPLES else ''}"
        reached = f"batch {batch} in one pass" if steps == 1 else f"batch {batch} as {batch // steps} x {steps}"
        tight = f", {recipe.tight_micro_batch} tightly" if recipe.tight_micro_batch > recipe.micro_batch else ""
        _say(console, f"  {recipe.name}: {most} ({peak}){tight}; {reached}")


def recipes_json(found: Sequence[Recipe]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "name": recipe.name,
            "micro_batch": recipe.micro_batch,
            "tight_micro_batch": recipe.tight_micro_batch,
            "gpu_driver_bytes": recipe.candidate.peak_bytes,
            "gpu_peak_bytes": recipe.candidate.memory.allocated_bytes,
            "strategy": recipe.candidate.plan.strategy,
            "offload": recipe.candidate.plan.offload,
            "precision": recipe.candidate.plan.precision,
            "activation_checkpointing": checkpointing_of(recipe.candidate.plan),
        }
        for recipe in found
    ]


def choice_json(choice: Choice, config: Config) -> dict[str, Any]:
    """The same for programs; sizes in bytes, times in seconds."""
    plan = choice.candidates[0].plan
    chosen = choice.chosen
    return {
        "model": {
            "kind": plan.model.kind,
            "parameters": plan.parameters,
            f"flops_per_{plan.model.items.removesuffix('s')}": plan.model.flops_per_item(),
        },
        "hardware": hardware_json(choice),
        "goal": choice.goal,
        "candidates": [candidate_json(candidate, config) for candidate in choice.candidates],
        "chosen": None if chosen is None else {**chosen.plan.model_dump(mode="json"), **candidate_json(chosen, config)},
        "stages": [
            {
                "name": s.name,
                "start": s.start,
                "stop": s.stop if has_last_step(s) else None,
                "data": describe_data(s.data),
                "learning_rate": s.learning_rate,
            }
            for s in (spans(config) if config.stages else ())
        ],
        "warnings": list(choice.warnings),
        "notes": list(choice.notes),
    }


def hardware_json(choice: Choice) -> dict[str, Any]:
    """The machine, what its GPUs run, and the rates that were used."""
    hardware = choice.hardware
    rates = None if choice.rates is None else dict(vars(choice.rates))
    software = {gpu.name: gpu.software for gpu in hardware.gpus}
    return {**hardware.model_dump(mode="json"), "rates": rates, "software": software}


def frozen_json(candidate: Candidate) -> dict[str, Any] | None:
    """The phase with a frozen backbone; None where there is none."""
    if candidate.frozen is None:
        return None
    phase, step = candidate.plan.frozen_phase(), candidate.frozen_step
    return {
        "trained_parameters": phase.parameters,
        "strategy": phase.strategy,
        "gpu_peak_bytes": candidate.frozen.allocated_bytes,
        "gpu_driver_bytes": candidate.frozen.driver_bytes,
        "gpu_items": candidate.frozen.items,
        "memory_basis": candidate.frozen.basis,
        "step_seconds": step.step_seconds if step else None,
        "step_parts": step.parts if step else None,
        f"{phase.model.items}_per_second": step.tokens_per_second if step else None,
    }


def candidate_json(candidate: Candidate, config: Config) -> dict[str, Any]:
    """One candidate, flat. Of the GPU: ``peak`` is allocated by PyTorch (the items' sum), ``reserved`` is held by its
    allocator, ``driver`` is what must stay below ``limit``.
    """
    plan, step, memory = candidate.plan, candidate.step, candidate.memory
    return {
        "strategy": plan.strategy,
        "offload": plan.offload,
        "offload_parameters": plan.offload_parameters,
        "world_size": plan.world_size,
        "micro_batch": plan.micro_batch,
        "accumulation_steps": plan.accumulation_steps,
        "activation_checkpointing": checkpointing_of(plan),
        "optimizer": plan.optimizer.kind,
        "optimizer_state": plan.optimizer.state,
        "optimizer_master": plan.optimizer.master,
        "precision": plan.precision,
        "reduce_bucket_elements": plan.zero.reduce_bucket_elements,
        "fits": candidate.fits,
        "squeezed": candidate.squeezed,
        "asked": candidate.asked,
        "variant": candidate.variant,
        "gpu_peak_bytes": memory.allocated_bytes,
        "gpu_reserved_bytes": memory.reserved_bytes,
        "gpu_driver_bytes": memory.driver_bytes,
        "gpu_limit_bytes": candidate.limit_bytes,
        "gpu_items": memory.items,
        "peak_phase": memory.peak_phase,
        "frozen_phase": frozen_json(candidate),
        "memory_basis": memory.basis,
        "host_peak_bytes": candidate.host_peak_bytes,
        "host_items": memory.host_items,
        "nvme_bytes": memory.nvme_bytes,
        "checkpoint_bytes": candidate.checkpoint_bytes,
        "disk_bytes": candidate.disk_bytes,
        "step_seconds": step.step_seconds if step else None,
        "step_parts": step.parts if step else None,
        f"{plan.model.items}_per_second": step.tokens_per_second if step else None,
        "mfu": step.mfu if step else None,
        "max_steps": config.max_steps if config.max_steps < ENDLESS_STEPS else None,
        "run_seconds": step.step_seconds * config.max_steps if step and config.max_steps < ENDLESS_STEPS else None,
        "reason": candidate.plan.reason or candidate.verdict,
        "remedies": list(candidate.remedies),
    }
