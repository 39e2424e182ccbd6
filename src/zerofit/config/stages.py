"""A run's stages as facts: which one is in force at a step, and what it changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from .durations import ENDLESS_STEPS

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


def stage_ending_at(config: Config, done: int, last_step: int | None = None) -> str | None:
    """Name of the stage that ends after `done` steps; None when none does.

    Args:
        last_step: where the run ends, and with it the stage that is in force then: the clock and early stopping may end
            it before ``max_steps``, in any stage.
    """
    if done and done == last_step:
        return span_at(config, done - 1).name or None
    return next((span.name for span in spans(config) if span.name and span.stop == done), None)


def schedules_to_the_end(config: Config) -> list[ScheduleConfig]:
    """The schedules in use that count to the end of the run: the run's own, and the last stage's."""
    own = [stage.schedule for stage in config.stages]
    found = [config.schedule] if not own or None in own else []
    if own and own[-1] is not None and config.stages[-1].until is None:
        found.append(own[-1])
    return found


def check_stages(config: Config) -> None:
    """Refuse stages that do not follow one another up to the end of the run, where that is known.

    Raises:
        ValueError: ends that do not increase, another end than the run's, or a name twice.
    """
    before = 0
    for number, stage in enumerate(config.stages, start=1):
        if stage.until is None and number < len(config.stages):
            raise ValueError(
                f"stages: number {number} says not until when, and another one follows; give it `until: STEP` (only "
                f"the last stage ends with the run)"
            )
        if stage.until is not None and stage.until <= before:
            raise ValueError(_not_after(number, stage.until, before))
        before = stage.until or before
    if config.duration is None:
        check_last_stage(config)
    names = [span.name for span in spans(config) if span.name]
    for name in names:
        if names.count(name) > 1 or name.lower() in TAKEN or name.lower().startswith("step-"):
            raise ValueError(
                f"stages: the name {name} is taken; names must differ, and latest, best, final and step-… are "
                f"training's own"
            )


def check_last_stage(config: Config) -> None:
    """Refuse stages that go on behind ``max_steps``, or end before it. A duration decides ``max_steps`` only when the
    batch and the data are known.

    Raises:
        ValueError: they do.
    """
    end, before = config.max_steps, 0
    words = f"max_steps is {end}" if config.duration is None else f"the duration {config.duration} comes to {end} steps"
    if end >= ENDLESS_STEPS:
        words = f"after the duration {config.duration} nobody knows beforehand which step is the last"
    for number, stage in enumerate(config.stages, start=1):
        is_last, until = number == len(config.stages), stage.until or end
        if until > end or (is_last and until < end):
            remedy = "or set max_steps {until}" if config.duration is None else "or change the duration"
            raise ValueError(
                f"stages: number {number} ends at step {until}, and {words}; the last stage ends with the run: leave "
                f"its `until` out, {remedy.format(until=until)}"
            )
        if until <= before:
            raise ValueError(_not_after(number, until, before))
        before = until


def _not_after(number: int, until: int, before: int) -> str:
    return (
        f"stages: number {number} ends at step {until}, and the one before at {before}; each `until` counts from the "
        f"start of the run and must be larger than the one before"
    )


def describe_stages(config: Config) -> Iterator[str]:
    """A line for each stage, for the plan."""
    for span in spans(config) if config.stages else ():
        own = " of its own" if span.schedule is not config.schedule else ""
        end = f"to {span.stop:,}" if has_last_step(span) else "on, to the end of the run"
        yield (
            f"Stage {span.name}: step{'s' * has_last_step(span)} {span.start + 1:,} {end}, {describe_data(span.data)}, "
            f"peak learning rate {span.learning_rate:g}, schedule {span.schedule.kind}{own}."
        )


def has_last_step(span: Span) -> bool:
    """False for the last stage of a run that only the clock ends."""
    return span.stop < ENDLESS_STEPS


def describe_data(data: DataConfig) -> str:
    """``data/x``, or ``30% a + 70% b``."""
    total = sum(source.weight for source in data.sources.values())
    parts = [f"{source.weight / total:.1%} {name}" for name, source in data.sources.items()]
    return " + ".join(parts) if parts else str(data.path)
