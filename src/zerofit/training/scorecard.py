"""How right the plan was: predicted beside measured, at the end of every run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from datetime import date
from typing import Any

import torch

from ..planning.gpus import match_name
from ..planning.ledger import Row, append_row, model_label
from ..planning.plan import Plan
from ..planning.sizes import format_bytes, format_seconds
from ..types import World
from .events import EventLog
from .progress import Display

#: Steps that are not counted: they compile, allocate and fill pipelines.
WARM_UP_STEPS = 3


class Scorecard:
    """Collects the steps' times of one process and compares them with the plan's prediction."""

    def __init__(self, plan: Plan, world: World) -> None:
        self.plan, self.world = plan, world
        self.seconds: list[float] = []

    def step(self, seconds: float) -> None:
        """One step's time."""
        self.seconds.append(seconds)

    def finish(self, peaks: Mapping[str, int], events: EventLog, display: Display) -> None:
        """Write the event ``scorecard``, tell the terminal, and keep a run on GPUs in this user's ledger.

        Args:
            peaks: ``gpu_peak_bytes`` and ``gpu_reserved_bytes`` on a GPU, ``host_peak_bytes``; of the main rank.
            events: where the event goes.
            display: where the lines go.
        """
        if not self.seconds:
            return
        row = self.row(peaks)
        events.write("scorecard", **scorecard_fields(row, self.plan, peaks))
        if not self.world.is_main:
            return
        for line in scorecard_lines(row, peaks):
            display.say(line)
        if self.world.device.type == "cuda":
            try:
                append_row(row)
            except OSError as error:
                events.write("warning", message=f"the ledger could not be written: {error}")

    def measured_seconds(self) -> float:
        """Median of the steps after the warm-up; of a run that ends within it, of the last step."""
        counted = self.seconds[WARM_UP_STEPS:] or self.seconds[-1:]
        return statistics.median(counted)

    def row(self, peaks: Mapping[str, int]) -> Row:
        """This run as the ledger keeps it."""
        plan, predicted = self.plan, self.plan.prediction
        shared = set(Row.model_fields) & set(Plan.model_fields) - {"model"}
        return Row(
            **{name: getattr(plan, name) for name in shared},
            date=date.today().isoformat(),
            source="local",
            model=model_label(plan.model.kind, plan.parameters),
            gpu=self._gpu(),
            predicted_gpu_peak_bytes=predicted.gpu_peak_bytes if predicted and plan.device == "cuda" else None,
            measured_gpu_peak_bytes=peaks.get("gpu_peak_bytes"),
            predicted_step_seconds=predicted.step_seconds if predicted else None,
            measured_step_seconds=self.measured_seconds(),
        )

    def _gpu(self) -> str:
        if self.world.device.type != "cuda":
            return "cpu"
        name = torch.cuda.get_device_name(self.world.device)
        kind = match_name(name, torch.cuda.get_device_properties(self.world.device).total_memory)
        return kind.key if kind else name


def scorecard_fields(row: Row, plan: Plan, peaks: Mapping[str, int]) -> dict[str, Any]:
    """The event's fields; null where nothing was predicted or measured."""
    predicted = plan.prediction
    return {
        "predicted_gpu_peak_bytes": row.predicted_gpu_peak_bytes,
        "measured_gpu_peak_bytes": row.measured_gpu_peak_bytes,
        "gpu_peak_error": row.memory_error,
        "predicted_gpu_reserved_bytes": predicted.gpu_reserved_bytes if predicted and plan.device == "cuda" else None,
        "measured_gpu_reserved_bytes": peaks.get("gpu_reserved_bytes"),
        "predicted_step_seconds": row.predicted_step_seconds,
        "measured_step_seconds": row.measured_step_seconds,
        "step_error": row.speed_error,
        "host_peak_bytes": peaks["host_peak_bytes"],
        "strategy": plan.strategy,
        "offload": plan.offload,
        "world_size": plan.world_size,
    }


def scorecard_lines(row: Row, peaks: Mapping[str, int]) -> list[str]:
    """The same for people."""
    lines = [_line("step time", row.predicted_step_seconds, row.measured_step_seconds, row.speed_error, format_seconds)]
    if row.measured_gpu_peak_bytes is None:
        return [
            *lines,
            f"Scorecard: memory of this process {format_bytes(peaks['host_peak_bytes'])}, no GPU to compare.",
        ]
    lines.append(
        _line("GPU peak", row.predicted_gpu_peak_bytes, row.measured_gpu_peak_bytes, row.memory_error, format_bytes)
    )
    return lines


def _line(what: str, predicted: float | None, measured: float | None, error: float | None, show: Any) -> str:
    said = "not predicted" if predicted is None else f"predicted {show(predicted)}"
    off = "" if error is None else f" ({error:+.1%})"
    return f"Scorecard: {what} {said}, measured {show(measured)}{off}."
