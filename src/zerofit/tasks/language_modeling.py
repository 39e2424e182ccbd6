"""Language modelling: the data, what loss sums mean to people, and the sample that checkpoints carry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..config.models import LanguageModelShape, ModelShape
from ..config.schema import Config, DataConfig
from ..data.prepare import is_prepared, prepare
from ..data.tokens import SPLITS, check_data, fingerprint, open_split, vocabulary_size
from ..types import Batch, LossSum
from .base import Best, Ending, Feed

if TYPE_CHECKING:
    from torch import Tensor

    from ..config.models import ModelConfig
    from ..data.loader import Share

#: Tokens of the sample that a checkpoint carries: enough to tell other weights by its loss, and cheap.
PROBE_TOKENS = 64


class LanguageModeling:
    """Predict each next token. See `zerofit.tasks.base.Task`."""

    items = "tokens"
    best = Best("val_loss")

    def prepare(self, config: Config, say: Callable[[str], None]) -> None:
        data = tokens_of(config)
        if data.prepare and not is_prepared(data.path):
            say(f"Preparing {', '.join(data.prepare)} …")
            say(prepare(data).describe())

    def decided_by_data(self, config: Config) -> dict[str, object]:
        known = language_model(config.model).vocab_size is not None
        return {} if known else {"vocab_size": vocabulary_size(config.data.path)}

    def check(self, config: Config) -> None:
        check_data(config.data.path, language_model(config.model))

    def epoch_samples(self, config: Config) -> int:
        return open_split(config.data.path, "train", language_model(config.model), config.seed).samples

    def facts(self, config: Config) -> dict[str, Any]:
        return {}

    def fingerprint(self, config: Config) -> dict[str, dict[str, Any]]:
        return fingerprint(config.data.path)

    def open(self, config: Config, model: ModelConfig, share: Share, *, pin_memory: bool) -> Feed:
        from ..data.loader import TrainLoader, collate, evaluation_window

        shape = language_model(model)
        splits = {split: open_split(config.data.path, split, shape, config.seed) for split in SPLITS}
        probe = collate(splits["val"].window(splits["val"].spread_starts(1)))
        return Feed(
            TrainLoader(splits["train"], share, pin_memory),
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

    def closing_words(self, ending: Ending) -> str | None:
        from ..data.tokenizers import load_tokenizer
        from .sampling import generate

        config, length = ending.config, language_model(ending.model).sequence_length
        tokenizer = load_tokenizer(config.data.path)
        if not config.sample_tokens or tokenizer is None:
            return None
        prompt = tokenizer.encode(config.sample_prompt).tolist()

        def predict(tokens: Tensor) -> Tensor:
            return ending.predict({"tokens": tokens})

        tokens = generate(predict, prompt, config.sample_tokens, block_size=length, seed=config.seed)
        return f"Sample:\n{tokenizer.decode(tokens[len(prompt) :])}"


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
