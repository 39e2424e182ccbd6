"""Starting processes that do not run the caller's script again, and that end with their caller."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from types import ModuleType


@contextmanager
def without_main() -> Iterator[None]:
    """Inside, multiprocessing starts processes without the caller's ``__main__``: else it runs that again in each of
    them, guard or no guard, or imports it and all that it imports (torch, for a rank)."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def end_with_parent() -> None:
    """Called in a process: it ends when the one that started it has died, killed perhaps. A pool's worker holds both
    ends of the queue that it waits at, so that nothing there would tell it."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
