"""Make src/zerofit/planning/ledger.json from the measurements in benchmarks/results.

    python benchmarks/ship_ledger.py           writes it
    python benchmarks/ship_ledger.py --print   shows it beside what the planner predicts

Files of benchmarks/gpt2_xl.py and benchmarks/planner_memory.py on H200s (16 CPU cores a GPU).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from zerofit.config.models import GPT2Config
from zerofit.planning.ledger import Measurement, ledger_table, measurements_of, predicted_row
from zerofit.planning.plan import Plan

RESULTS = Path(__file__).parent / "results"
TARGET = Path(__file__).parents[1] / "src" / "zerofit" / "planning" / "ledger.json"
GPT2_XL = GPT2Config(n_layer=48, n_head=25, n_embd=1600, block_size=1024, vocab_size=50257, pad_vocab_to=64)
CORES_A_GPU = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true")
    if parser.parse_args().print:
        from rich.console import Console

        Console(width=160).print(ledger_table([predicted_row(row) for row in collect()]))
    else:
        TARGET.write_text(render(collect()), encoding="utf-8")


def collect() -> list[Measurement]:
    """Every row of every file, the files by name."""
    rows = []
    for path in sorted(RESULTS.glob("*-h200-gpt2_xl-*.json")):
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows += measurements_of(document, path.name, GPT2_XL, gpu="h200", cores_a_gpu=CORES_A_GPU)
    for path in sorted(RESULTS.glob("*-h200-memory-*gpu.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in document:
            done = [row for row in document["rows"].values() if row["status"] == "ok"]
            rows += [memory_row(document["date"], path.name, row) for row in done]
    return rows


def memory_row(date: str, run: str, row: dict[str, Any]) -> Measurement:
    """A row of benchmarks/planner_memory.py."""
    plan = Plan.model_validate(row["plan"])
    shared = set(Measurement.model_fields) & set(type(plan).model_fields) - {"model"}
    return Measurement(
        **{name: getattr(plan, name) for name in shared},
        model=plan.model,
        date=date,
        run=run,
        gpu="h200",
        link="nvlink",
        cpu_cores=CORES_A_GPU * plan.world_size,
        measured_gpu_peak_bytes=row["allocated_bytes"],
        measured_step_seconds=row["step_seconds"],
    )


def render(rows: list[Measurement]) -> str:
    """One row a line."""
    lines = [json.dumps(row.model_dump(mode="json", exclude_defaults=True), sort_keys=True) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]\n"


if __name__ == "__main__":
    main()
