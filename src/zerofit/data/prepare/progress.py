"""How far a preparation is: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .pieces import Tally

LINE_SECONDS = 60.0


class Meter:
    """Shows a `Tally`. Does nothing without a console."""

    def __init__(self, console: Console | None, bar: Progress | None, total_bytes: int | None) -> None:
        self.console, self.bar, self.total_bytes = console, bar, total_bytes
        self._task: TaskID | None = None
        self._began = self._told = time.monotonic()
        self._rate_from = (self._began, 0)

    def phase(self, what: str) -> None:
        """A new pass over the text begins."""
        self._began = self._told = time.monotonic()
        self._rate_from = (self._began, 0)
        if self.bar is not None:
            if self._task is not None:
                self.bar.remove_task(self._task)
            self._task = self.bar.add_task(what, total=self.total_bytes, speed="")

    def count_from(self, characters: int) -> None:
        """Speed is counted from here: what was done in an earlier try does not make this one fast."""
        self._rate_from = (time.monotonic(), characters)

    def show(self, tally: Tally, tokens: int) -> None:
        """Where it is now."""
        now = time.monotonic()
        since, characters = self._rate_from
        rate = (tally.characters - characters) / max(now - since, 1e-9) / 1e6
        text = f"{tally.characters / 1e6:,.0f} MB of text, {tokens / 1e6:,.1f} M tokens, {rate:.1f} MB/s"
        if self.bar is not None and self._task is not None:
            completed = tally.read_bytes if self.total_bytes else None
            self.bar.update(self._task, completed=completed, speed=text)
        elif self.console is not None and now - self._told > LINE_SECONDS:
            self.console.print(text, highlight=False)
            self._told = now


@contextmanager
def meter(console: Console | None, total_bytes: int | None) -> Iterator[Meter]:
    """A meter on `console`; its bar disappears at the end."""
    if console is None or not console.is_terminal:
        yield Meter(console, None, total_bytes)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield Meter(console, bar, total_bytes)
