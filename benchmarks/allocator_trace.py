"""What PyTorch's allocator was asked for during some steps of a case, beside the planner's simulation, rank by rank.

    python benchmarks/allocator_trace.py --cases "small single 1 16" --out traces
    python benchmarks/allocator_trace.py --gpus 2 --cases 1b-table-zero2-cpu,width7b-table-zero2 --out traces

Cases are those of planner_memory.py and, with as many GPUs as ``--gpus`` says, of mamba.py. Prints what each rank
allocated and reserved at most, and what the planner says of that rank (under ZeRO-1 and 2 the first and the last
differ), and writes the sequence of segments and blocks, with sizes in bytes, from before the model is built, into
``OUT/CASE-RANK.json``.
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
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("traces"))
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        run_case(args)
        return
    from zerofit.launch.trials import Trial, run_trial

    args.out.mkdir(parents=True, exist_ok=True)
    for case in args.cases.split(","):
        arguments = ["--case", case, "--gpus", str(args.gpus), "--steps", str(args.steps), "--out", str(args.out)]
        plan = plan_of_case(case, args.gpus)
        outcome = run_trial(Trial(Path(__file__), arguments, plan.world_size, 240))
        if outcome.status != "ok":
            print(f"{case}: {outcome.status} {outcome.log_tail[-500:]!r}")
            continue
        print(f"{case}: ok")
        for path in sorted(args.out.glob(f"{file_name(case)}-[0-9]*.json")):
            print_rank(plan, json.loads(path.read_text(encoding="utf-8")))


def file_name(case: str) -> str:
    return case.replace(" ", "-").replace("+", "-")


def plan_of_case(case: str, gpus: int) -> Any:
    import mamba
    import planner_memory

    if case in mamba.CASES:
        return mamba.plan_of(mamba.CASES[case], argparse.Namespace(small=False, gpus=gpus))
    return planner_memory.plan_of(planner_memory.CASES[case], small=False)


def print_rank(plan: Any, found: dict[str, Any]) -> None:
    """What was seen on one rank beside what the planner's simulation of it says, GiB."""
    from zerofit.planning.memory import H200, _micro_step, _of_rank

    said = _of_rank(plan, H200, _micro_step(plan), None, found["rank"])
    print(
        f"  rank {found['rank']}: allocated {found['allocated_bytes'] / 2**30:.2f} GiB (planned "
        f"{said.allocated_bytes / 2**30:.2f}), reserved {found['reserved_bytes'] / 2**30:.2f} (planned "
        f"{said.reserved_bytes / 2**30:.2f})",
        flush=True,
    )


def run_case(args: argparse.Namespace) -> None:
    """One rank."""
    import torch

    import mamba
    from planner_memory import constant_reader
    from zerofit.engines.build import build
    from zerofit.engines.world import launcher_store, open_world
    from zerofit.launch.memory_trial import random_window
    from zerofit.launch.trials import write_result
    from zerofit.models import model_spec

    plan = plan_of_case(args.case, args.gpus)
    torch.cuda.memory._record_memory_history(max_entries=2_000_000, context=None, stacks="python")
    with open_world(plan, launcher_store()) as world:
        spec = model_spec(plan.model.kind)
        engine = build(plan, spec, world)
        engine.load(mamba.quick_reader(spec, plan.model) if plan.model.kind == "mamba" else constant_reader())
        window, reserved = random_window(plan, world), [torch.cuda.memory_reserved()]
        for index in range(args.steps):
            engine.train_step(window, 1e-4, index).read()
            reserved.append(torch.cuda.memory_reserved())
        traces = torch.cuda.memory._snapshot()["device_traces"][world.device.index or 0]
        found = {
            "rank": world.rank,
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "reserved_bytes_of_steps": reserved,
            "events": [[e["action"], e["size"], e["addr"], e["stream"]] for e in traces],
        }
        (args.out / f"{file_name(args.case)}-{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
        write_result({})
        if plan.world_size > 1:
            torch.distributed.barrier()
        os._exit(0)


if __name__ == "__main__":
    main()
