"""Keeping score: what was predicted beside what was measured, shipped with zerofit and of this user's own runs.

Shipped rows are measurements (``ledger.json``, made from benchmarks/results by benchmarks/ship_ledger.py); this
version of the planner predicts them anew. Local rows hold the prediction that their run started from.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from rich import box
from rich.table import Table

from ..config.models import ModelConfig, Section
from ..config.schema import Offload, Precision, Strategy
from .calibration import constants, rates
from .gpus import GPUS
from .hardware import Gpu, Hardware
from .memory import predict_memory, state_bytes
from .plan import Plan, ZeroPlan
from .sizes import format_bytes, format_seconds
from .speed import predict_step


class _Case(Section):
    """How it ran."""

    date: str
    strategy: Strategy
    offload: Offload = "none"
    offload_parameters: Offload = "none"
    world_size: int
    micro_batch: int
    accumulation_steps: int = 1
    activation_checkpointing_every: int = 0
    precision: Precision = "bf16"
    gradient_dtype: Literal["compute", "fp32"] = "compute"
    compile: bool = False


class Row(_Case):
    """One run. Peaks are of PyTorch's allocator (allocated bytes), of one rank."""

    source: str
    """``shipped`` or ``local``, or the file it came from."""
    model: str
    """Kind and parameters, as ``gpt2 1.56B``."""
    gpu: str
    predicted_gpu_peak_bytes: int | None = None
    measured_gpu_peak_bytes: int | None = None
    predicted_step_seconds: float | None = None
    measured_step_seconds: float | None = None

    @property
    def memory_error(self) -> float | None:
        """Predicted over measured, less one; None where one is missing."""
        return _error(self.predicted_gpu_peak_bytes, self.measured_gpu_peak_bytes)

    @property
    def speed_error(self) -> float | None:
        """The same of the step's time."""
        return _error(self.predicted_step_seconds, self.measured_step_seconds)


class Measurement(_Case):
    """A shipped row before its prediction."""

    run: str = ""
    """The file of benchmarks/results: rows of one file were measured one after another on the same machine."""
    gpu: str
    """Row of `planning.gpus`."""
    link: Literal["nvlink", "pcie"]
    cpu_cores: int
    model: ModelConfig
    reduce_bucket_elements: int | None = None
    measured_gpu_peak_bytes: int
    measured_step_seconds: float


def _error(predicted: float | None, measured: float | None) -> float | None:
    return predicted / measured - 1 if predicted and measured else None


def model_label(kind: str, parameters: int) -> str:
    """``gpt2 1.56B``, ``gpt2 124M``."""
    size = f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
    return f"{kind} {size}"


def plan_of(measurement: Measurement) -> Plan:
    """The plan that was measured."""
    zero = ZeroPlan()
    if measurement.reduce_bucket_elements:
        zero = zero.model_copy(update={"reduce_bucket_elements": measurement.reduce_bucket_elements})
    shared = set(Plan.model_fields) & set(Measurement.model_fields) - {"model"}
    plan = Plan(
        **{name: getattr(measurement, name) for name in shared},
        model=measurement.model,
        parameters=measurement.model.parameter_count(),
        device="cuda",
        zero=zero,
    )
    return plan.model_copy(update={"state_bytes": state_bytes(plan)})


def hardware_of(measurement: Measurement) -> Hardware:
    """The machine that it was measured on, as far as predictions ask."""
    kind = GPUS[measurement.gpu]
    gpu = Gpu(
        name=kind.title,
        memory_bytes=kind.memory_bytes,
        free_bytes=kind.memory_bytes,
        capability=kind.capability,
        rates_of=kind.key,
    )
    return Hardware(
        gpus=(gpu,) * measurement.world_size,
        link=measurement.link,
        cpu_cores=measurement.cpu_cores,
        host_memory_bytes=2**40,
        system="Linux",
        has_deepspeed=True,
        described=True,
    )


def predicted_row(measurement: Measurement, source: str = "shipped") -> Row:
    """The measurement beside what this version predicts."""
    plan, hardware = plan_of(measurement), hardware_of(measurement)
    step = predict_step(plan, rates(hardware, plan.precision))
    shared = set(Row.model_fields) & set(Measurement.model_fields) - {"model"}
    return Row(
        **{name: getattr(measurement, name) for name in shared},
        source=source,
        model=model_label(plan.model.kind, plan.parameters),
        predicted_gpu_peak_bytes=predict_memory(plan, constants(hardware)).allocated_bytes,
        predicted_step_seconds=step.step_seconds if step else None,
    )


def shipped_measurements() -> list[Measurement]:
    """What the package carries."""
    text = files("zerofit.planning").joinpath("ledger.json").read_text(encoding="utf-8")
    return [Measurement.model_validate(row) for row in json.loads(text)]


def read_ledger() -> list[Row]:
    """The shipped rows, predicted by this version, then this user's, as they were predicted."""
    return [predicted_row(measurement) for measurement in shipped_measurements()] + local_rows()


def ledger_path() -> Path:
    """Where this user's runs are kept: ``$XDG_DATA_HOME/zerofit/ledger.jsonl``."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "zerofit" / "ledger.jsonl"


def local_rows() -> list[Row]:
    """This user's runs, oldest first; lines that a crash tore or another version wrote are left out."""
    try:
        lines = ledger_path().read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(Row.model_validate_json(line))
        except ValidationError:
            continue
    return rows


def append_row(row: Row) -> None:
    """Add one run to this user's ledger.

    Raises:
        OSError: the folder cannot be written.
    """
    path = ledger_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(row.model_dump_json() + "\n")


def measurements_of(
    document: Mapping[str, Any], run: str, model: ModelConfig, *, gpu: str, cores_a_gpu: int
) -> list[Measurement]:
    """The rows of a file of benchmarks/gpt2_xl.py: its own cases that ended, peers and compiled ZeRO-3 left out.

    Args:
        document: the file's JSON.
        run: its name.
        model: what it trained.
        gpu: row of `planning.gpus`.
        cores_a_gpu: CPU cores of that machine for each GPU.
    """
    found = []
    for row in document["cases"].values():
        case = row.get("case", {})
        compiled = case.get("compile", True)
        # Compiled ZeRO-3 does other work (docs/experiments.md).
        if row["status"] != "ok" or "peer" in case or (case["strategy"] == "zero3" and compiled):
            continue
        found.append(
            Measurement(
                date=document["date"],
                run=run,
                gpu=gpu,
                link="nvlink" if GPUS[gpu].nvlink else "pcie",
                cpu_cores=cores_a_gpu * row["gpus"],
                model=model,
                strategy=case["strategy"],
                offload=case.get("offload", "none"),
                world_size=row["gpus"],
                micro_batch=case.get("micro_batch", 8),
                accumulation_steps=case.get("accumulation", 1),
                activation_checkpointing_every=case.get("checkpoint_every", 0),
                precision=case.get("precision", "bf16"),
                compile=compiled,
                reduce_bucket_elements=case.get("zero", {}).get("reduce_bucket_elements"),
                measured_gpu_peak_bytes=row["peak_allocated_bytes"],
                measured_step_seconds=row["step_seconds"],
            )
        )
    return found


def summary(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, float | int | None]]:
    """(model, strategy with offload) -> ``rows``, mean absolute ``memory_error`` and ``speed_error``."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, _strategy(row)), []).append(row)
    return {
        key: {
            "rows": len(members),
            "memory_error": _mean_absolute([row.memory_error for row in members]),
            "speed_error": _mean_absolute([row.speed_error for row in members]),
        }
        for key, members in groups.items()
    }


def _mean_absolute(errors: Sequence[float | None]) -> float | None:
    known = [abs(error) for error in errors if error is not None]
    return statistics.fmean(known) if known else None


def _strategy(row: Row) -> str:
    return row.strategy if row.offload == "none" else f"{row.strategy} + {row.offload}"


def ledger_table(rows: Sequence[Row]) -> Table:
    """Predicted beside measured, run by run, then the mean absolute error by model and strategy."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, caption=_caption(rows))
    for name in ("date", "from", "model", "GPUs", "strategy", "batch", "blocks"):
        table.add_column(name, no_wrap=True)
    for name in ("peak predicted", "measured", "error", "step predicted", "measured", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.date,
            row.source,
            row.model,
            f"{row.world_size} x {row.gpu}",
            _strategy(row),
            f"{row.micro_batch} x {row.accumulation_steps}",
            ("compiled" if row.compile else "eager") + (", recomputed" if row.activation_checkpointing_every else ""),
            _bytes(row.predicted_gpu_peak_bytes),
            _bytes(row.measured_gpu_peak_bytes),
            _signed(row.memory_error),
            _seconds(row.predicted_step_seconds),
            _seconds(row.measured_step_seconds),
            _signed(row.speed_error),
        )
    table.add_section()
    for (model, strategy), errors in summary(rows).items():
        memory, speed = (_signed(errors[name], sign=False) for name in ("memory_error", "speed_error"))
        table.add_row("mean", "", model, f"{errors['rows']} rows", strategy, "", "", "", "", memory, "", "", speed)
    return table


def _caption(rows: Sequence[Row]) -> str:
    shipped = sum(row.source == "shipped" for row in rows)
    return (
        f"{shipped} shipped measurements, predicted by this version (16 of them fitted the speed model), and "
        f"{len(rows) - shipped} runs of your own. Peaks are PyTorch's allocated bytes."
    )


def _bytes(size: int | None) -> str:
    return "-" if size is None else format_bytes(size)


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else format_seconds(seconds)


def _signed(error: float | None, *, sign: bool = True) -> str:
    if error is None:
        return "-"
    return f"{error:+.1%}" if sign else f"{error:.1%}"


def ledger_json(rows: Sequence[Row]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "rows": [
            {**row.model_dump(mode="json"), "memory_error": row.memory_error, "speed_error": row.speed_error}
            for row in rows
        ],
        "summary": [
            {"model": model, "strategy": strategy, **errors} for (model, strategy), errors in summary(rows).items()
        ],
    }
