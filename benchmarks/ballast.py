"""What the planner says of smaller cards, tried: a second process holds the rest of a large GPU's memory.

    python benchmarks/ballast.py --out ballast.json

For each size of card and each family of plans two micro-batches are tried: the largest that the planner says fits,
which must run 20 steps, and the smallest that it says is more than 5% too large, which must run out of memory. Each
case has a process of its own, which imports before its turn. The ballast emulates a card's memory, not its speed.
``--predict-only`` prints the cases without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

MIB = 1024**2
#: What is left free, by the card that it stands for: a little less than the driver of such a card shows.
CARDS_MIB = {"24 GB": 24_150, "16 GB": 16_000, "8 GB": 8_000}
#: Of `planner_memory`: ``model strategy gpus micro_batch words``; the micro-batch is searched.
FAMILIES = {
    "24 GB": ("xl zero2 1 1 cpu", "large single 1 1", "xl zero3 1 1 cpu+p ck1", "medium single 1 1 compile"),
    "16 GB": ("large zero2 1 1 cpu", "medium single 1 1", "medium single 1 1 ck1 compile", "small zero1 1 1 fp16 acc4"),
    "8 GB": ("medium zero2 1 1 cpu ck2", "small single 1 1", "medium single 1 1 fp16", "small zero3 1 1"),
}
STEPS = 20
#: A plan that is said not to fit needs this much more than there is.
MISS = 1.05
CASE_SECONDS = 90.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("ballast.json"))
    parser.add_argument("--predict-only", action="store_true")
    parser.add_argument("--cards", default=",".join(CARDS_MIB))
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no case after that")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    parser.add_argument("--hold-mib", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.hold_mib:
        hold(args.hold_mib)
    elif args.case:
        run_case(json.loads(args.case))
    else:
        run_all(args)


def run_all(args: argparse.Namespace) -> None:
    """Predict, try, print, write."""
    cases = [case for card in args.cards.split(",") for case in cases_of(card)]
    for case in cases:
        print(
            f"{case['card']:6} {case['name']:34} {case['says']:5} {case['driver_bytes'] / 2**30:6.2f} GiB", flush=True
        )
    if args.predict_only:
        return
    started, rows = time.monotonic(), []
    for card in args.cards.split(","):
        with ballast(CARDS_MIB[card]):
            for row in tried([case for case in cases if case["card"] == card], started + args.budget_seconds):
                rows.append(row)
                print(f"{time.monotonic() - started:4.0f} s {row['card']:6} {row['name']:34} says {row['says']:5} "
                      f"{row['status']:14} {'as said' if row['as_said'] else 'WRONG'}", flush=True)  # fmt: skip
                head = {"date": date.today().isoformat(), "steps": STEPS, "cards_mib": CARDS_MIB}
                args.out.write_text(json.dumps({**head, "rows": rows}, indent=1), encoding="utf-8")
    right = sum(row["as_said"] for row in rows)
    print(f"{right} of {len(rows)} as said, in {time.monotonic() - started:.0f} s")


def cases_of(card: str) -> Iterator[dict[str, Any]]:
    """The two cases of each family on a card."""
    from planner_memory import _case, plan_of
    from zerofit.planning.memory import H200, fits_within, predict_memory

    free = CARDS_MIB[card] * MIB
    limit = int(0.95 * free)  # planning.candidates.SAFE_SHARE_TRACED

    def plan(family: str, micro_batch: int) -> Any:
        return plan_of({**_case(family), "micro_batch": micro_batch}, False)

    def least(family: str, micro_batch: int) -> int:
        memory = predict_memory(plan(family, micro_batch), H200)
        return memory.allocated_bytes + memory.driver_bytes - memory.reserved_bytes

    for family in FAMILIES[card]:
        fits = [m for m in range(1, 65) if least(family, m) <= limit and fits_within(plan(family, m), limit, H200)]
        misses = next(m for m in range(max(fits, default=0) + 1, 999) if least(family, m) > MISS * free)
        for says, micro_batch in (*([("fits", max(fits))] if fits else []), ("misses", misses)):
            model, strategy, gpus, _, *words = family.split()
            name = " ".join([model, strategy, gpus, str(micro_batch), *words])
            memory = predict_memory(plan(family, micro_batch), H200)
            yield {"card": card, "name": name, "says": says, "driver_bytes": memory.driver_bytes,
                   "allocated_bytes": memory.allocated_bytes, "least_bytes": least(family, micro_batch)}  # fmt: skip


@contextmanager
def ballast(free_mib: int) -> Iterator[None]:
    """Inside, the driver shows `free_mib` free on GPU 0."""
    holder = subprocess.Popen(
        [sys.executable, __file__, "--hold-mib", str(free_mib)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    print(holder.stdout.readline().strip(), flush=True)
    try:
        yield
    finally:
        holder.stdin.close()
        holder.wait(timeout=60)


def hold(free_mib: int) -> None:
    """Allocate all but `free_mib`, say so, and keep it until standard input closes."""
    import torch

    held = []
    while (surplus := torch.cuda.mem_get_info()[0] - free_mib * MIB) >= 2 * MIB:
        held.append(torch.empty(surplus // (2 * MIB) * 2 * MIB, dtype=torch.uint8, device="cuda"))
    print(f"{torch.cuda.mem_get_info()[0] / MIB:.0f} MiB left free", flush=True)
    sys.stdin.read()


def tried(cases: list[dict[str, Any]], deadline: float) -> Iterator[dict[str, Any]]:
    """Each case's outcome. The next one imports while one runs."""
    from zerofit.launch.trials import Trial, TrialResult, run_trial

    with tempfile.TemporaryDirectory(prefix="ballast-") as scratch:
        outcomes: list[TrialResult | None] = [None] * len(cases)

        def start(index: int) -> threading.Thread:
            gate = Path(scratch) / f"gate-{index}"
            trial = Trial(
                Path(__file__), ["--case", json.dumps({**cases[index], "gate": str(gate)})], 1, 2 * CASE_SECONDS + 60
            )

            def run() -> None:
                outcomes[index] = run_trial(trial)

            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            return thread

        thread = start(0)
        for index, case in enumerate(cases):
            if time.monotonic() > deadline:
                (Path(scratch) / f"gate-{index}").write_text("leave")
                thread.join()
                return
            following = start(index + 1) if index + 1 < len(cases) else None
            (Path(scratch) / f"gate-{index}").touch()
            thread.join()
            outcome = outcomes[index]
            assert outcome is not None
            wanted = "ok" if case["says"] == "fits" else "out_of_memory"
            row = {**case, "status": outcome.status, "as_said": outcome.status == wanted, "seconds": outcome.seconds}
            row |= {"log": outcome.log_tail[-1500:]} if outcome.status not in ("ok", "out_of_memory") else {}
            yield {**row, **(outcome.result or {})}
            if following is not None:
                thread = following


def run_case(case: dict[str, Any]) -> None:
    """Import, wait for the turn, run the steps."""
    from planner_memory import _case, _import_all, plan_of

    plan = plan_of(_case(case["name"]), False)
    _import_all(plan)
    gate = Path(case["gate"])
    while not gate.exists():
        time.sleep(0.02)
    if gate.read_text():
        return
    watchdog = threading.Timer(CASE_SECONDS, lambda: os._exit(1))
    watchdog.daemon = True
    watchdog.start()
    import torch

    from zerofit.checkpoint.model import initial_reader
    from zerofit.engines.build import build
    from zerofit.engines.world import launcher_store, open_world
    from zerofit.launch.memory_trial import random_window
    from zerofit.launch.trials import write_result
    from zerofit.models import model_spec

    free_before = torch.cuda.mem_get_info()[0]
    with open_world(plan, launcher_store()) as world:
        spec = model_spec(plan.model.kind)
        engine = build(plan, spec, world)
        engine.load(initial_reader(spec, plan.model, plan.seed))
        window = random_window(plan, world)
        for step in range(STEPS):
            loss = engine.train_step(window, 1e-4, step).read().loss
        write_result({
            "loss": loss,
            "free_with_context_bytes": free_before,
            "free_after_bytes": torch.cuda.mem_get_info()[0],
            "measured_allocated_bytes": torch.cuda.max_memory_allocated(),
            "measured_reserved_bytes": torch.cuda.max_memory_reserved(),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
        })  # fmt: skip
    sys.stdout.flush()
    os._exit(0)  # what DeepSpeed and compile workers leave behind need not be waited for


if __name__ == "__main__":
    main()
