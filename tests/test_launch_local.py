"""Ranks on this machine: environment, terminal, logs, signals, and what is said when one dies.

Most modules here import no torch, so that a test takes a fraction of a second.
"""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zerofit.launch import ranks
from zerofit.launch.local import exit_code, launch, report
from zerofit.launch.ranks import Outcome
from zerofit.planning.hardware import cpu_cores

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and terminals as on Unix")

#: A launcher in a process of its own: launcher.py PROCESSES LOG_DIR MODULE [ARGUMENT…]
LAUNCHER = """
import sys
from pathlib import Path
from zerofit.launch.local import launch
sys.exit(launch(int(sys.argv[1]), sys.argv[4:], log_dir=Path(sys.argv[2]), module=sys.argv[3]))
"""

#: A worker that announces itself, and saves when asked.
STOPPABLE = """
import os, signal, sys, time
from pathlib import Path
def save(number, frame):
    print("saved after", signal.Signals(number).name, flush=True)
    sys.exit(4)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, (lambda *_: None) if "deaf" in sys.argv else save)
Path(sys.argv[1], "ready-" + os.environ["RANK"]).touch()
while True:
    time.sleep(0.05)
"""

Write = Callable[[str], str]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a worker's source and returns its module name."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def write(source: str) -> str:
        (tmp_path / "trial_worker.py").write_text(source, encoding="utf-8")
        return "trial_worker"

    return write


def _wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _start_stoppable(tmp_path: Path, name: str, *words: str) -> subprocess.Popen[str]:
    """Two ranks of `STOPPABLE` under a launcher of their own, both ready for signals."""
    command = [sys.executable, "-c", LAUNCHER, "2", str(tmp_path / "logs"), name, str(tmp_path), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)))
    return process


def test_ranks_see_the_environment_of_torchrun(tmp_path: Path, module: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    name = module(
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "Path(sys.argv[1], os.environ['RANK'] + '.json').write_text(json.dumps(dict(os.environ)))\n"
    )
    assert launch(3, [str(tmp_path)], log_dir=tmp_path / "logs", module=name, environment={"EXTRA": "1"}) == 0
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [(e["RANK"], e["LOCAL_RANK"]) for e in seen] == [("0", "0"), ("1", "1"), ("2", "2")]
    for variable, value in {
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "EXTRA": "1",
        "OMP_NUM_THREADS": str(max(1, cpu_cores() // 3)),
    }.items():
        assert {e[variable] for e in seen} == {value}
    assert len({e["MASTER_PORT"] for e in seen}) == 1


def test_a_value_of_the_user_is_kept(tmp_path: Path, module: Write) -> None:
    name = module("import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'] != '1')")
    assert launch(1, [], log_dir=tmp_path, module=name) == 0


def test_two_gloo_ranks_meet(tmp_path: Path, module: Write) -> None:
    name = module(
        "import torch, torch.distributed as dist\n"
        "from zerofit.engines.world import leave\n"
        "dist.init_process_group('gloo')\n"
        "one = torch.ones(1)\n"
        "dist.all_reduce(one)\n"
        "print('sum', one.item())\n"
        "dist.destroy_process_group()\n"
        "leave(0)\n"
    )
    assert launch(2, [], log_dir=tmp_path / "logs", module=name) == 0
    assert (tmp_path / "logs/rank-1.log").read_text() == "sum 2.0\n"


def test_output_goes_where_it_belongs(tmp_path: Path, module: Write, capfd: pytest.CaptureFixture[str]) -> None:
    name = module(
        "import os, sys\n"
        "print('out', os.environ['RANK'])\n"
        "print('half a line', os.environ['RANK'], end='', file=sys.stderr)\n"
    )
    assert launch(2, [], log_dir=tmp_path, module=name) == 0
    out, err = capfd.readouterr()
    assert out == "out 0\n"
    assert err == "half a line 0"
    assert (tmp_path / "rank-0.log").read_text() == "half a line 0"
    assert (tmp_path / "rank-1.log").read_text() == "out 1\nhalf a line 1"


@pytest.mark.parametrize("processes", [1, 2])
def test_rank_0_keeps_the_terminal(tmp_path: Path, module: Write, processes: int) -> None:
    name = module("import os, sys; print(f'rank {os.environ[\"RANK\"]} terminal {sys.stdout.isatty()}')")
    parent, child = pty.openpty()
    command = [sys.executable, "-c", LAUNCHER, str(processes), str(tmp_path / "logs"), name]
    subprocess.run(command, stdout=child, check=True)
    os.close(child)
    assert os.read(parent, 1000).decode() == "rank 0 terminal True\r\n"
    os.close(parent)


@pytest.mark.parametrize("code", [2, 3, 4])
def test_exit_codes_of_our_own_pass_silently(
    tmp_path: Path, module: Write, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    name = module(f"import sys; sys.exit({code})")
    assert launch(2, [], log_dir=tmp_path, module=name) == code
    assert capfd.readouterr() == ("", "")


def test_a_dead_rank_takes_the_others_down(
    tmp_path: Path, module: Write, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "DEATH_GRACE_SECONDS", 1.0)
    name = module(
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"  # as deaf as a rank inside a collective
        "if os.environ['RANK'] == '1':\n"
        "    print('\\n'.join(f'line {i}' for i in range(50)), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "while True: time.sleep(1)\n"
    )
    started = time.monotonic()
    assert launch(3, [], log_dir=tmp_path, module=name) == 1
    assert time.monotonic() - started < 10
    err = capfd.readouterr().err
    assert err.startswith("Rank 1 of 3 was killed by SIGKILL (-9): usually the kernel's out-of-memory killer")
    assert "line 49" in err
    assert "line 30\n" in err
    assert "line 29\n" not in err
    assert str(tmp_path / "rank-1.log") in err


def test_the_graces_keep_the_promised_30_seconds() -> None:
    assert ranks.DEATH_GRACE_SECONDS < 30
    assert ranks.STOP_GRACE_SECONDS <= 30


def test_an_error_of_rank_0_is_said_once(tmp_path: Path, module: Write, capfd: pytest.CaptureFixture[str]) -> None:
    name = module("raise ValueError('no such thing')")
    assert launch(1, [], log_dir=tmp_path, module=name) == 1
    err = capfd.readouterr().err
    assert err.count("ValueError: no such thing") == 1
    assert err.endswith(f"Rank 0 of 1 ended with exit code 1. See {tmp_path / 'rank-0.log'}.\n")


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_ranks_stop_when_their_launcher_is_killed(tmp_path: Path, module: Write) -> None:
    stops = "from zerofit.training.signals import stop_with_launcher\nstop_with_launcher()\n"
    process = _start_stoppable(tmp_path, module(STOPPABLE.replace("Path(sys.argv", stops + "Path(sys.argv", 1)))
    process.kill()
    process.communicate(timeout=20)  # rank 0 holds the pipe until it ends
    log = tmp_path / "logs" / "rank-1.log"
    _wait_for(lambda: log.read_text() == "saved after SIGTERM\n")


@pytest.mark.parametrize(
    ("number", "passed"),
    [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGUSR1"), ("SIGHUP", "SIGTERM")],
)
def test_signals_reach_the_ranks_which_save(tmp_path: Path, module: Write, number: str, passed: str) -> None:
    process = _start_stoppable(tmp_path, module(STOPPABLE))
    process.send_signal(signal.Signals[number])
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (4, f"saved after {passed}\n", "")
    assert (tmp_path / "logs/rank-1.log").read_text() == f"saved after {passed}\n"


def test_a_second_interrupt_ends_everything_at_once(tmp_path: Path, module: Write) -> None:
    process = _start_stoppable(tmp_path, module(STOPPABLE), "deaf")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 1
    assert re.match(r"Stopped by SIGINT: rank [01] had not saved when it was killed\.", err)


def test_a_stop_before_training_began_is_no_crash(tmp_path: Path) -> None:
    asked = Outcome({0: -15, 1: -15}, (0, 1), frozenset(), signal.SIGTERM, False, 1.0, 0)
    assert report(asked, tmp_path).startswith("Stopped by SIGTERM before training began.")


def test_ranks_start_from_another_thread_too(tmp_path: Path, module: Write) -> None:
    name = module("")
    with ThreadPoolExecutor() as pool:
        assert pool.submit(launch, 2, [], log_dir=tmp_path, module=name).result() == 0


def _outcome(codes: dict[int, int], failed: tuple[int, ...], killed: set[int] | None = None) -> Outcome:
    return Outcome(codes, failed, frozenset(killed or ()), None, False, 1.0, 0)


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (_outcome({0: 0, 1: 0}, ()), 0),
        (_outcome({0: 4, 1: 4}, (1, 0)), 4),
        (_outcome({0: 4, 1: -9}, (0, 1), {1}), 4),  # hung in its last moments, after the save
        (_outcome({0: 1, 1: 4}, (1, 0)), 1),  # rank 0 failed while it saved
        (_outcome({0: -9, 1: -9}, (0, 1), {0, 1}), 1),
        (_outcome({0: 2, 1: 1}, (1, 0)), 2),  # rank 1 lost the connection to the rank that refused
    ],
)
def test_the_exit_code_of_a_job(outcome: Outcome, code: int) -> None:
    assert exit_code(outcome) == code


def test_the_report_names_exhausted_gpu_memory(tmp_path: Path) -> None:
    (tmp_path / "rank-1.log").write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n")
    said = report(_outcome({0: -15, 1: 1}, (1, 0)), tmp_path)
    assert said.startswith("Rank 1 of 2 ended with exit code 1. The GPU's memory was exhausted")


def test_the_report_counts_the_kernels_kills(tmp_path: Path) -> None:
    said = report(Outcome({0: -9}, (0,), frozenset(), None, False, 1.0, oom_kills=1), tmp_path)
    assert "The kernel killed 1 process(es) here for lack of memory" in said


def test_the_launcher_imports_no_torch() -> None:
    code = "import sys, zerofit.launch.local, zerofit.launch.trials; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
