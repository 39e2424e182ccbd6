"""The processes of one job on this machine: started, watched, signalled and ended together.

The ranks see torchrun's environment (``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT`` …),
so that a worker cannot tell who started it. Why this and not torchelastic's agent itself (seen with torch 2.13): after
a signal the agent forgets its workers' exit codes, so that "saved, resumable" cannot be told from a crash; a second
Ctrl-C waits up to 30 seconds; stdout and stderr cannot share one log; and it makes the parent import torch, which
costs 1 to 2 seconds before the first worker starts.
"""

from __future__ import annotations

import codecs
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from ..planning.hardware import cpu_cores
from ..types import LAUNCHER
from .diagnose import OWN_EXIT_CODES, oom_kills

WINDOWS = sys.platform == "win32"

#: Requests to stop, and what the ranks get for each: Ctrl-C, a batch system's end and its warning before that, and
#: the end of a terminal, of which the ranks know nothing because each leads a session of its own.
_PASSED_ON = {"SIGINT": "SIGINT", "SIGTERM": "SIGTERM", "SIGUSR1": "SIGUSR1", "SIGHUP": "SIGTERM"}
FORWARDED = {
    getattr(signal, name): getattr(signal, passed) for name, passed in _PASSED_ON.items() if hasattr(signal, name)
}

#: After a request to stop the ranks finish their step and save.
STOP_GRACE_SECONDS = 30.0

#: After a rank died the others hang in a collective, or end with an error of their own; nothing can be saved.
DEATH_GRACE_SECONDS = 15.0

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        exit_codes: by rank; negative for a signal.
        failed: the ranks that did not exit with 0, in the order in which they ended.
        killed: the ranks that were still running when their time was up.
        stopped_by: the last request to stop (a key of `FORWARDED`), if any.
        timed_out: ended by the time limit.
        seconds: from the start of the first rank to the end of the last.
        oom_kills: processes that the kernel killed for memory meanwhile in this control group; 0 where unknown.
    """

    exit_codes: Mapping[int, int]
    failed: tuple[int, ...]
    killed: frozenset[int]
    stopped_by: int | None
    timed_out: bool
    seconds: float
    oom_kills: int


def run_ranks(
    command: Sequence[str],
    processes: int,
    *,
    log_dir: Path,
    environment: Mapping[str, str] | None = None,
    terminal: bool = True,
    time_limit_seconds: float = float("inf"),
    inherited: Sequence[int] = (),
    stop_grace_seconds: float = STOP_GRACE_SECONDS,
) -> Outcome:
    """Run ``processes`` copies of ``command`` as the ranks of one job, to the end.

    Each rank leads a session of its own. A rank that fails takes the others down: those that ended with an exit code
    of zerofit's own (2, 3, 4) have agreed on it, so the others get `STOP_GRACE_SECONDS` to follow; after any other
    end they get SIGTERM, and SIGKILL `DEATH_GRACE_SECONDS` later. `FORWARDED` signals are passed on (in the main
    thread); the ranks then have `STOP_GRACE_SECONDS`, and a second Ctrl-C kills at once.

    Args:
        command: program and arguments.
        processes: number of ranks.
        log_dir: gets ``rank-N.log``; is created. Logs of an earlier job there are overwritten.
        environment: added to this process's environment.
        terminal: rank 0 keeps standard output, and its standard error is copied to the log. Otherwise rank 0 writes
            to its log like the others.
        time_limit_seconds: after that everything is killed.
        inherited: open files that the ranks keep open too (a lock).
        stop_grace_seconds: what ranks have for saving after a request to stop.
    """
    before = oom_kills() or 0
    started = time.monotonic()
    with _received_signals() as received:
        ranks = _Ranks(command, processes, log_dir, environment or {}, terminal, inherited)
        try:
            watch = _Watch(ranks, received, started + time_limit_seconds, stop_grace_seconds)
            while watch.step():
                time.sleep(POLL_SECONDS)
        finally:
            ranks.close()
    return Outcome(
        exit_codes=ranks.exit_codes,
        failed=tuple(watch.failed),
        killed=frozenset(ranks.killed),
        stopped_by=watch.stopped_by,
        timed_out=watch.timed_out,
        seconds=time.monotonic() - started,
        oom_kills=(oom_kills() or 0) - before,
    )


class _Watch:
    """Decides, poll by poll, who has to be asked to stop and who has to be killed."""

    def __init__(self, ranks: _Ranks, received: list[int], time_limit: float, stop_grace_seconds: float) -> None:
        self._stop_grace_seconds = stop_grace_seconds
        self.failed: list[int] = []
        self.stopped_by: int | None = None
        self.timed_out = False
        self._ranks = ranks
        self._received = received
        self._time_limit = time_limit
        self._kill_at = float("inf")
        self._interrupts = 0

    def step(self) -> bool:
        """Look once; False when every rank has ended."""
        while self._received:
            self._pass_on(self._received.pop(0))
        ended = self._ranks.poll()
        self._notice_failures(ended)
        if len(ended) == self._ranks.count:
            return False
        now = time.monotonic()
        self.timed_out = now > self._time_limit
        if self.timed_out or now > self._kill_at:
            self._ranks.kill()
        return True

    def _pass_on(self, number: int) -> None:
        self.stopped_by = number
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._ranks.kill()
            return
        self._ranks.send(FORWARDED[signal.Signals(number)])
        self._kill_within(self._stop_grace_seconds)

    def _notice_failures(self, ended: Mapping[int, int]) -> None:
        new = [rank for rank, code in ended.items() if code and rank not in self.failed]
        # Of those that ended between two polls: one killed by a signal is the cause, an error of the others
        # ("connection closed by peer") its consequence.
        new.sort(key=lambda rank: (ended[rank] > 0, rank))
        first = not self.failed
        self.failed += new
        if not (first and new):
            return
        if ended[new[0]] in OWN_EXIT_CODES:
            self._kill_within(self._stop_grace_seconds)
        else:
            self._ranks.send(signal.SIGTERM)
            self._kill_within(DEATH_GRACE_SECONDS)

    def _kill_within(self, seconds: float) -> None:
        self._kill_at = min(self._kill_at, time.monotonic() + seconds)


class _Ranks:
    """The processes themselves."""

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        log_dir: Path,
        environment: Mapping[str, str],
        terminal: bool,
        inherited: Sequence[int] = (),
    ) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        self.count = processes
        self.killed: set[int] = set()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._copier: threading.Thread | None = None
        self._inherited = () if WINDOWS else tuple(inherited)
        shared = _shared_environment(processes, environment)
        try:
            for rank in range(processes):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), LAUNCHER: str(os.getpid())}
                self._start(list(command), rank, own, log_dir / f"rank-{rank}.log", terminal and rank == 0)
        except BaseException:
            self.close()
            raise

    def _start(self, command: list[str], rank: int, own: dict[str, str], log: Path, terminal: bool) -> None:
        file = log.open("wb")
        process = subprocess.Popen(
            command,
            env=own,
            stdin=subprocess.DEVNULL,
            stdout=None if terminal else file,
            stderr=subprocess.PIPE if terminal else subprocess.STDOUT,
            start_new_session=not WINDOWS,
            pass_fds=self._inherited,
        )
        self._processes[rank] = process
        if process.stderr is None:
            file.close()
            return
        self._copier = threading.Thread(target=_copy_to_terminal, args=(process.stderr, file), daemon=True)
        self._copier.start()

    @property
    def exit_codes(self) -> dict[int, int]:
        """Of the ranks that have ended."""
        return {rank: p.returncode for rank, p in self._processes.items() if p.returncode is not None}

    def poll(self) -> dict[int, int]:
        """`exit_codes`, looked up anew."""
        for process in self._processes.values():
            process.poll()
        return self.exit_codes

    def send(self, number: int) -> None:
        """Pass a signal to the ranks alone: their helpers (data workers) are theirs to end.

        On Windows Ctrl-C reaches every process of the console by itself, and other signals do not exist.
        """
        if WINDOWS:
            return
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        """End the ranks that still run, with everything that they started, now."""
        for rank, process in self._processes.items():
            if process.poll() is None:
                self.killed.add(rank)
                _kill_tree(process)

    def close(self) -> None:
        """Kill what still runs, and finish copying rank 0's standard error."""
        self.kill()
        for process in self._processes.values():
            process.wait()
        if self._copier is not None:
            # A helper that outlives rank 0 holds the pipe open; its output is not worth waiting for.
            self._copier.join(timeout=2.0)


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """Inside, `FORWARDED` signals are only noted; but under nohup a closed terminal stays ignored.

    Python delivers signals to the main thread: in another one there is nothing to note.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    hangup = getattr(signal, "SIGHUP", None)
    wanted = [n for n in FORWARDED if not (n == hangup and signal.getsignal(n) == signal.SIG_IGN)]
    before = {number: signal.signal(number, note) for number in wanted}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _shared_environment(processes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables, without those of one rank; a caller's value wins where a default stands first."""
    # torchrun gives every rank one thread, which leaves most cores of a CPU run idle. Unbuffered output and
    # faulthandler: the last lines of a rank that was killed or crashed reach its log.
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cpu_cores() // processes)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    return {
        **defaults,
        **os.environ,
        **environment,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }


def _free_port() -> int:
    """A port of loopback that nobody listens on.

    Rank 0 binds it a few seconds later. It lies below the range from which Linux, macOS and Windows give ports to
    outgoing connections (32768 and 49152 upwards), so that only another server could take it in between.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("none of 100 ports tried on 127.0.0.1 is free")


def _copy_to_terminal(source: BinaryIO, log: BinaryIO) -> None:
    """Copy a rank's standard error to ours and to its log, as it comes: progress lines end without a newline."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with source, log:
        while chunk := os.read(source.fileno(), 65536):
            log.write(chunk)
            log.flush()
            sys.stderr.write(decoder.decode(chunk))
            sys.stderr.flush()


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, its group and its other descendants (those that opened sessions of their own)."""
    if WINDOWS:
        process.kill()
        return
    descendants = _descendants(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in descendants:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    """Children of a process, their children and so on, from ``/proc``; empty where there is none (macOS)."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # "pid (name) state parent …"; the name may hold anything, parentheses included.
            parent = int(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(pid, ()))
    for child in found:
        found.extend(children.get(child, ()))
    return found
