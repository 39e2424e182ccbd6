"""Language modelling: the data, what loss sums mean to people, and the sample that checkpoints carry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..config.schema import Config
from ..data.prepare import is_prepared, prepare
from ..data.tokens import SPLITS, check_data, fingerprint, open_split, vocabulary_size
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
        if config.data.prepare and not is_prepared(config.data.path):
            say(f"Preparing {', '.join(config.data.prepare)} …")
            say(prepare(config.data).describe())

    def decided_by_data(self, config: Config) -> dict[str, object]:
        return {} if config.model.vocab_size is not None else {"vocab_size": vocabulary_size(config.data.path)}

    def check(self, config: Config) -> None:
        check_data(config.data.path, config.model)

    def fingerprint(self, config: Config) -> dict[str, dict[str, Any]]:
        return fingerprint(config.data.path)

    def open(self, config: Config, model: ModelConfig, share: Share, *, pin_memory: bool) -> Feed:
        from ..data.loader import TrainLoader, collate, evaluation_window

        splits = {split: open_split(config.data.path, split, model, config.seed) for split in SPLITS}
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

        vocabulary = model.vocab_size or model.padded_vocab_size
        return collate(torch.randint(0, vocabulary, (samples, model.sequence_length + 1), generator=generator).numpy())

    def metrics(self, sums: Mapping[str, LossSum]) -> dict[str, float]:
        return metrics(sums)

    def closing_words(self, config: Config, model: ModelConfig, predict: Callable[[Tensor], Tensor]) -> str | None:
        from ..data.tokenizers import load_tokenizer
        from .sampling import generate

        tokenizer = load_tokenizer(config.data.path)
        if not config.sample_tokens or tokenizer is None:
            return None
        prompt = tokenizer.encode(config.sample_prompt).tolist()
        tokens = generate(predict, prompt, config.sample_tokens, block_size=model.sequence_length, seed=config.seed)
        return f"Sample:\n{tokenizer.decode(tokens[len(prompt) :])}"


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
