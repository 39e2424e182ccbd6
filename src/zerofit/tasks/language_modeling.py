"""Language modelling: the data, what loss sums mean to people, and the sample that checkpoints carry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..config.schema import Config
from ..data.run_data import (
    all_data,
    check_all,
    fingerprints,
    first_folder,
    open_data,
    open_evaluation,
    open_training,
    prepare_all,
    vocabulary_of,
)
from ..types import Batch, LossSum
from .base import Feed

if TYPE_CHECKING:
    from torch import Tensor

    from ..config.models import ModelConfig
    from ..data.loader import Share

#: Tokens of the sample that a checkpoint carries: enough to tell other weights by its loss, and cheap.
PROBE_TOKENS = 64


class LanguageModeling:
    """Predict each next token. See `zerofit.tasks.base.Task`."""

    items = "tokens"

    def prepare(self, config: Config, say: Callable[[str], None]) -> None:
        prepare_all(config, say, Console(stderr=True))

    def decided_by_data(self, config: Config) -> dict[str, object]:
        return {} if config.model.vocab_size is not None else {"vocab_size": vocabulary_of(config)}

    def check(self, config: Config) -> Sequence[str]:
        return check_all(config)

    def epoch_samples(self, config: Config) -> int:
        return open_data(config.data, "train", config.model, config.seed).samples

    def fingerprint(self, config: Config) -> dict[str, dict[str, Any]]:
        return fingerprints(config)

    def open(self, config: Config, model: ModelConfig, share: Share, *, pin_memory: bool) -> Feed:
        from ..data.loader import TrainLoader, collate, evaluation_window

        train = open_training(config, model, share.global_batch)
        splits = open_evaluation(all_data(config), model, config.seed)
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

        vocabulary = model.vocab_size or model.padded_vocab_size
        return collate(torch.randint(0, vocabulary, (samples, model.sequence_length + 1), generator=generator).numpy())

    def metrics(self, sums: Mapping[str, LossSum]) -> dict[str, float]:
        return metrics(sums)

    def words(self, config: Config, model: ModelConfig, predict: Callable[[Tensor], Tensor]) -> str | None:
        from ..data.tokenizers import load_tokenizer
        from .sampling import generate

        tokenizer = load_tokenizer(first_folder(config.data))
        if not config.sample_tokens or tokenizer is None:
            return None
        prompt = tokenizer.encode(config.sample_prompt).tolist()
        tokens = generate(predict, prompt, config.sample_tokens, block_size=model.sequence_length, seed=config.seed)
        return tokenizer.decode(tokens[len(prompt) :])


TASK = LanguageModeling()


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
