"""What a person sees while it trains: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..config.durations import ENDLESS_STEPS
from ..config.schema import Config


class Display(Protocol):
    """Shows steps and messages; the silent one of the other ranks shows nothing."""

    def step(self, step: int, event: dict[str, Any]) -> None:
        """`step` steps are done; `event` is the step's line of ``events.jsonl``."""

    def evaluation(self, step: int, metrics: dict[str, float], improved: bool) -> None:
        """An evaluation after `step` steps."""

    def say(self, message: str) -> None:
        """Print a line that stays."""

    def close(self) -> None:
        """End the live line."""


class SilentDisplay:
    """For all ranks but the main one."""

    def step(self, step: int, event: dict[str, Any]) -> None:
        return

    def evaluation(self, step: int, metrics: dict[str, float], improved: bool) -> None:
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
            self.say(f"step {step}{of_total(self.total_steps)}  {describe_step(event)}")

    def evaluation(self, step: int, metrics: dict[str, float], improved: bool) -> None:
        self.say(describe_evaluation(step, metrics, improved))

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        return


class NanoGPTDisplay(LineDisplay):
    """nanoGPT's lines (karpathy/nanoGPT, train.py), for eyes and scripts that know them. It counts from 0."""

    def step(self, step: int, event: dict[str, Any]) -> None:
        if (step - 1) % self.interval == 0 or step == self.total_steps:
            mfu = event.get("mfu")
            percent = -100.0 if mfu is None else 100 * mfu  # as there: -100% where it is not known
            milliseconds = 1000 * event["step_seconds"]
            self.say(f"iter {step - 1}: loss {event['loss']:.4f}, time {milliseconds:.2f}ms, mfu {percent:.2f}%")

    def evaluation(self, step: int, metrics: dict[str, float], improved: bool) -> None:
        losses = [f"{name.removesuffix('_loss')} loss {value:.4f}" for name, value in metrics.items()
                  if name.endswith("_loss")]  # fmt: skip
        self.say(f"step {step}: {', '.join(losses)}")


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
        known = total_steps if total_steps < ENDLESS_STEPS else None
        self.task = self.progress.add_task("training", total=known, completed=done, figures="")
        self.progress.start()

    def step(self, step: int, event: dict[str, Any]) -> None:
        self.progress.update(self.task, completed=step, figures=describe_step(event))

    def evaluation(self, step: int, metrics: dict[str, float], improved: bool) -> None:
        self.say(describe_evaluation(step, metrics, improved))

    def say(self, message: str) -> None:
        self.progress.console.print(message, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        self.progress.stop()


def open_display(is_main: bool, config: Config, done: int) -> Display:
    """The display that fits this rank, its standard output and ``log_style``."""
    if not is_main:
        return SilentDisplay()
    console = Console()
    if config.log_style == "nanogpt":
        return NanoGPTDisplay(console, config.max_steps, config.log_interval)
    if console.is_terminal:
        return LiveDisplay(console, config.max_steps, done)
    return LineDisplay(console, config.max_steps, config.log_interval)


def of_total(total_steps: int) -> str:
    """``/1000``; nothing where only the clock ends the run."""
    return f"/{total_steps}" if total_steps < ENDLESS_STEPS else ""


def describe_evaluation(step: int, metrics: dict[str, float], improved: bool) -> str:
    """An evaluation in a line."""
    shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    return f"step {step}: {shown}{'  (best so far)' if improved else ''}"


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
