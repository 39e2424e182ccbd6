"""Isolated trials: whatever happens is a result, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zerofit.launch.trials import Trial, TrialResult, run_trial, write_result

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as on Unix")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def _try(
    tmp_path: Path, source: str, *arguments: str, processes: int = 1, limit: float = 30, **environment: str
) -> TrialResult:
    script = tmp_path / "script.py"
    script.write_text(source, encoding="utf-8")
    return run_trial(Trial(script, arguments, processes, limit, environment))


WRITE = "import sys; from zerofit.launch.trials import write_result; write_result({'words': sys.argv[1:]})\n"


def test_a_script_gives_its_result(tmp_path: Path) -> None:
    trial = _try(tmp_path, WRITE + "print('done')", "a", "b")
    assert (trial.status, trial.result, trial.exit_code) == ("ok", {"words": ["a", "b"]}, 0)
    assert trial.log_tail == "done"
    assert trial.seconds > 0


def test_a_module_gives_its_result(tmp_path: Path) -> None:
    (tmp_path / "some_module.py").write_text(WRITE, encoding="utf-8")
    trial = run_trial(Trial("some_module", ["x"], environment={"PYTHONPATH": str(tmp_path)}))
    assert (trial.status, trial.result) == ("ok", {"words": ["x"]})


def test_of_several_ranks_the_first_is_kept(tmp_path: Path) -> None:
    source = "import os; from zerofit.launch.trials import write_result; write_result({'rank': os.environ['RANK']})"
    trial = _try(tmp_path, source, processes=2)
    assert (trial.status, trial.result) == ("ok", {"rank": "0"})


def test_logs_are_kept_on_request(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WRITE + "import os; print('I am', os.environ['RANK'])", encoding="utf-8")
    run_trial(Trial(script, processes=2), log_dir=tmp_path / "logs")
    assert [(tmp_path / f"logs/rank-{rank}.log").read_text() for rank in (0, 1)] == ["I am 0\n", "I am 1\n"]


def test_a_failure_keeps_the_end_of_the_log(tmp_path: Path) -> None:
    trial = _try(tmp_path, WRITE + "raise SystemExit('no such thing')")
    assert (trial.status, trial.result, trial.exit_code) == ("failed", None, 1)
    assert trial.log_tail == "no such thing"


def test_success_without_a_result_is_a_failure(tmp_path: Path) -> None:
    assert _try(tmp_path, "pass").status == "failed"


def test_an_old_result_is_not_taken(tmp_path: Path) -> None:
    old = tmp_path / "result.json"
    old.write_text('{"old": 1}', encoding="utf-8")
    assert _try(tmp_path, "pass", ZEROFIT_TRIAL_RESULT=str(old)).result is None


@pytest.mark.parametrize("processes", [1, 2])
def test_exhausted_gpu_memory_is_a_result(tmp_path: Path, processes: int) -> None:
    source = (
        "import os, time, torch\n"
        "if int(os.environ['RANK']) == int(os.environ['WORLD_SIZE']) - 1:\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')\n"
        "time.sleep(60)\n"
    )
    trial = _try(tmp_path, source, processes=processes)
    assert (trial.status, trial.exit_code) == ("out_of_memory", 1)
    assert "Tried to allocate 2.00 GiB" in trial.log_tail


def test_the_kernels_kill_is_out_of_memory(tmp_path: Path) -> None:
    trial = _try(tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert (trial.status, trial.exit_code) == ("out_of_memory", -signal.SIGKILL)


def _is_running(pid: int) -> bool:
    """A process that has been killed may wait for a parent to collect it: that is not running."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.mark.skipif(sys.platform != "linux", reason="descendants in sessions of their own are found through /proc")
def test_the_time_limit_ends_the_whole_tree_and_nothing_else(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    source = (
        "import signal, subprocess, sys, time\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]\n"
        "Path(sys.argv[1]).write_text(' '.join(str(child.pid) for child in children))\n"
        "time.sleep(60)\n"
    )
    try:
        started = time.monotonic()
        trial = _try(tmp_path, source, str(tmp_path / "pids"), limit=2)
        assert trial.status == "timeout"
        assert trial.result is None
        assert time.monotonic() - started < 10
        children = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert len(children) == 2
        end = time.monotonic() + 5
        while any(map(_is_running, children)) and time.monotonic() < end:
            time.sleep(0.02)
        assert not any(map(_is_running, children))
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_an_interrupt_ends_the_trial_and_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)", encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_trial(Trial(script))
    assert time.monotonic() - started < 10


def test_a_script_run_by_hand_prints_its_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ZEROFIT_TRIAL_RESULT", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    write_result({"tokens_per_second": 2.5})
    assert capsys.readouterr().out == '{"tokens_per_second": 2.5}\n'
    assert not os.environ.get("ZEROFIT_TRIAL_RESULT")
