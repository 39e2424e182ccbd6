"""Language modelling: what loss sums mean to people."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..types import LossSum


def metrics(sums: Mapping[str, LossSum]) -> dict[str, float]:
    """``loss`` in nats per token, and ``perplexity``, its exponential."""
    loss = sums["loss"].mean
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
