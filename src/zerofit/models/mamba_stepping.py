"""Mamba going on from a state of constant size: generation costs the same for every token, however long the text.

Shape legend as in `mamba`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.causal_conv import causal_conv_silu_step
from ..kernels.selective_scan import selective_scan_final_state, selective_scan_step
from .mamba import Block, Mamba, Mixer


class LayerState(NamedTuple):
    """What a layer remembers of all tokens so far.

    Attributes:
        window: the convolution's last inputs, (B, W - 1, D).
        hidden: the scan's state, (B, D, N) fp32.
    """

    window: Tensor
    hidden: Tensor


#: One for each layer.
State = list[LayerState]


class MambaStepper:
    """See `stepping.Stepper`. There is no limit to the text."""

    def __init__(self, model: Mamba) -> None:
        self.model = model

    @property
    def context_length(self) -> int | None:
        return None

    def initial_state(self, batch: int) -> State:
        config, weight = self.model.config, self.model.embedding.weight
        assert isinstance(weight, Tensor)
        window = weight.new_zeros(batch, config.d_conv - 1, config.d_inner)
        hidden = weight.new_zeros(batch, config.d_inner, config.d_state, dtype=torch.float32)
        return [LayerState(window, hidden)] * config.n_layers

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State, padding: Tensor | None = None) -> tuple[Tensor, State]:
        """See `stepping.Stepper.step`. Several tokens are taken with an empty state only."""
        length = tokens.shape[1]
        keep = None
        if padding is not None and bool(padding.any()):
            keep = (torch.arange(length, device=tokens.device) >= padding[:, None])[..., None]  # (B, T, 1)
        x = self.model.embedded(tokens)
        after: State = []
        for block, before in zip(self.model.layers, state, strict=True):
            assert isinstance(block, Block)
            normed = block.norm(x)
            if length == 1 and keep is None:
                out, new = _one(block.mixer, normed[:, 0], before)
                out = out[:, None]
            else:
                out, new = _prompt(block.mixer, normed, keep)
            x = x + out
            after.append(new)
        logits: Tensor = self.model.head(self.model.norm_f(x[:, -1]))
        return logits, after


def _prompt(mixer: Mixer, x: Tensor, keep: Tensor | None) -> tuple[Tensor, LayerState]:
    """(B, T, C) from an empty state. What is not kept is 0 before the convolution and before the scan, so that both
    states stay 0 until a row begins."""
    given, z = mixer.in_proj(x).chunk(2, dim=-1)
    if keep is not None:
        given = given * keep
    u = mixer.conv1d(given)
    if keep is not None:
        u = u * keep
    low, b, c = mixer.x_proj(u).split(mixer.ranks, dim=-1)
    delta, bias = mixer.dt_proj(low)
    y, hidden = selective_scan_final_state(u, delta, mixer.decay(), b, c, mixer.D, z, bias)
    taps = mixer.conv1d.weight.shape[-1] - 1
    window = torch.cat([given.new_zeros(given.shape[0], taps, given.shape[2]), given], dim=1)[:, given.shape[1] :]
    out: Tensor = mixer.out_proj(y)
    return out, LayerState(window.clone(), hidden)


def _one(mixer: Mixer, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    """One token: (B, C) -> (B, C)."""
    given, z = mixer.in_proj(x).chunk(2, dim=-1)
    u, window = causal_conv_silu_step(state.window, given, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias)
    low, b, c = mixer.x_proj(u).split(mixer.ranks, dim=-1)
    delta, bias = mixer.dt_proj(low)
    y, hidden = selective_scan_step(state.hidden, u, delta, mixer.decay(), b, c, mixer.D, z, bias)
    out: Tensor = mixer.out_proj(y)
    return out, LayerState(window, hidden)
