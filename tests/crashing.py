"""Kills a training run at random moments, again and again, and checks that nothing is lost.

    python tests/crashing.py --kills 200 --ranks 2 --strategy zero2

Each round starts real workers (forked from a server that has torch loaded), kills one of them or all with SIGKILL, at
least every other time while a checkpoint is being written, sometimes damages what was written last, and starts again
with ``--resume``. In the end every loss that any round wrote must be the uninterrupted run's, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zerofit.checkpoint.manifest import step_folders
from zerofit.checkpoint.retention import damage_of, find_whole
from zerofit.training.events import read_events

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "zerofit.training.worker", "zerofit.engines.build"]
)

INTERVAL, STEPS, KEEP = 3, 60, 4
CONFIG = f"""
model: {{n_layer: 2, n_head: 2, n_embd: 64, block_size: 16}}
data: {{path: data, prepare: [play.txt]}}
optimizer: {{learning_rate: 1e-2}}
global_batch: 8
max_steps: {STEPS}
eval_interval: 10
eval_batches: 1
save_interval: {INTERVAL}
keep_checkpoints: {KEEP}
zero: {{reduce_bucket_elements: 10000}}
"""
#: Ways in which a disk spoils what was written last.
DAMAGES = ("truncate", "flip", "delete", "pointer missing", "pointer nowhere")


@dataclass
class Tally:
    """What was done, and what came of it."""

    kills: int = 0
    during_save: int = 0
    damages: int = 0
    lost_steps: list[int] = field(default_factory=list)
    restart_seconds: list[float] = field(default_factory=list)


class Ranks:
    """The workers of one start."""

    def __init__(self, work: Path, arguments: Sequence[str], count: int) -> None:
        os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")  # read when the fork server starts
        port = _free_port()
        self.log = work / "log.txt"
        self.processes = []
        for rank in range(count):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
            environment = {name: str(value) for name, value in {**own, "MASTER_PORT": port}.items()}
            process = _CONTEXT.Process(target=_work, args=(str(work), list(arguments), environment))
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Exit codes."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        return [process.exitcode for process in self.processes]

    def kill(self, victims: Sequence[int]) -> None:
        """SIGKILL for the victims at once; the others, which then hang in a collective, follow a little later."""
        for rank in victims:
            os.kill(self.processes[rank].pid, signal.SIGKILL)  # type: ignore[arg-type]
        if len(victims) < len(self.processes):
            time.sleep(0.3)
        for process in self.processes:
            process.kill()
            process.join()


def _work(folder: str, arguments: list[str], environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from zerofit.training.worker import main

    torch.set_num_threads(1)
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Crasher:
    """Trains under `strategy` on `ranks` ranks in `work`, with kills."""

    def __init__(self, work: Path, ranks: int, strategy: str, seed: int) -> None:
        self.work, self.ranks, self.random = work, ranks, random.Random(seed)
        (work / "play.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
        (work / "c.yaml").write_text(CONFIG)
        self.how = ["c.yaml", "--strategy", strategy, "--device", "cpu"]
        self.tally = Tally()
        self.reference = self._train_whole()

    def _train_whole(self) -> dict[int, float]:
        codes = Ranks(self.work, [*self.how, "--name", "reference"], self.ranks).wait()
        assert set(codes) == {0}, (codes, (self.work / "log.txt").read_text())
        return self._losses("reference")

    def _losses(self, name: str) -> dict[int, float]:
        """Step -> loss; a step that was trained several times must come out the same each time."""
        found: dict[int, float] = {}
        path = self.work / "runs" / name / "events.jsonl"
        for event in read_events(path) if path.exists() else []:
            if event["kind"] == "step":
                assert found.setdefault(event["step"], event["loss"]) == event["loss"], event
        return found

    def crash(self, kills: int) -> Tally:
        """Run after run, until there were `kills` kills; the last run is trained to its end."""
        number = 0
        while self.tally.kills < kills:
            number += 1
            name = f"run-{number}"
            while not self._round(name, last=self.tally.kills >= kills):
                pass
            assert self._losses(name) == self.reference, f"{name} differs from the uninterrupted run"
        return self.tally

    def _round(self, name: str, last: bool) -> bool:
        """One start, killed unless it is the last; True when the run is complete."""
        run = self.work / "runs" / name
        resumable = (run / "plan.json").exists() and any(not damage_of(f) for f in step_folders(run / "checkpoints"))
        if not resumable and run.exists():  # killed before its first checkpoint: it starts anew, and says so
            run.rename(run.with_name(f"{name}-before-{time.monotonic_ns()}"))
        before = max(self._losses(name), default=0)
        earlier = len(read_events(run / "events.jsonl")) if resumable else 0
        started = time.monotonic()
        ranks = Ranks(self.work, [*self.how, "--name", name, *(["--resume"] if resumable else [])], self.ranks)
        if last or not self._until_a_moment(ranks, run, before, started):
            codes = ranks.wait()
            assert set(codes) == {0}, (codes, (self.work / "log.txt").read_text()[-4000:])
            return True
        during_save = bool(list((run / "checkpoints").glob(".step-*.partial")))
        victims = range(self.ranks) if self.random.random() < 0.5 else [self.random.randrange(self.ranks)]
        ranks.kill(list(victims))
        self.tally.kills += 1
        self.tally.during_save += during_save
        self._check_what_is_left(run, earlier)
        return False

    def _until_a_moment(self, ranks: Ranks, run: Path, before: int, started: float) -> bool:
        """Wait for a random moment: three times out of four the middle of a save. False: the run ended first."""
        wants_save = self.random.random() < 0.75
        steps = self.random.randrange(1, 3 * INTERVAL)
        seen = None
        while any(process.is_alive() for process in ranks.processes):
            if seen is None and (run / "events.jsonl").exists() and len(self._steps(run)) > 0:
                done = self._steps(run)
                if done[-1] != before or before == 0:
                    seen = done[-1]
                    self.tally.restart_seconds.append(time.monotonic() - started)
            if seen is not None and self._steps(run)[-1] >= seen + steps:
                if not wants_save:
                    return True
                if list((run / "checkpoints").glob(".step-*.partial")):
                    time.sleep(self.random.random() * 0.004)
                    return True
            time.sleep(0.0005)
        return False

    def _steps(self, run: Path) -> list[int]:
        """Steps in the order in which they were written, from the end of the events."""
        with (run / "events.jsonl").open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 4000, 0))
            lines = file.read().split(b"\n")[1:-1] or [b""]
        return [event["step"] for line in lines if b'"kind": "step"' in line for event in [json.loads(line)]]

    def _check_what_is_left(self, run: Path, earlier: int) -> None:
        """The newest whole checkpoint is at most one interval, and the save under way, behind this round's steps."""
        folders = step_folders(run / "checkpoints")
        if not folders:
            return
        events = read_events(run / "events.jsonl")[earlier:]  # before that, a checkpoint may have been damaged
        reached, announced = ({e["step"] for e in events if e["kind"] == kind} for kind in ("step", "checkpoint"))
        whole = int(find_whole(run, "latest").folder.name[5:])
        assert whole >= max(announced, default=0), (whole, announced)
        assert max(reached, default=whole) - whole <= 2 * INTERVAL, (reached, whole)
        self.tally.lost_steps.append(max(reached, default=whole) - whole)
        if len(folders) > 2 and self.random.random() < 0.3:
            self._damage(run)

    def _damage(self, run: Path) -> None:
        newest, how = find_whole(run, "latest").folder, self.random.choice(DAMAGES)
        victim = self.random.choice(sorted(newest.iterdir()))
        if how == "truncate":
            os.truncate(victim, self.random.randrange(victim.stat().st_size))
        elif how == "flip":
            data = bytearray(victim.read_bytes())
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            victim.write_bytes(data)
        elif how == "delete":
            victim.unlink()
        elif how == "pointer missing":
            (run / "checkpoints" / "latest").unlink()
        else:
            (run / "checkpoints" / "latest").write_text("step-99999999\n")
        self.tally.damages += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        crasher = Crasher(Path(work), args.ranks, args.strategy, args.seed)
        started = time.monotonic()
        tally: Any = vars(crasher.crash(args.kills))
        lost, restart = tally.pop("lost_steps"), sorted(tally.pop("restart_seconds"))
        how = {"strategy": args.strategy, "ranks": args.ranks, "interval": INTERVAL}
        seconds = {"median_restart_seconds": restart[len(restart) // 2], "seconds": time.monotonic() - started}
        print(json.dumps({**how, **tally, "largest_loss_of_steps": max(lost), **seconds}))


if __name__ == "__main__":
    main()
