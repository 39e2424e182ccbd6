"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

Shape legend: B samples, T tokens, C width, H heads, V vocabulary (padded), L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.models import GPT2Config
from .base import apply_blocks, parameter_generator

#: Target of a position that is not trained on.
IGNORE = -100


class Attention(nn.Module):
    """Causal self-attention. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (
            part.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for part in self.c_attn(x).split(c, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = self.c_proj(y.transpose(1, 2).reshape(b, t, c))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Four times as wide inside, tanh-approximated GELU. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm residual block. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        y: Tensor = x + self.mlp(self.ln_2(x))
        return y


class Head(nn.Module):
    """Logits, and their cross-entropy summed over valid targets.

    Holds the embedding's own parameter (weight tying), so that ZeRO-3's and FSDP2's hooks on this module gather it.
    """

    def __init__(self, weight: nn.Parameter, vocab_size: int) -> None:
        super().__init__()
        self.weight, self.vocab_size = weight, vocab_size

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, T, C) -> logits (B, T, vocab_size), or the fp32 sum of losses when targets (B, T) are given."""
        # Padding rows of the table are cut off before the softmax: they never enter the loss.
        logits = F.linear(x, self.weight)[..., : self.vocab_size]
        if targets is None:
            return logits
        return F.cross_entropy(
            logits.reshape(-1, self.vocab_size).float(),
            targets.reshape(-1),
            ignore_index=IGNORE,
            reduction="sum",
        )


class GPT2(nn.Module):
    """The decoder. ``forward(tokens, targets)`` -> ``{"loss": sum}``; ``forward(tokens)`` -> logits."""

    def __init__(self, config: GPT2Config, checkpoint_every: int = 0) -> None:
        super().__init__()
        self.config, self.checkpoint_every = config, checkpoint_every
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        assert config.vocab_size is not None  # padded_vocab_size has checked it
        assert isinstance(self.wte.weight, nn.Parameter)
        self.head = Head(self.wte.weight, config.vocab_size)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        """Args: tokens, targets: (B, T) int64, T at most ``block_size``; targets of -100 are not trained on."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        x = self.ln_f(apply_blocks(self.h, x, self.checkpoint_every))
        if targets is None:
            logits: Tensor = self.head(x)
            return logits
        return {"loss": self.head(x, targets)}


class GPT2Spec:
    """The recipe; see `zerofit.models.base.ModelSpec`."""

    def build(self, config: GPT2Config, *, checkpoint_every: int = 0) -> nn.Module:
        return GPT2(config, checkpoint_every)

    def init(self, config: GPT2Config, name: str, seed: int) -> Tensor:
        """Normal(0, 0.02); residual projections divided by sqrt(2 L); biases 0, norms 1 (GPT-2 paper, §2.3)."""
        shape = config.parameter_shapes()[name]
        if name.endswith(".bias"):
            return torch.zeros(shape)
        if ".ln_" in f".{name}":
            return torch.ones(shape)
        std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
        return torch.empty(shape).normal_(0.0, std, generator=parameter_generator(seed, name))

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, GPT2)
        return list(model.h)

    def compiled_units(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, GPT2)
        return [*model.h, model.head]

    def example_inputs(self, config: GPT2Config, samples: int) -> dict[str, Tensor]:
        return {name: torch.zeros(samples, config.block_size, dtype=torch.int64) for name in ("tokens", "targets")}

    def decays(self, config: GPT2Config, name: str) -> bool:
        return len(config.parameter_shapes()[name]) >= 2

    def flops_per_item(self, config: GPT2Config) -> int:
        return config.flops_per_item()


SPEC = GPT2Spec()
