"""The learning rate: a pure function of the step, so that a resumed run cannot get it wrong."""

from __future__ import annotations

import math

from ..config.schema import Config
from ..config.stages import span_at


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of attempted step `step` (from 0).

    Linear warm-up that reaches the peak after ``warmup_steps``; then a half cosine down to ``min_learning_rate`` at
    ``decay_steps`` (Loshchilov & Hutter 2017), or the constant peak; the minimum from there on. A stage may have a peak
    of its own, and a schedule that counts from its start.
    """
    span = span_at(config, step)
    schedule, peak, step = span.schedule, span.learning_rate, step - span.schedule_start
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    end = schedule.decay_steps or span.schedule_steps
    progress = (step - schedule.warmup_steps) / max(end - schedule.warmup_steps, 1)
    floor = schedule.min_learning_rate
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
