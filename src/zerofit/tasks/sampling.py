"""Sampling tokens from a language model, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    predict: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    new_tokens: int,
    *,
    block_size: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 1337,
) -> list[int]:
    """The prompt continued by `new_tokens` tokens.

    Args:
        predict: (1, T) int64 tokens on the CPU -> logits (1, T, V). Collective where the model is sharded: every rank
            calls this function with the same arguments and draws the same tokens.
        prompt: token ids, at least one.
        new_tokens: how many tokens to add.
        block_size: the model sees this many last tokens.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among this many most likely tokens; None: all.
        seed: of the draws, which use a generator of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(new_tokens):
        logits = predict(torch.tensor([tokens[-block_size:]]))[0, -1].float().cpu()
        tokens.append(_draw(logits, temperature, top_k, generator))
    return tokens


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None:
        smallest_kept = logits.topk(min(top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
