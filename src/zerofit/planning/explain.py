"""The plan as people read it."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from ..config.schema import Config
from .choose import Choice, describe, format_bytes


def print_choice(console: Console, config: Config, choice: Choice) -> None:
    """The table of candidates, the choice and its reason, the batch equation, warnings."""
    plan = choice.plan
    console.print(
        f"Plan for {plan.model.kind} with {plan.parameters:,} parameters, {plan.precision}, on {plan.world_size} x "
        f"{'GPU' if plan.device == 'cuda' else 'CPU process'}:",
        highlight=False,
    )
    console.print(candidate_table(choice))
    console.print(plan.reason, highlight=False, soft_wrap=True)
    console.print(
        f"Batch: {choice.split.equation()}; {plan.global_batch * plan.model.block_size:,} tokens a step, "
        f"{config.max_steps:,} steps.",
        highlight=False,
        soft_wrap=True,
    )
    for warning in choice.warnings:
        console.print(f"Warning: {warning}", style="yellow", highlight=False)


def candidate_table(choice: Choice) -> Table:
    """One row a strategy: the peak, its largest parts, and whether it fits."""
    limit = format_bytes(choice.candidates[0].limit_bytes)
    table = Table(
        caption=f"Estimated bytes of one rank at its peak; it may use {limit}.",
        header_style="bold",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("strategy", no_wrap=True)
    for name in ("batch", "states", "activations", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits")
    for candidate in choice.candidates:
        items = candidate.items
        states = sum(size for name, size in items.items() if name in candidate.plan.state_bytes or name == "gradients")
        activations = items["activations"] + items["logits"]
        chosen = candidate.plan.strategy == choice.plan.strategy and candidate.plan.offload == choice.plan.offload
        table.add_row(
            ("> " if chosen else "  ") + describe(candidate.plan),
            str(candidate.plan.micro_batch),
            *(format_bytes(size) for size in (states, activations, candidate.peak_bytes)),
            "yes" if candidate.fits else "no",
            style="bold" if chosen else None,
        )
    return table


def choice_json(choice: Choice) -> dict[str, object]:
    """The same for programs; sizes in bytes."""
    return {
        "model": {"kind": choice.plan.model.kind, "parameters": choice.plan.parameters},
        "candidates": [
            {
                "strategy": candidate.plan.strategy,
                "offload": candidate.plan.offload,
                "micro_batch": candidate.plan.micro_batch,
                "accumulation_steps": candidate.plan.accumulation_steps,
                "fits": candidate.fits,
                "peak_bytes": candidate.peak_bytes,
                "limit_bytes": candidate.limit_bytes,
                "items": candidate.items,
            }
            for candidate in choice.candidates
        ],
        "chosen": choice.plan.model_dump(mode="json"),
        "warnings": list(choice.warnings),
    }
