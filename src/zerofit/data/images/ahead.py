"""An iterator that works ahead in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


class Ahead(Generic[T]):
    """Yields what `items` yields; up to `depth` of it are made beforehand. Its errors are raised where they are due.

    Args:
        items: closed when this is.
        depth: items made beforehand.
        inside: entered by the thread (a GPU stream).
    """

    def __init__(
        self, items: Iterator[T], depth: int, inside: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self._items, self._inside = items, inside
        self._made: queue.Queue[object] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="zerofit-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self._made.get()
        if item is _END or isinstance(item, BaseException):
            self._made.put(_END)  # for whoever asks again
            raise StopIteration if item is _END else item  # type: ignore[misc]
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread and the iterator; waits for the item under way."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._made.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def _work(self) -> None:
        last: object = _END
        try:
            with self._inside():
                for item in self._items:
                    if not self._put(item):
                        break
        except BaseException as error:  # raised in the thread that reads
            last = error
        finally:
            close = getattr(self._items, "close", None)
            if close is not None:
                close()
            self._put(last)

    def _put(self, item: object) -> bool:
        while not self._closed.is_set():
            try:
                self._made.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False
