"""The learning rate: a pure function of the step, so that a resumed run cannot get it wrong."""

from __future__ import annotations

import math

from ..config.schema import Config, ScheduleConfig
from ..config.stages import span_at

#: ``one_cycle`` starts at this share of the peak, and rises over this share of the steps (torch's OneCycleLR).
ONE_CYCLE_START, ONE_CYCLE_RISE = 1 / 25, 0.3
#: ``wsd`` cools down over this share of the steps.
COOLDOWN = 0.2


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of attempted step `step` (from 0).

    Linear warm-up that reaches the peak after the warm-up's steps; then, with x the share of the way from there to
    ``decay_steps`` (unset: ``max_steps``), the minimum plus the rest of the peak times

    * ``cosine``: (1 + cos(pi x)) / 2 (Loshchilov & Hutter 2017); ``linear``: 1 - x; ``polynomial``: (1 - x) ** power;
    * ``wsd``: 1, and over the last ``cooldown_fraction`` 1 - sqrt of the cooldown's share (Haegele et al. 2024,
      "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", section 3);
    * ``one_cycle``: as cosine, after a rise by half a cosine from a 25th of the peak (Smith & Topin 2018);

    and the minimum from there on. ``constant`` stays at the peak. A stage may have a peak of its own, and a schedule
    that counts from its start.
    """
    span = span_at(config, step)
    schedule, peak, step = span.schedule, span.learning_rate, step - span.schedule_start
    end = schedule.decay_steps or span.schedule_steps
    warmup = _warmup_steps(schedule, end)
    if step < warmup:
        return peak * _rise(schedule, step, warmup)
    if schedule.kind == "constant":
        return peak
    floor = schedule.min_learning_rate if schedule.min_ratio is None else schedule.min_ratio * peak
    progress = min((step - warmup) / max(end - warmup, 1), 1.0)
    return floor + (peak - floor) * _fall(schedule, step, end, progress)


def _warmup_steps(schedule: ScheduleConfig, end: int) -> int:
    fraction = schedule.warmup_fraction
    if fraction is None and schedule.kind == "one_cycle" and not schedule.warmup_steps:
        fraction = ONE_CYCLE_RISE
    return schedule.warmup_steps if fraction is None else round(fraction * end)


def _rise(schedule: ScheduleConfig, step: int, warmup: int) -> float:
    """Share of the peak during the warm-up."""
    if schedule.kind == "one_cycle":
        return ONE_CYCLE_START + (1 - ONE_CYCLE_START) * 0.5 * (1 - math.cos(math.pi * step / warmup))
    return (step + 1) / warmup


def _fall(schedule: ScheduleConfig, step: int, end: int, progress: float) -> float:
    """Share of what lies between minimum and peak, after the warm-up."""
    if schedule.kind == "linear":
        return 1 - progress
    if schedule.kind == "polynomial":
        return float((1 - progress) ** (schedule.power or 2.0))
    if schedule.kind == "wsd":
        cooldown = max(round((schedule.cooldown_fraction or COOLDOWN) * end), 1)
        return 1 - math.sqrt(min(max(step - (end - cooldown), 0) / cooldown, 1.0))
    return 0.5 * (1 + math.cos(math.pi * progress))
