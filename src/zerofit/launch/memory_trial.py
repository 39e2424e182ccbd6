"""A few real steps of a plan, to measure what it needs: the program of a trial.

    python -m zerofit.launch.memory_trial PLAN.json

Weights, engine, optimizer and collectives are those of a run; the inputs are random, for memory does not read them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from ..checkpoint.model import initial_reader
from ..engines.build import build
from ..engines.cuda_graphs import EAGER_STEPS
from ..engines.world import launcher_store, leave, open_world
from ..models import model_spec
from ..planning.pictures import sizes_on_gpu
from ..planning.plan import Plan
from ..tasks import task_of
from ..types import Batch, World
from .trials import write_result

#: Enough for moments, caches and the allocator's second look at every size.
STEPS = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """One rank."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    plan = Plan.model_validate_json(Path(path).read_text(encoding="utf-8"))
    with ExitStack() as cleanup:
        world = cleanup.enter_context(open_world(plan, launcher_store()))
        spec = model_spec(plan.model.kind)
        engine = build(plan, spec, world)
        cleanup.callback(engine.close)
        engine.load(initial_reader(spec, plan.model, plan.seed))
        held = pictures_held(plan, world)
        window, seconds = random_window(plan, world), []
        unrecorded = EAGER_STEPS + 1 if plan.cuda_graphs else 0
        for step in range(STEPS + unrecorded):
            started = time.perf_counter()
            engine.train_step(window, 1e-4, step, 0).read()
            seconds.append(time.perf_counter() - started)
        if plan.cuda_graphs:
            engine.eval_step(window[:1]).read()  # cannot use the recordings' memory
        del held
        write_result({"seconds": seconds[unrecorded:], "states": dict(engine.memory()), **measured_bytes(world)})


def pictures_held(plan: Plan, world: World) -> list[torch.Tensor]:
    """What reading pictures ahead would hold on the device, not filled."""
    sizes = sizes_on_gpu(plan)
    if not sizes:
        return []
    with torch.cuda.stream(torch.cuda.Stream(world.device)):
        return [torch.empty(size, dtype=torch.uint8, device=world.device) for size in sizes]


def random_window(plan: Plan, world: World) -> list[Batch]:
    """The batches of one step, random."""
    generator = torch.Generator().manual_seed(plan.seed + world.rank)
    task = task_of(plan.model)
    return [task.random_batch(plan.model, plan.micro_batch, generator) for _ in range(plan.accumulation_steps)]


def measured_bytes(world: World) -> dict[str, int | None]:
    """Peaks of this rank: PyTorch's allocator, and what the driver shows on the device."""
    if world.device.type != "cuda":
        return {"allocated": None, "reserved": None, "driver": None}
    free, total = torch.cuda.mem_get_info(world.device)
    return {
        "allocated": torch.cuda.max_memory_allocated(world.device),
        "reserved": torch.cuda.max_memory_reserved(world.device),
        "driver": total - free,
    }


if __name__ == "__main__":
    main()
    leave(0)
