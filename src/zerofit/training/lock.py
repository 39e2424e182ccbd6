"""One training at a time in a run folder."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

from ..errors import ConfigError

LOCK = "lock"


class RunLock:
    """Held from `acquire_run` until the last process that inherited it has ended.

    The lock is the kernel's (``flock``) and belongs to the open file: ranks inherit it, so that ranks which outlive
    the command that started them still hold it, and a kill of any kind releases it.
    """

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def give_up(self, folder: Path) -> None:
        """Release it before anything was started; a folder that holds nothing else goes again."""
        with contextlib.suppress(OSError):
            if {path.name for path in folder.iterdir()} == {LOCK}:
                (folder / LOCK).unlink()  # while it is held: nobody else's goes
                folder.rmdir()
        with contextlib.suppress(OSError):
            os.close(self.handle)


def acquire_run(folder: Path) -> RunLock:
    """Take the run's lock, or say who has it.

    Raises:
        ConfigError: another process is training in this folder, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"The run folder {folder} cannot be written to ({error.strerror}). Choose another runs_dir, or mend its "
            f"permissions."
        ) from error
    try:
        _lock(handle)
    except OSError as error:
        holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
        os.close(handle)
        raise ConfigError(
            f"The run {folder} is being trained by {holder}, and one run is trained by one command at a time. Wait for "
            f"it, stop it, or choose another --name."
        ) from error
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return RunLock(handle)


def _lock(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 1000, os.SEEK_SET)  # beyond the text that says who holds it
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
