"""A run's stages as facts: which one is in force at a step, and what it changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from .schema import Config, DataConfig, ScheduleConfig

#: Names of checkpoints that training gives itself.
TAKEN = ("latest", "best", "final")


@dataclass(frozen=True)
class Span:
    """The steps `start` to `stop` (exclusive) of a run, and what holds there.

    Attributes:
        name: of the stage and of the checkpoint that it ends in; empty for a run without stages.
        learning_rate: peak.
        schedule_start: step from which the schedule counts.
        schedule_steps: steps over which it decays, unless it says so itself.
    """

    name: str
    start: int
    stop: int
    data: DataConfig
    learning_rate: float
    schedule: ScheduleConfig
    schedule_start: int
    schedule_steps: int


def spans(config: Config) -> list[Span]:
    """The stages in order; one span for a run without stages."""
    peak, schedule, last = config.optimizer.learning_rate, config.schedule, config.max_steps
    # Of pictures no stage has data of its own, and nobody looks at this.
    own = cast("DataConfig", config.data)
    if not config.stages:
        return [Span("", 0, last, own, peak, schedule, 0, last)]
    found, start = [], 0
    for number, stage in enumerate(config.stages, start=1):
        # The last one goes to the end of the run, also of one that is made longer when it is resumed.
        stop = last if number == len(config.stages) else stage.until or last
        name, data = stage.name or f"stage-{number}", stage.data or own
        rate = stage.learning_rate or peak
        counted = (stage.schedule, start, stop - start) if stage.schedule else (schedule, 0, last)
        found.append(Span(name, start, stop, data, rate, *counted))
        start = stop
    return found


def span_at(config: Config, step: int) -> Span:
    """The stage that attempted step `step` (from 0) belongs to."""
    found = spans(config)
    return next((span for span in found if step < span.stop), found[-1])


def stage_ending_at(config: Config, done: int) -> str | None:
    """Name of the stage that ends after `done` steps; None when none does."""
    return next((span.name for span in spans(config) if span.name and span.stop == done), None)


def check_stages(config: Config) -> None:
    """Refuse stages that do not follow one another up to the end of the run.

    Raises:
        ValueError: ends that do not increase, another end than the run's, or a name twice.
    """
    before = 0
    for number, stage in enumerate(config.stages, start=1):
        is_last = number == len(config.stages)
        if stage.until is None and not is_last:
            raise ValueError(
                f"stages: number {number} says not until when, and another one follows; give it `until: STEP` (only "
                f"the last stage ends with the run)"
            )
        until = stage.until or config.max_steps
        if until <= before:
            raise ValueError(
                f"stages: number {number} ends at step {until}, and the one before at {before}; each `until` counts "
                f"from the start of the run and must be larger than the one before"
            )
        if until > config.max_steps or (is_last and until < config.max_steps):
            raise ValueError(
                f"stages: number {number} ends at step {until}, and max_steps is {config.max_steps}; the last stage "
                f"ends with the run: leave its `until` out, or set max_steps {until}"
            )
        before = until
    names = [span.name for span in spans(config) if span.name]
    for name in names:
        if names.count(name) > 1 or name.lower() in TAKEN or name.lower().startswith("step-"):
            raise ValueError(
                f"stages: the name {name} is taken; names must differ, and latest, best, final and step-… are "
                f"training's own"
            )


def describe_stages(config: Config) -> Iterator[str]:
    """A line for each stage, for the plan."""
    for span in spans(config) if config.stages else ():
        own = " of its own" if span.schedule is not config.schedule else ""
        yield (
            f"Stage {span.name}: steps {span.start + 1:,} to {span.stop:,}, {describe_data(span.data)}, peak learning "
            f"rate {span.learning_rate:g}, schedule {span.schedule.kind}{own}."
        )


def describe_data(data: DataConfig) -> str:
    """``data/x``, or ``30% a + 70% b``."""
    total = sum(source.weight for source in data.sources.values())
    parts = [f"{source.weight / total:.1%} {name}" for name, source in data.sources.items()]
    return " + ".join(parts) if parts else str(data.path)
