"""What PyTorch's allocator was asked for during some steps of a case, for comparison with the planner's simulation.

    python benchmarks/allocator_trace.py --cases "small single 1 16" --out trace.json

On one GPU. Writes, for each case, the sequence of segments and blocks from before the model is built, with sizes in
bytes, and what was reserved at the end of each step.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="small single 1 16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("allocator_trace.json"))
    parser.add_argument("--case", default="")
    args = parser.parse_args()
    if args.case:
        run_case(args)
        return
    from zerofit.launch.trials import Trial, run_trial

    found = {}
    for case in args.cases.split(","):
        outcome = run_trial(Trial(Path(__file__), ["--case", case, "--steps", str(args.steps)], 1, 120))
        found[case] = outcome.result or {"log": outcome.log_tail}
        print(case, outcome.status, {k: v for k, v in found[case].items() if k != "events"}, flush=True)
    args.out.write_text(json.dumps(found), encoding="utf-8")


def run_case(args: argparse.Namespace) -> None:
    import torch

    from planner_memory import CASES, constant_reader, plan_of, window_of
    from zerofit.engines.build import build
    from zerofit.engines.world import launcher_store, open_world
    from zerofit.launch.trials import write_result
    from zerofit.models import model_spec

    plan: Any = plan_of(CASES[args.case], small=False)
    torch.cuda.memory._record_memory_history(max_entries=2_000_000, context=None, stacks="python")
    with open_world(plan, launcher_store()) as world:
        engine = build(plan, model_spec(plan.model.kind), world)
        engine.load(constant_reader())
        window, reserved = list(window_of(plan, world.rank)), [torch.cuda.memory_reserved()]
        for index in range(args.steps):
            engine.train_step(window, 1e-4, index).read()
            reserved.append(torch.cuda.memory_reserved())
        traces = torch.cuda.memory._snapshot()["device_traces"][0]
        events = [[entry["action"], entry["size"], entry["addr"]] for entry in traces]
        write_result({"reserved_bytes": reserved, "peak": torch.cuda.max_memory_allocated(), "events": events})
        os._exit(0)


if __name__ == "__main__":
    main()
