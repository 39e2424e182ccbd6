"""``zerofit train --check-memory``: a few real steps in processes of their own, predicted beside measured."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..config.arguments import parse_arguments
from ..config.load import load_config
from ..errors import DoesNotFit, ZerofitError
from ..launch.trials import Trial, TrialResult, run_trial
from ..planning.candidates import Candidate
from ..planning.choose import choose
from ..planning.explain import print_choice
from ..planning.hardware import probe
from ..planning.plan import Plan
from ..planning.sizes import format_bytes, format_seconds
from ..planning.translation import print_translation
from .plan import with_steps, with_vocabulary

#: Five steps of a large model under offload, and the start of its processes.
TIME_LIMIT_SECONDS = 900.0


def run_check_memory(arguments: Sequence[str]) -> None:
    """Plan as `train` does, run a few steps on random tokens, and print what they needed; writes no run folder.

    Raises:
        DoesNotFit: the steps ran out of memory although the plan said that they fit, or was told to try.
        ZerofitError: they failed otherwise.
    """
    typed = parse_arguments(arguments)
    resolved = load_config(typed.source, typed.preset, typed.overrides)
    config = with_vocabulary(resolved)
    choice = choose(config, probe(config.runs_dir, config.nvme_path))
    rows = comparison(choice.plan, _checked(_run(choice.plan), choice.plan))
    if choice.chosen is not None and choice.chosen.frozen is not None:
        frozen = choice.plan.frozen_phase()
        rows |= frozen_comparison(choice.chosen, frozen, _checked(_run(frozen), choice.plan))
    if typed.as_json:
        print(json.dumps(rows))
    else:
        console = Console()
        print_choice(console, with_steps(config, choice.plan), choice)
        print_translation(console, resolved.notes, config, choice.plan)
        console.print(comparison_table(rows))


def _run(plan: Plan) -> TrialResult:
    with tempfile.TemporaryDirectory(prefix="zerofit-plan-") as scratch:
        path = Path(scratch) / "plan.json"
        path.write_text(plan.model_dump_json(), encoding="utf-8")
        return run_trial(Trial("zerofit.launch.memory_trial", [str(path)], plan.world_size, TIME_LIMIT_SECONDS))


def _checked(outcome: TrialResult, plan: Plan) -> dict[str, Any]:
    if outcome.status == "out_of_memory":
        predicted = plan.prediction.gpu_driver_bytes if plan.prediction else 0
        raise DoesNotFit(
            f"The steps ran out of memory, and {format_bytes(predicted)} a rank were predicted: other processes may "
            f"hold memory (nvidia-smi), or the prediction is wrong. Lower micro_batch, or set activation_checkpointing "
            f"full. The end of the output:\n{outcome.log_tail}"
        )
    if outcome.status != "ok" or outcome.result is None:
        raise ZerofitError(
            f"Checking the memory {outcome.status} after {outcome.seconds:.0f} s. The end of its "
            f"output:\n{outcome.log_tail}"
        )
    return outcome.result


def comparison(plan: Plan, result: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Name -> ``predicted`` and ``measured``, in bytes and seconds; null where the device has no such thing."""
    expected = plan.prediction
    assert expected is not None  # chosen plans have one
    cuda = plan.device == "cuda"
    rows: dict[str, dict[str, float | None]] = {
        f"states: {name}": {"predicted": plan.state_bytes.get(name, 0), "measured": result["states"].get(name, 0)}
        for name in sorted(set(plan.state_bytes) | set(result["states"]))
    }
    for name, key in (
        ("gpu_peak_bytes", "allocated"),
        ("gpu_reserved_bytes", "reserved"),
        ("gpu_driver_bytes", "driver"),
    ):
        if cuda:
            rows[name] = {"predicted": getattr(expected, name), "measured": result[key]}
    rows["step_seconds"] = {"predicted": expected.step_seconds, "measured": statistics.median(result["seconds"][1:])}
    return rows


def frozen_comparison(chosen: Candidate, phase: Plan, result: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The same of the phase in which the head alone is trained, under names of its own."""
    memory, step = chosen.frozen, chosen.frozen_step
    assert memory is not None
    rows: dict[str, dict[str, float | None]] = {}
    if phase.device == "cuda":
        for name in ("allocated", "reserved", "driver"):
            rows[f"frozen: gpu_{name}_bytes"] = {
                "predicted": getattr(memory, f"{name}_bytes"), "measured": result[name]}  # fmt: skip
    seconds = statistics.median(result["seconds"][1:])
    rows["frozen: step_seconds"] = {"predicted": step.step_seconds if step else None, "measured": seconds}
    return rows


def comparison_table(rows: dict[str, dict[str, float | None]]) -> Table:
    """Predicted beside measured for people."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, title="Predicted beside measured, one rank")
    table.add_column("what", no_wrap=True)
    for name in ("predicted", "measured", "off"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in rows.items():
        show = format_seconds if name.endswith("step_seconds") else format_bytes
        predicted, measured = row["predicted"], row["measured"]
        off = f"{predicted / measured - 1:+.1%}" if predicted and measured else ""
        table.add_row(name, *("-" if value is None else show(value) for value in (predicted, measured)), off)
    return table
