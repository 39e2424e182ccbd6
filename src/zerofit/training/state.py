"""What a training run remembers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """What the loop remembers between steps; saved with every checkpoint."""

    step: int = 0
    """Attempted optimizer steps: the data cursor is ``step * global_batch``."""
    best_value: float | None = None
    """The best value so far of what the task calls best (`tasks.base.Best`)."""
    best_step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Newest evaluation."""
    metrics_step: int | None = None
    """Step of the newest evaluation."""
    skips_in_a_row: int = 0
    train_seconds: float = 0.0
    """Time spent on steps, evaluations and saves, this part of the run and those before; the main rank's counts."""
    watched_best: float | None = None
    """Best value of early stopping's metric, negated where larger ones are better."""
    evaluations_without_improvement: int = 0
