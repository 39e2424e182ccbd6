"""Saving and resuming GPT-2 XL under ZeRO-2, beside DeepSpeed's own checkpoints and PyTorch DCP's asynchronous ones.

    python benchmarks/checkpoints.py --gpus 4 --folder /fast/disk --out benchmarks/results/checkpoints.json

All three save the same engine's masters and moments, several times, while it trains; every step ends with a
synchronisation. Figures, on rank 0: `stall_seconds`: time that a save took from training, that is the call and what the
step before it (zerofit starts the probe's forward pass behind that step) and the steps after it took longer than the
median; `durable_seconds`: from the call until the bytes are on the disk (fsync, also for DeepSpeed, which leaves that
out); `verify_seconds` and `load_seconds`: a resume. The first save of each also makes its buffers. ``--small`` shrinks
the model for a dry run on CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

CASES = ("zerofit", "deepspeed", "dcp")
#: Steps between saves, of which the first ones may be held up.
STEPS_BETWEEN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/zerofit-checkpoints"))
    parser.add_argument("--out", type=Path, default=Path("checkpoints.json"))
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--limit-seconds", type=float, default=200)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--case", default="")
    args = parser.parse_args()
    if args.case:
        run_case(args)
    else:
        run_all(args)


def run_all(args: argparse.Namespace) -> None:
    """Run the cases one after another, print a table, write all figures as JSON."""
    from zerofit.launch.trials import Trial, run_trial

    args.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"date": date.today().isoformat(), "gpus": args.gpus, "cases": {}}
    print(f"disk: {shutil.disk_usage(args.folder).free / 2**30:.0f} GiB free", flush=True)
    for name in args.cases.split(","):
        shutil.rmtree(args.folder, ignore_errors=True)
        args.folder.mkdir(parents=True)
        arguments = ["--case", name, "--gpus", str(args.gpus), "--folder", str(args.folder), "--saves", str(args.saves)]
        outcome = run_trial(
            Trial(Path(__file__), arguments + (["--small"] if args.small else []), args.gpus, args.limit_seconds)
        )
        results["cases"][name] = {"status": outcome.status, **(outcome.result or {"log": outcome.log_tail[-3000:]})}
        print(name, json.dumps(results["cases"][name]), flush=True)
        args.out.write_text(json.dumps(results, indent=1))
    shutil.rmtree(args.folder, ignore_errors=True)


def run_case(args: argparse.Namespace) -> None:
    """One rank of one case."""
    import torch

    from zerofit.launch.trials import write_result

    engine, step, world, close = build_engine(args)
    synchronize: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    make = {"zerofit": ZerofitSaves, "deepspeed": DeepSpeedSaves, "dcp": DcpSaves}[args.case]
    saves = make(engine, world, args.folder)
    rows, times = [], []
    for index in range(4):
        step(index)
    synchronize()
    for save in range(args.saves):
        synchronize()
        began = time.perf_counter()
        step(3, behind=saves.announce)
        synchronize()
        announced = time.perf_counter() - began
        if save == args.saves - 1 and isinstance(saves, ZerofitSaves):
            saves.remember()
            synchronize()
        since = time.perf_counter()
        saves.begin(save)
        called = time.perf_counter() - since
        steps = timed_steps(step, synchronize, 4 + save * STEPS_BETWEEN)
        usual = statistics.median(steps[STEPS_BETWEEN // 2 :])
        durable = saves.durable(since)
        rows.append({
            "call_seconds": called,
            "announced_step_seconds": announced,
            "stall_seconds": announced - usual + called + sum(steps[: STEPS_BETWEEN // 2])
            - usual * (STEPS_BETWEEN // 2),
            "durable_seconds": durable,
            "steps_after_seconds": steps,
            **getattr(saves, "details", {}),
        })  # fmt: skip
        times += steps
    result = {"saves": rows, "step_seconds": statistics.median(times), **saves.resume(), **facts(engine)}
    write_result(result)
    saves.close()
    close()


def timed_steps(step: Callable[[int], None], synchronize: Callable[[], None], first: int) -> list[float]:
    """Wall seconds of each of the following steps."""
    seconds = []
    for index in range(first, first + STEPS_BETWEEN):
        started = time.perf_counter()
        step(index)
        synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def facts(engine: Any) -> dict[str, Any]:
    import deepspeed
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": name, "torch": torch.__version__, "deepspeed": deepspeed.__version__,
            "parameters": engine.plan.parameters}  # fmt: skip


def build_engine(args: argparse.Namespace) -> Any:
    """zerofit's ZeRO-2 engine with GPT-2 XL, a step function, the world, and what closes it."""
    import torch

    from gpt2_xl import shape, window_of
    from zerofit.checkpoint.model import initial_reader
    from zerofit.engines.build import build
    from zerofit.engines.world import launcher_store, open_world
    from zerofit.models import model_spec
    from zerofit.planning.plan import Plan, ZeroPlan

    model, cuda = shape(args.small), torch.cuda.is_available()
    plan = Plan(
        model=model, parameters=model.parameter_count(), strategy="zero2", device="cuda" if cuda else "cpu",
        world_size=args.gpus, micro_batch=8, accumulation_steps=1, precision="bf16", compile=cuda,
        zero=ZeroPlan(pin_memory=cuda),
    )  # fmt: skip
    opened = open_world(plan, launcher_store())
    world = opened.__enter__()
    engine = build(plan, model_spec("gpt2"), world)
    engine.load(initial_reader(model_spec("gpt2"), model, seed=1))
    window = window_of(model, 8, 1, world.rank)

    def step(index: int, behind: Callable[[], None] = lambda: None) -> None:
        pending = engine.train_step(window, 1e-4, index)
        behind()
        pending.read()

    return engine, step, world, lambda: opened.__exit__(None, None, None)


class ZerofitSaves:
    """As the training loop saves: the probe's loss, the scalars, the copy."""

    def __init__(self, engine: Any, world: Any, folder: Path) -> None:
        from gpt2_xl import window_of
        from zerofit.checkpoint.retention import Retention
        from zerofit.checkpoint.saver import Saver
        from zerofit.tasks.language_modeling import probe_of

        self.engine, self.folder = engine, folder
        self.saver = Saver(folder / "checkpoints", world, Retention(1), 0, asynchronous=True, patience_seconds=60)
        (folder / "checkpoints").mkdir(exist_ok=True)
        (batch,) = window_of(engine.plan.model, 1, 1, seed=5)
        self.probe = probe_of(batch.inputs)

    def announce(self) -> None:
        from zerofit.training.probe import probe_loss

        self.pending = probe_loss(self.engine, self.probe)

    def begin(self, index: int) -> None:
        from zerofit.checkpoint.saver import Request

        started = time.perf_counter()
        state = {"probe_loss": self.pending.read()}
        self.details = {"probe_seconds": time.perf_counter() - started}
        request = Request(index, self.engine.scalars(), state, self.probe.inputs, ("latest",))
        self.details["scalars_seconds"] = time.perf_counter() - started - self.details["probe_seconds"]
        self.saver.begin(request, self.engine.fragments(), self.engine.hold_updates)

    def remember(self) -> None:
        """What the last save must hold, whatever training does meanwhile."""
        self.expected = [(f.name, f.role, f.start, f.data.clone()) for f in self.engine.fragments()]

    def durable(self, since: float) -> float | None:
        assert self.saver.finish()
        told = self.saver.told()
        return told[0].seconds if told else None

    def resume(self) -> dict[str, float]:
        import torch.distributed as dist

        from zerofit.checkpoint.retention import find_whole
        from zerofit.checkpoint.store import open_checkpoint

        dist.barrier()
        started = time.perf_counter()
        found = find_whole(self.folder, "latest").folder if dist.get_rank() == 0 else None
        verified = time.perf_counter()
        dist.barrier()
        began = time.perf_counter()
        saved = open_checkpoint(self.folder / "checkpoints" / (self.folder / "checkpoints/latest").read_text().strip())
        assert found in (None, saved.folder)
        same = all(
            saved.read(name, role, start, start + len(data)).equal(data.cpu())  # type: ignore[union-attr]
            for name, role, start, data in self.expected
        )
        assert same, "the checkpoint holds something else than the engine held when it was asked for"
        dist.barrier()
        began = time.perf_counter()
        self.engine.load(saved.read, saved.scalars)
        dist.barrier()
        ended = time.perf_counter()
        return {"verify_seconds": verified - started, "load_seconds": ended - began}

    def close(self) -> None:
        self.saver.close()


class DeepSpeedSaves:
    """``save_checkpoint`` and ``load_checkpoint`` of DeepSpeed itself."""

    def __init__(self, engine: Any, world: Any, folder: Path) -> None:
        self.engine, self.folder, self.last, self.called_seconds = engine.engine, folder, "", 0.0

    def announce(self) -> None:
        """Nothing to prepare."""

    def begin(self, index: int) -> None:
        if self.last and int(os.environ["RANK"]) == 0:
            shutil.rmtree(self.folder / self.last)  # the disk holds one at a time
        self.last = f"step{index}"
        started = time.perf_counter()
        self.engine.save_checkpoint(str(self.folder), tag=self.last)
        self.called_seconds = time.perf_counter() - started

    def durable(self, since: float) -> float:
        """The call, and what fsync takes for what the system has not brought to the disk during the steps since."""
        import torch.distributed as dist

        started = time.perf_counter()
        for path in (self.folder / self.last).iterdir():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        dist.barrier()
        return self.called_seconds + time.perf_counter() - started

    def resume(self) -> dict[str, float]:
        import torch.distributed as dist

        dist.barrier()
        started = time.perf_counter()
        self.engine.load_checkpoint(str(self.folder), tag=self.last)
        dist.barrier()
        return {"load_seconds": time.perf_counter() - started}

    def close(self) -> None:
        """Nothing stays open."""


class DcpSaves:
    """``torch.distributed.checkpoint.async_save`` of the same tensors, each rank's under names of its own."""

    def __init__(self, engine: Any, world: Any, folder: Path) -> None:
        import torch.distributed as dist

        self.engine, self.folder, self.rank, self.future = engine, folder, world.rank, None
        self.group = dist.new_group(backend="gloo")
        self.last, self.ended = "", 0.0

    def state(self) -> dict[str, Any]:
        return {
            f"{self.rank}/{index}/{role}": tensor
            for index, partition in enumerate(self.engine.layout.partitions)
            for role, tensor in partition.tensors().items()
        }

    def announce(self) -> None:
        """Nothing to prepare."""

    def begin(self, index: int) -> None:
        import torch.distributed.checkpoint as dcp

        if self.last and self.rank == 0:
            shutil.rmtree(self.folder / self.last)
        self.last = f"step{index}"
        self.future = dcp.async_save(self.state(), checkpoint_id=str(self.folder / self.last), process_group=self.group)
        self.future.add_done_callback(lambda future: setattr(self, "ended", time.perf_counter()))

    def durable(self, since: float) -> float:
        assert self.future is not None
        self.future.result()
        return self.ended - since

    def resume(self) -> dict[str, float]:
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp

        dist.barrier()
        started = time.perf_counter()
        dcp.load(self.state(), checkpoint_id=str(self.folder / self.last), process_group=self.group)
        dist.barrier()
        return {"load_seconds": time.perf_counter() - started}

    def close(self) -> None:
        """Nothing stays open."""


if __name__ == "__main__":
    main()
