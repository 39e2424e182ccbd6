"""One preparation of a folder at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import DataError


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Refuse to prepare a folder that another process is preparing.

    Raises:
        DataError: another one is.
    """
    try:
        import fcntl
    except ImportError:  # Windows: a file that is open there cannot be removed by another one anyway
        yield
        return
    lock = folder.with_name(f".{folder.name}.lock")
    try:
        if not lock.parent.exists():
            lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written to ({error}). Mend its permissions, or choose another folder with --out "
            f"(data.path)."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"{folder} is being prepared by another process. Wait for it, or prepare into another folder (--out)."
            ) from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
