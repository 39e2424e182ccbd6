"""Evaluation: the same samples in every evaluation and for every number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..engines.base import Engine
from ..tasks.base import Task, metric_name
from ..types import Batch


class Evaluator:
    """Losses of the train and validation splits over fixed samples.

    Args:
        task: tells what loss sums mean.
        windows: split name -> this rank's batches; equally many on every rank.
    """

    def __init__(self, task: Task, windows: Mapping[str, Sequence[Batch]]) -> None:
        self.task, self.windows = task, windows

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """``train_loss``, ``val_loss``, ``val_perplexity`` …: means over all ranks' valid items. Collective.

        Uses no randomness and moves no data cursor: a run with evaluation trains the same losses as one without.
        """
        found: dict[str, float] = {}
        pending = {split: engine.eval_step(window) for split, window in self.windows.items()}
        for split, sums in pending.items():
            for name, value in self.task.metrics(sums.read()).items():
                found[metric_name(split, name)] = value
        return found
