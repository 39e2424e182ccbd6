"""What every test may rely on."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

#: Triton's kernels run under its interpreter where there is no NVIDIA GPU; it reads this when it is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

#: What zerofit keeps for its user: tests neither read nor write it. One folder for all, so that a trace is made once.
USER_FOLDERS = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")


def pytest_configure(config: pytest.Config) -> None:
    """Answer Ctrl-C and a hang-up as in a terminal: under ``nohup`` and in background jobs both arrive ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    scratch = tempfile.TemporaryDirectory(prefix="zerofit-tests-")
    config.add_cleanup(scratch.cleanup)
    for name in USER_FOLDERS:
        os.environ[name] = scratch.name
