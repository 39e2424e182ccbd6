"""``zerofit train`` from arguments to run folder, and what it hands to the launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

import zerofit.launch.local
import zerofit.training.start
from zerofit.cli.train import run_train

TINY = """
model: {n_layer: 1, n_head: 2, n_embd: 8, block_size: 8}
data: {path: tokens, prepare: [text.txt]}
global_batch: 2
eval_batches: 1
eval_interval: 2
"""

LATE_WORKER = "from zerofit.training.worker import main; sys.exit(main())"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a text and a configuration."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 50, encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(TINY, encoding="utf-8")
    return tmp_path


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zerofit.cli.main", "train", "tiny.yaml", "--device", "cpu", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, env=environment)


def steps(run: Path) -> list[int]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [event["step"] for event in events if event["kind"] == "step"]


def test_a_run_is_trained_refused_twice_and_resumed(folder: Path) -> None:
    run = folder / "runs" / "mine"
    done = train(folder, "--name", "mine", "--max-steps", "3")
    assert done.returncode == 0, done.stderr
    assert len(steps(run)) == 3
    assert "max_steps: 3  # command line\n" in (run / "config.yaml").read_text(encoding="utf-8")
    assert "global_batch: 2  # tiny.yaml:4\n" in (run / "config.yaml").read_text(encoding="utf-8")

    again = train(folder, "--name", "mine", "--max-steps", "3")
    assert (again.returncode, len(steps(run))) == (2, 3)
    assert "exists already" in again.stderr

    resumed = train(folder, "--name", "mine", "--max-steps", "5", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    first = steps(run)[0]
    assert steps(run) == list(range(first, first + 5))


def test_a_dry_run_prints_the_plan_and_leaves_no_run_folder(folder: Path) -> None:
    done = train(folder, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "global batch 2 = micro-batch 2" in done.stdout
    assert "nothing was started" in done.stdout
    assert not (folder / "runs").exists()


def test_late_ranks_still_hear_why_nothing_is_started(folder: Path) -> None:
    """Rank 0 hosts the store here, as under srun: it must not leave before the others have read."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in (0, 1):
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(rank)}
        environment = {**os.environ, **address, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "zerofit.training.worker", "tiny.yaml", "--device", "cpu", "--dry-run"]
        if rank:
            command = [sys.executable, "-c", f"import time, sys; time.sleep(5); {LATE_WORKER}", *command[3:]]
        ranks.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL))
    assert [rank.wait(timeout=90) for rank in ranks] == [0, 0]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `run_train` asks of the rooms below, in place of doing it; the ranks end with exit code 3."""
    seen: list[tuple[Any, ...]] = []

    def prepare_run(resolved: Any, request: Any) -> Any:
        seen.append((resolved.config.seed, request.default_name, request.resume, request.dry_run))
        prepared = {"processes": 2, "worker_arguments": ["--run", "x"], "log_dir": Path("logs")}
        held = {"lock": SimpleNamespace(handle=7), "stop_grace_seconds": 30.0}
        return None if request.dry_run else SimpleNamespace(**held, **prepared)

    def launch(
        processes: int, arguments: list[str], *, log_dir: Path, inherited: list[int], stop_grace_seconds: float
    ) -> int:
        seen.append((processes, arguments, log_dir, inherited))
        return 3

    monkeypatch.setattr(zerofit.training.start, "prepare_run", prepare_run)
    monkeypatch.setattr(zerofit.launch.local, "launch", launch)
    return seen


def test_the_verb_ends_with_the_exit_code_of_its_ranks(calls: list[tuple[Any, ...]]) -> None:
    with pytest.raises(typer.Exit) as ended:
        run_train(["--preset", "gpt2", "--seed", "7", "--resume", "best"])
    assert ended.value.exit_code == 3
    assert calls == [(7, "gpt2", "best", False), (2, ["--run", "x"], Path("logs"), [7])]


def test_a_dry_run_launches_nothing(calls: list[tuple[Any, ...]]) -> None:
    run_train(["--preset", "gpt2", "--dry-run"])
    assert calls == [(1337, "gpt2", None, True)]
