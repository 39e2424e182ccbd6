"""What a person sees while it trains: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display(Protocol):
    """Shows steps and messages; the silent one of the other ranks shows nothing."""

    def step(self, step: int, event: dict[str, Any]) -> None:
        """`step` steps are done; `event` is the step's line of ``events.jsonl``."""

    def say(self, message: str) -> None:
        """Print a line that stays."""

    def close(self) -> None:
        """End the live line."""


class SilentDisplay:
    """For all ranks but the main one."""

    def step(self, step: int, event: dict[str, Any]) -> None:
        return

    def say(self, message: str) -> None:
        return

    def close(self) -> None:
        return


class LineDisplay:
    """For logs and pipes: a line every `interval` steps."""

    def __init__(self, console: Console, total_steps: int, interval: int) -> None:
        self.console, self.total_steps, self.interval = console, total_steps, interval

    def step(self, step: int, event: dict[str, Any]) -> None:
        if step % self.interval == 0 or step == self.total_steps:
            self.say(f"step {step}/{self.total_steps}  {describe_step(event)}")

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        return


class LiveDisplay:
    """For terminals: a progress bar with the last step's figures."""

    def __init__(self, console: Console, total_steps: int, done: int) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self.task = self.progress.add_task("training", total=total_steps, completed=done, figures="")
        self.progress.start()

    def step(self, step: int, event: dict[str, Any]) -> None:
        self.progress.update(self.task, completed=step, figures=describe_step(event))

    def say(self, message: str) -> None:
        self.progress.console.print(message, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        self.progress.stop()


def open_display(is_main: bool, total_steps: int, done: int, interval: int) -> Display:
    """The display that fits this rank and its standard output."""
    if not is_main:
        return SilentDisplay()
    console = Console()
    if console.is_terminal:
        return LiveDisplay(console, total_steps, done)
    return LineDisplay(console, total_steps, interval)


def describe_step(event: dict[str, Any]) -> str:
    """One step in a few words."""
    parts = [f"loss {event['loss']:.4f}", f"lr {event['learning_rate']:.2e}"]
    if event.get("images_per_second"):
        parts = [f"epoch {event['epoch'] + 1}", *parts, f"{event['images_per_second']:,.0f} images/s"]
        accuracy = event.get("metrics", {}).get("val_accuracy")
        parts += [] if accuracy is None else [f"val accuracy {accuracy:.1%}"]
    if event.get("tokens_per_second"):
        parts.append(f"{event['tokens_per_second']:,.0f} tok/s")
    if event.get("mfu"):
        parts.append(f"mfu {event['mfu']:.1%}")
    if event["skipped"]:
        parts.append("skipped: gradient not finite")
    return "  ".join(parts)
