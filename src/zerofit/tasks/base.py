"""What a task owes the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..config.schema import Config
from ..types import Batch, LossSum

if TYPE_CHECKING:
    from torch import Tensor

    from ..config.models import ModelConfig
    from ..data.loader import Share


def metric_name(key: str, metric: str) -> str:
    """``val_loss`` for the key ``val``, ``val_loss_web`` for ``val/web``: `Feed.evaluation`'s keys as metrics."""
    split, _, source = key.partition("/")
    return f"{split}_{metric}_{source}" if source else f"{split}_{metric}"


class Loader(Protocol):
    """A rank's training batches by step: a pure function of the step, so that the step is the data cursor."""

    def window(self, step: int) -> list[Batch]:
        """The accumulation window of `step`: ``accumulation_steps`` batches of ``micro_batch`` samples."""

    def epoch_of_step(self, step: int) -> int:
        """Epoch of the first sample of `step`."""

    def close(self) -> None:
        """Stop what reads ahead."""


@dataclass(frozen=True)
class Feed:
    """All that a rank reads.

    Attributes:
        train: its training batches.
        evaluation: split, or SPLIT/SOURCE -> its batches of an evaluation; equally many on every rank.
        probe: the sample that checkpoints carry with its loss; the same on every rank.
        transform: what the engine does with a batch's inputs on the device before the model sees them (decoding,
            augmentation), ``(inputs, training) -> inputs``; None: nothing.
    """

    train: Loader
    evaluation: Mapping[str, Sequence[Batch]]
    probe: Batch
    transform: Callable[[dict[str, Tensor], bool], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Best:
    """What makes one evaluation better than another: the ``best`` checkpoint follows it."""

    metric: str
    """Of an evaluation, as in ``events.jsonl``: ``val_loss``."""
    highest: bool = False

    def better(self, value: float, than: float | None) -> bool:
        """Whether `value` is better than the best so far (None: there is none)."""
        if math.isnan(value):
            return False
        return than is None or (value > than if self.highest else value < than)


@dataclass(frozen=True)
class Ending:
    """What a finished run offers for last words.

    Attributes:
        predict: the model's output for inputs; collective.
        add: adds up a tensor over the ranks; collective.
        folder: the run's; the main rank may write there.
    """

    config: Config
    model: ModelConfig
    feed: Feed
    predict: Callable[[Mapping[str, Tensor]], Tensor]
    add: Callable[[Tensor], Tensor]
    folder: Path
    is_main: bool


class Task(Protocol):
    """One way to use a model. Importing a task imports no torch; `open`, `random_inputs` and what follows do."""

    items: str
    """What is counted and averaged over, in the plural: ``tokens``."""
    best: Best
    """Which evaluation is the best."""

    def prepare(self, config: Config, say: Callable[[str], None]) -> None:
        """Make the data when it is not there and the configuration says of what.

        Raises:
            DataError: it cannot be made.
        """

    def decided_by_data(self, config: Config) -> dict[str, object]:
        """Settings of the model that are open and that the data decides (the vocabulary); leaf name -> value.

        Raises:
            DataError: there is no data to decide them.
        """

    def check(self, config: Config) -> Sequence[str]:
        """Check the data against the model before anything starts; returns what people should know about it.

        Raises:
            DataError: it does not suit.
        """

    def fingerprint(self, config: Config) -> dict[str, dict[str, Any]]:
        """Split -> what tells other data; compared when a run is resumed."""

    def epoch_samples(self, config: Config) -> int:
        """Training samples of one epoch.

        Raises:
            DataError: there is no data.
        """

    def facts(self, config: Config) -> dict[str, Any]:
        """What travels with a checkpoint so that its model can be used without the data (the names of the classes);
        JSON-ready."""

    def open(self, config: Config, model: ModelConfig, share: Share, *, pin_memory: bool) -> Feed:
        """Open the data for one rank."""

    def batch_of(self, inputs: Mapping[str, Tensor]) -> Batch:
        """A batch of stored inputs, with its weight counted."""

    def random_batch(self, model: ModelConfig, samples: int, generator: Any) -> Batch:
        """A training batch of random inputs, for measurements. `generator` is a CPU ``torch.Generator``."""

    def metrics(self, sums: Mapping[str, LossSum]) -> dict[str, float]:
        """What an evaluation's loss sums mean to people; ``loss`` among them."""

    def words(self, config: Config, model: ModelConfig, predict: Callable[[Tensor], Tensor]) -> str | None:
        """What a run shows of its model at the end and every ``sample_interval`` steps (a text that it writes), or
        None. Collective where `predict` is: every rank calls it equally often, whatever comes of it."""

    def finish(self, ending: Ending) -> str | None:
        """What a finished run says of its model at last, and may leave in its folder. Collective."""
