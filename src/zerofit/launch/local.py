"""Starting the ranks of a run on this machine, and saying why one of them died."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DoesNotFit, Interrupted, RequestError
from .diagnose import describe_exit, is_device_out_of_memory, tail
from .ranks import STOP_GRACE_SECONDS, Outcome, run_ranks

if TYPE_CHECKING:
    from ..training.start import PreparedRun


def launch(
    processes: int,
    arguments: Sequence[str],
    *,
    log_dir: Path,
    module: str = "zerofit.training.worker",
    environment: Mapping[str, str] | None = None,
    inherited: Sequence[int] = (),
    stop_grace_seconds: float = STOP_GRACE_SECONDS,
) -> int:
    """Run ``python -m module arguments`` as ``processes`` ranks, to the end, and report a rank that died.

    Rank 0 keeps the terminal's standard output; its standard error, and everything that the other ranks write, goes
    to ``log_dir/rank-N.log``. Signals are passed on, see `ranks.run_ranks`.

    Args:
        processes: how many ranks.
        arguments: of the module.
        log_dir: is created; logs of an earlier start are overwritten.
        module: what every rank runs.
        environment: added to this process's environment.
        inherited: open files that the ranks keep open too (the run's lock).
        stop_grace_seconds: what ranks have for saving after a request to stop.

    Returns:
        0 when every rank succeeded; 2, 3 or 4 when the ranks ended with it (and have said why); else 1, and what
        happened stands on standard error.
    """
    command = [sys.executable, "-m", module, *arguments]
    outcome = run_ranks(
        command,
        processes,
        log_dir=log_dir,
        environment=environment,
        inherited=inherited,
        stop_grace_seconds=stop_grace_seconds,
    )
    code = exit_code(outcome)
    if code == 1:
        print(report(outcome, log_dir), file=sys.stderr)
    return code


def launch_run(prepared: PreparedRun) -> int:
    """Run the ranks of a prepared run, which hold its lock; see `launch`."""
    return launch(
        prepared.processes,
        prepared.worker_arguments,
        log_dir=prepared.log_dir,
        inherited=[prepared.lock.handle] if prepared.lock else [],
        stop_grace_seconds=prepared.stop_grace_seconds,
    )


def exit_code(outcome: Outcome) -> int:
    """The job's exit code, out of its ranks' codes.

    A refusal of one rank stands for all: ranks that were waiting for it fail on its closed connection. "Saved" holds
    only when no rank ended in another way by itself.
    """
    for refusal in (RequestError.exit_code, DoesNotFit.exit_code):
        if refusal in outcome.exit_codes.values():
            return refusal
    own = [outcome.exit_codes[rank] for rank in outcome.failed if rank not in outcome.killed]
    if own and all(code == Interrupted.exit_code for code in own):
        return Interrupted.exit_code
    return 1 if outcome.failed else 0


def report(outcome: Outcome, log_dir: Path) -> str:
    """What became of a job that failed: which rank ended it, how, and the end of that rank's log."""
    rank = culprit(outcome)
    code = outcome.exit_codes[rank]
    log = log_dir / f"rank-{rank}.log"
    asked = outcome.stopped_by
    if asked is not None and rank in outcome.killed:
        return f"Stopped by {signal.Signals(asked).name}: rank {rank} had not saved when it was killed. See {log}."
    if asked is not None and code == -asked:
        return f"Stopped by {signal.Signals(asked).name} before training began. See {log}."
    sentences = [f"Rank {rank} of {len(outcome.exit_codes)} {describe_exit(code)}."]
    if outcome.oom_kills:
        sentences.append(f"The kernel killed {outcome.oom_kills} process(es) here for lack of memory meanwhile.")
    end = tail(log)
    if is_device_out_of_memory(end):
        sentences.append("The GPU's memory was exhausted: use a smaller micro-batch, more sharding, or offload.")
    # Rank 0's last lines have just been on the terminal.
    shown = bool(end) and rank != 0
    sentences.append(f"The end of {log}:\n{end}" if shown else f"See {log}.")
    return " ".join(sentences)


def culprit(outcome: Outcome) -> int:
    """The rank whose end ended the job: the first that failed, agreed stops aside."""
    return next((r for r in outcome.failed if outcome.exit_codes[r] != Interrupted.exit_code), outcome.failed[0])
