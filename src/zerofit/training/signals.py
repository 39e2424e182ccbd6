"""Requests to stop that come from outside: Ctrl-C, SIGTERM (Slurm, elastic agents), SIGUSR1 (Slurm's warning)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..types import LAUNCHER, STOP

#: Linux's prctl(2): the signal that a process gets when the one that started it dies.
PR_SET_PDEATHSIG = 1


class StopRequest:
    """Becomes `types.STOP` when a signal arrived; the ranks agree on it in their next step."""

    def __init__(self) -> None:
        self.wishes = 0

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.wishes & STOP:
            raise KeyboardInterrupt  # a second Ctrl-C stops at once
        self.wishes |= STOP


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, the signals ask for a stop at the next step boundary instead of ending the process."""
    request = StopRequest()
    names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {number: signal.signal(number, request._asked) for number in (getattr(signal, n) for n in names)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_with_launcher() -> None:
    """Ask for a stop, as SIGTERM does, when ``zerofit train`` is killed: nobody would read, stop or start again what
    else went on. On Linux; does nothing where something else started the ranks."""
    launcher = os.environ.pop(LAUNCHER, None)  # not for what this rank starts
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != int(launcher):  # it died before
        os.kill(os.getpid(), signal.SIGTERM)
