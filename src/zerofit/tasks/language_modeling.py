"""Language modelling: what loss sums mean to people, and the sample that checkpoints carry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..types import Batch, LossSum

if TYPE_CHECKING:
    from torch import Tensor

#: Tokens of the sample that a checkpoint carries: enough to tell other weights by its loss, and cheap.
PROBE_TOKENS = 64


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
