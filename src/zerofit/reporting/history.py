"""``training_history.json`` and ``curves.png`` of a run folder, out of its events. Imports no torch.

The history has one entry an evaluation, as scripts that train classifiers write it: ``step``, ``epoch`` (from 1),
``learning_rate``, ``step_loss`` (mean of the steps since the entry before), ``images_per_second`` or
``tokens_per_second`` (median of them), and every metric of the evaluation.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

EVENTS, HISTORY, CURVES = "events.jsonl", "training_history.json", "curves.png"
#: Events' own fields that are no metrics.
_OTHER = ("kind", "step", "epoch", "eval_seconds")


def write_history(run: Path) -> list[Path]:
    """Write both files; returns what was written: nothing without an evaluation, no picture without matplotlib."""
    events = list(_events(run / EVENTS))
    entries = history(events)
    if not entries:
        return []
    (run / HISTORY).write_text(json.dumps({"history": entries}, indent=1) + "\n", encoding="utf-8")
    written = [run / HISTORY]
    if _draw(entries, [event for event in events if event["kind"] == "step"], run / CURVES):
        written.append(run / CURVES)
    return written


def history(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries. A run that went back to an earlier step counts with what came last."""
    entries: dict[int, dict[str, Any]] = {}
    steps: list[dict[str, Any]] = []
    for event in events:
        if event["kind"] == "step":
            steps.append(event)
        elif event["kind"] == "eval":
            entries = {step: entry for step, entry in entries.items() if step < event["step"]}
            entries[event["step"]] = _entry(event, steps)
            steps = []
    return list(entries.values())


def _entry(event: dict[str, Any], steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": event["step"]}
    if "epoch" in event:
        entry["epoch"] = event["epoch"] + 1
    if steps:
        losses = [step["loss"] for step in steps if isinstance(step["loss"], float)]
        entry["learning_rate"] = steps[-1]["learning_rate"]
        entry["step_loss"] = statistics.fmean(losses) if losses else None
        for name in ("images_per_second", "tokens_per_second"):
            if name in steps[-1]:
                entry[name] = statistics.median(step[name] for step in steps)
    return entry | {name: value for name, value in event.items() if name not in _OTHER}


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """Whole events; a line that a crash tore is left out."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _draw(entries: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]], path: Path) -> bool:
    """Loss, accuracy where there is one, and the learning rate, over steps. False: matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = [("loss", ["train_loss", "val_loss"])]
    if any("val_accuracy" in entry for entry in entries):
        panels.append(("accuracy", ["train_accuracy", "val_accuracy"]))
    figure = Figure(figsize=(5 * (len(panels) + 1), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels) + 1)
    for axis, (title, names) in zip(axes, panels, strict=False):
        if title == "loss":
            axis.plot(*_line(steps, "loss"), color="0.8", linewidth=0.8, label="each step")
        for name in names:
            axis.plot(*_line(entries, name), marker="o", markersize=3, label=name.replace("_", " "))
        axis.set(title=title, xlabel="step")
        axis.legend()
    axes[-1].plot(*_line(steps, "learning_rate"))
    axes[-1].set(title="learning rate", xlabel="step")
    figure.savefig(path, dpi=120)
    return True


def _line(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values; what is not a finite number is left out."""
    found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), float)]
    return [step for step, _ in found], [value for _, value in found]
