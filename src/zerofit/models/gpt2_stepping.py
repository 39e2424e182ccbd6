"""GPT-2 with a cache of keys and values.

Shape legend: B rows, T new tokens, S cached tokens, H heads, D width of a head, C width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .gpt2 import GPT2, Attention, Block

#: The cache grows by this many tokens at a time.
_CHUNK = 256


@dataclass
class Cache:
    """Keys and values of every block: (B, H, capacity, D), of which the first `length` columns are filled.

    Attributes:
        padding: (B,) leading columns of each row that are no tokens; None: no row has any.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0
    padding: Tensor | None = None


class GPT2Stepper:
    """See `stepping.Stepper`. Positions are learned and absolute, so a state holds ``block_size`` tokens at most."""

    def __init__(self, model: GPT2) -> None:
        self.model, self.weight = model, model.wte.weight

    @property
    def context_length(self) -> int | None:
        return self.model.config.block_size

    def initial_state(self, batch: int) -> Cache:
        config = self.model.config
        empty = self.weight.new_empty(batch, config.n_head, 0, config.n_embd // config.n_head)
        return Cache([empty] * config.n_layer, [empty] * config.n_layer)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: Cache, padding: Tensor | None = None) -> tuple[Tensor, Cache]:
        start, end = state.length, state.length + tokens.shape[1]
        if padding is not None and bool(padding.any()):
            state.padding = padding
        columns = torch.arange(start, end, device=tokens.device)
        positions = columns if state.padding is None else (columns - state.padding[:, None]).clamp(min=0)
        mask = None if state.padding is None else _mask(state.padding, columns, end)
        x = self.model.wte(tokens) + self.model.wpe(positions)
        _grow(state, end, self.model.config.block_size)
        for index, block in enumerate(self.model.h):
            assert isinstance(block, Block)
            x = x + _attend(block.attn, block.ln_1(x), state.keys[index], state.values[index], start, mask)
            x = x + block.mlp(block.ln_2(x))
        state.length = end
        logits: Tensor = self.model.head(self.model.ln_f(x[:, -1:]))
        return logits[:, 0], state


def _mask(padding: Tensor, columns: Tensor, end: int) -> Tensor:
    """(B, 1, T, S), true where a token may look: backwards, past the padding. Padding looks at itself, for a softmax
    over nothing is not a number and would spread."""
    every = torch.arange(end, device=padding.device)
    backwards = every <= columns[:, None]
    itself = every == columns[:, None]
    return ((backwards & (every >= padding[:, None, None])) | itself)[:, None]


def _attend(attention: Attention, x: Tensor, keys: Tensor, values: Tensor, start: int, mask: Tensor | None) -> Tensor:
    """(B, T, C) -> (B, T, C); writes the new keys and values into the cache."""
    b, t, c = x.shape
    q, k, v = (p.view(b, t, attention.n_head, -1).transpose(1, 2) for p in attention.c_attn(x).split(c, dim=2))
    keys[:, :, start : start + t], values[:, :, start : start + t] = k, v
    seen_keys, seen_values = keys[:, :, : start + t], values[:, :, : start + t]
    # Without padding the first call is plainly causal, and later ones, of one token, look at all.
    y = F.scaled_dot_product_attention(
        q, seen_keys, seen_values, attn_mask=mask, is_causal=mask is None and start == 0 and t > 1
    )
    projected: Tensor = attention.c_proj(y.transpose(1, 2).reshape(b, t, c))
    return projected


def _grow(state: Cache, needed: int, limit: int) -> None:
    """Room for `needed` columns, in chunks."""
    capacity = state.keys[0].shape[2]
    if needed <= capacity:
        return
    wanted = min(-(-needed // _CHUNK) * _CHUNK, max(limit, needed))
    for tensors in (state.keys, state.values):
        for index, old in enumerate(tensors):
            b, h, _, d = old.shape
            new = old.new_empty(b, h, wanted, d)
            new[:, :, :capacity] = old
            tensors[index] = new
