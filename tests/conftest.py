"""What every test may rely on."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Answer Ctrl-C and a hang-up as in a terminal: under ``nohup`` and in background jobs both arrive ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
