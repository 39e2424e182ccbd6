"""Language modelling: the data, what loss sums mean to people, and the sample that checkpoints carry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..config.models import LanguageModelShape, ModelShape
from ..config.schema import Config, DataConfig
from ..types import Batch, LossSum
from .base import Best, Ending, Feed

if TYPE_CHECKING:
    from torch import Tensor

    from ..config.models import ModelConfig
    from ..data.loader import Share

#: Tokens of the sample that a checkpoint carries: enough to tell other weights by its loss, and cheap.
PROBE_TOKENS = 64


class LanguageModeling:
    """Predict each next token. See `zerofit.tasks.base.Task`.

    Data is imported where it is touched: it needs NumPy, which a plan does without.
    """

    items = "tokens"
    best = Best("val_loss")

    def prepare(self, config: Config, say: Callable[[str], None]) -> None:
        from ..data.run_data import prepare_all

        prepare_all(config, say, Console(stderr=True))

    def decided_by_data(self, config: Config) -> dict[str, object]:
        if language_model(config.model).vocab_size is not None:
            return {}
        from ..data.run_data import vocabulary_of

        return {"vocab_size": vocabulary_of(config)}

    def check(self, config: Config) -> Sequence[str]:
        from ..data.run_data import check_all

        return check_all(config)

    def epoch_samples(self, config: Config) -> int:
        from ..data.run_data import open_data

        return open_data(tokens_of(config), "train", language_model(config.model), config.seed).samples

    def facts(self, config: Config) -> dict[str, Any]:
        return {}

    def fingerprint(self, config: Config) -> dict[str, dict[str, Any]]:
        from ..data.run_data import fingerprints

        return fingerprints(config)

    def open(self, config: Config, model: ModelConfig, share: Share, *, pin_memory: bool) -> Feed:
        from ..data.loader import TrainLoader, collate, evaluation_window
        from ..data.run_data import all_data, open_evaluation, open_training

        shape = language_model(model)
        train = open_training(config, shape, share.global_batch)
        splits = open_evaluation(all_data(config), shape, config.seed)
        probe = collate(splits["val"].window(splits["val"].spread_starts(1)))
        return Feed(
            TrainLoader(train, share, pin_memory),
            {name: list(evaluation_window(split, share, config.eval_batches)) for name, split in splits.items()},
            probe_of(probe.inputs),
        )

    def batch_of(self, inputs: Mapping[str, Tensor]) -> Batch:
        return batch_of(inputs)

    def random_batch(self, model: ModelConfig, samples: int, generator: Any) -> Batch:
        import torch

        from ..data.loader import collate

        shape = language_model(model)
        vocabulary = shape.vocab_size or shape.padded_vocab_size
        return collate(torch.randint(0, vocabulary, (samples, shape.sequence_length + 1), generator=generator).numpy())

    def metrics(self, sums: Mapping[str, LossSum]) -> dict[str, float]:
        return metrics(sums)

    def words(self, config: Config, model: ModelConfig, predict: Callable[[Tensor], Tensor]) -> str | None:
        from ..data.run_data import first_folder
        from ..data.tokenizers import load_tokenizer
        from .sampling import generate

        tokenizer = load_tokenizer(first_folder(tokens_of(config)))
        if not config.sample_tokens or tokenizer is None:
            return None
        prompt = tokenizer.encode(config.sample_prompt).tolist()
        length = language_model(model).sequence_length
        tokens = generate(predict, prompt, config.sample_tokens, block_size=length, seed=config.seed)
        return tokenizer.decode(tokens[len(prompt) :])

    def finish(self, ending: Ending) -> str | None:
        return None


TASK = LanguageModeling()


def language_model(model: ModelShape) -> LanguageModelShape:
    """The shape of a model of this task."""
    assert isinstance(model, LanguageModelShape)  # `tasks.task_of` has chosen this task by the model
    return model


def tokens_of(config: Config) -> DataConfig:
    """The data of a configuration of this task."""
    assert isinstance(config.data, DataConfig)  # `Config` refuses other data
    return config.data


def metrics(sums: Mapping[str, LossSum]) -> dict[str, float]:
    """``loss`` in nats per token, and ``perplexity``, its exponential."""
    loss = sums["loss"].mean
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def batch_of(inputs: Mapping[str, Tensor]) -> Batch:
    """A batch of tokens and targets (B, T) int64, with its trained tokens counted."""
    return Batch(inputs, int((inputs["targets"] >= 0).sum()))


def probe_of(inputs: Mapping[str, Tensor]) -> Batch:
    """The first tokens of a batch's first sample."""
    return batch_of({name: tensor[:1, :PROBE_TOKENS].contiguous() for name, tensor in inputs.items()})
