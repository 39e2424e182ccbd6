"""What every test may rely on."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile


def pytest_configure() -> None:
    """Answer Ctrl-C and a hang-up as in a terminal: under ``nohup`` and in background jobs both arrive ignored.

    What the planner remembers stays out of the user's cache.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="zerofit-tests-")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
