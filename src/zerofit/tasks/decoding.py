"""How one token is drawn from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decoding:
    """The rules, applied in this order.

    Attributes:
        repetition_penalty: logits of tokens that stand in the text already are divided by this where positive, and
            multiplied where negative (Keskar et al. 2019, CTRL, section 4.1); 1 does nothing.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among this many most likely tokens; None: all.
        top_p: draw among the most likely tokens that together have this probability (Holtzman et al. 2020); 1: all.
        min_p: leave out tokens less likely than this share of the likeliest (Nguyen et al. 2024); 0: none.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def draw(logits: Tensor, seen: Sequence[int], rules: Decoding, generator: torch.Generator) -> int:
    """One token.

    Args:
        logits: (V,) fp32 on the CPU.
        seen: the text's tokens, for the repetition penalty.
        rules: see `Decoding`.
        generator: of this text alone, so that it does not depend on the texts beside it.
    """
    logits = _penalised(logits, seen, rules.repetition_penalty)
    if rules.temperature == 0:
        return int(logits.argmax())
    logits = logits / rules.temperature
    if rules.top_k is not None:
        smallest_kept = logits.topk(min(rules.top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    probabilities = logits.softmax(-1)
    if rules.top_p < 1:
        probabilities = _nucleus(probabilities, rules.top_p)
    if rules.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < rules.min_p * probabilities.max(), 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))  # it normalises


def _penalised(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    if penalty == 1 or not seen:
        return logits
    tokens = torch.tensor(sorted(set(seen)))
    found = logits[tokens]
    return logits.index_copy(0, tokens, torch.where(found > 0, found / penalty, found * penalty))


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero outside the smallest set of likeliest tokens that reaches `top_p`; the likeliest always stays."""
    ordered, index = probabilities.sort(descending=True)
    outside = ordered.cumsum(0) - ordered >= top_p
    return probabilities.index_fill(0, index[outside], 0.0)
