"""Starting processes that do not run the caller's script again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
