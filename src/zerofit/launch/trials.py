"""One runner for isolated trials: a configuration is tried in processes of its own, and whatever happens is a result.

``bench``, ``verify``, ``tune``, calibration and the benchmark scripts use it: a process that ran out of memory, hung
or crashed leaves nothing behind in the process that asked, neither memory nor a broken CUDA context.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .diagnose import is_device_out_of_memory, is_host_out_of_memory, tail
from .local import culprit
from .ranks import Outcome, run_ranks

#: Environment variable with the path to which a trial writes its result.
RESULT_VARIABLE = "ZEROFIT_TRIAL_RESULT"

Status = Literal["ok", "out_of_memory", "timeout", "failed"]

#: How much of a log is searched and kept: with several ranks, teardown messages follow an out-of-memory report.
_LOG_LINES = 60

_KILLED = (-9, 128 + 9)


@dataclass(frozen=True)
class Trial:
    """What to try.

    Attributes:
        program: a module's name, or the path of a Python script (ends in ``.py``).
        arguments: of the program.
        processes: ranks; each sees torchrun's environment.
        time_limit_seconds: after that the whole tree of processes is killed.
        environment: added to this process's environment.
    """

    program: str | Path
    arguments: Sequence[str] = ()
    processes: int = 1
    time_limit_seconds: float = 600.0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialResult:
    """What came of it.

    Attributes:
        status: ``ok`` only when every rank exited with 0 and a result was written.
        seconds: wall clock, start of the processes included.
        result: what the trial gave to `write_result`; None unless ``ok``.
        exit_code: of the rank that failed first, negative for a signal; 0 when none failed.
        log_tail: the last lines of that rank's output, standard error included; rank 0's when none failed.
    """

    status: Status
    seconds: float
    result: dict[str, Any] | None
    exit_code: int
    log_tail: str


def run_trial(trial: Trial, *, log_dir: Path | None = None) -> TrialResult:
    """Run a trial to its end or its time limit. Nothing that it started stays behind.

    Args:
        trial: what to run.
        log_dir: keeps every rank's output as ``rank-N.log``; None keeps only the tail in the result.

    Raises:
        KeyboardInterrupt: Ctrl-C meanwhile, after the trial has been ended. Other signals take their usual effect.
    """
    with tempfile.TemporaryDirectory(prefix="zerofit-trial-") as scratch:
        result_file = Path(scratch) / "result.json"  # a new folder: no earlier trial's result can be read
        logs = log_dir or Path(scratch)
        outcome = run_ranks(
            _command(trial),
            trial.processes,
            log_dir=logs,
            environment={**trial.environment, RESULT_VARIABLE: str(result_file)},
            terminal=False,
            time_limit_seconds=trial.time_limit_seconds,
        )
        if outcome.stopped_by is not None:
            signal.raise_signal(outcome.stopped_by)
        return _judge(outcome, result_file, logs)


def write_result(result: Mapping[str, Any]) -> None:
    """Called once inside a trial, by any rank; rank 0's is kept. Without a runner it is printed as JSON."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    text = json.dumps(result)
    if RESULT_VARIABLE not in os.environ:
        print(text)
        return
    target = Path(os.environ[RESULT_VARIABLE])
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(target)


def _command(trial: Trial) -> list[str]:
    program = str(trial.program)
    return [sys.executable, *([program] if program.endswith(".py") else ["-m", program]), *trial.arguments]


def _judge(outcome: Outcome, result_file: Path, logs: Path) -> TrialResult:
    rank = culprit(outcome) if outcome.failed else 0
    result = None
    status: Status
    if outcome.timed_out:
        status = "timeout"
    elif _ran_out_of_memory(outcome, logs):
        status = "out_of_memory"
    elif outcome.failed or not result_file.exists():
        status = "failed"
    else:
        status = "ok"
        result = json.loads(result_file.read_text(encoding="utf-8"))
    log_tail = tail(logs / f"rank-{rank}.log", _LOG_LINES)
    return TrialResult(status, outcome.seconds, result, outcome.exit_codes[rank], log_tail)


def _ran_out_of_memory(outcome: Outcome, logs: Path) -> bool:
    """Whether a failed rank was killed by the kernel, or says in its log that memory was exhausted."""
    for rank in outcome.failed:
        if rank not in outcome.killed and outcome.exit_codes[rank] in _KILLED:
            return True
        end = tail(logs / f"rank-{rank}.log", _LOG_LINES)
        if is_device_out_of_memory(end) or is_host_out_of_memory(end):
            return True
    return False
