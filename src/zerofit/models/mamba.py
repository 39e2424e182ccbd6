"""Mamba-1 (Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces").

Shape legend: B samples, L tokens, C width (``d_model``), D inner channels (``d_inner``), N states a channel, R rank of
the step size (``step_rank``), W taps of the convolution, V vocabulary (padded).

The residual stream is fp32 where ``residual_in_fp32`` says so, as published: in bf16 the sum of 64 blocks loses what
the last ones add. It costs 2 bytes a token and channel of each block that keeps its input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.models import MambaConfig, Recomputation
from ..kernels.causal_conv import causal_conv_silu
from ..kernels.head_loss import linear_cross_entropy
from ..kernels.rms_norm import rms_norm
from . import recompute
from .base import apply_blocks, parameter_generator

#: Added to the mean square in norms, as published.
NORM_EPS = 1e-5
#: Tokens whose logits exist at once while the loss is computed.
HEAD_CHUNK_TOKENS = 2048


class RMSNorm(nn.Module):
    """(..., C) of any dtype -> the same shape in the weight's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, NORM_EPS).to(self.weight.dtype)


class Projection(nn.Module):
    """A matrix without a bias, whose result selective recomputation keeps. (..., I) -> (..., O)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return recompute.linear(x, self.weight)


class OutProjection(Projection):
    """The block's last product."""

    def forward(self, x: Tensor) -> Tensor:
        return recompute.last_linear(x, self.weight)


class StepProjection(nn.Module):
    """From rank R to the step size of each channel. The bias is not added here but inside the scan, in fp32."""

    computes = "the step size delta"

    def __init__(self, rank: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, rank))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, R) -> step size before its bias (B, L, D), and the bias (D,) in fp32.

        The bias is a copy: ZeRO-3 takes the parameter away when this module ends.
        """
        return F.linear(x, self.weight), self.bias.float().clone()


class CausalConv(nn.Module):
    """Depthwise causal convolution over time, then SiLU. (B, L, D) -> (B, L, D)."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return causal_conv_silu(x, self.weight.squeeze(1), self.bias)


class Mixer(nn.Module):
    """The selective state space with its projections (paper, section 3.4 and figure 3). (B, L, C) -> (B, L, C)."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.ranks = [config.step_rank, config.d_state, config.d_state]
        inner = config.d_inner
        self.A_log = nn.Parameter(torch.empty(inner, config.d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.in_proj = Projection(config.d_model, 2 * inner)
        self.conv1d = CausalConv(inner, config.d_conv)
        self.x_proj = Projection(inner, sum(self.ranks))
        self.dt_proj = StepProjection(config.step_rank, inner)
        self.out_proj = OutProjection(inner, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv1d(u)
        low, b, c = self.x_proj(u).split(self.ranks, dim=-1)
        delta, bias = self.dt_proj(low)
        y = recompute.scan(
            u, delta, self.decay(), b, c, self.D, z, bias,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        out: Tensor = self.out_proj(y)
        return out

    def decay(self) -> Tensor:
        """A, (D, N) fp32 and negative: the parameter is log(-A), so that training keeps the sign."""
        return -torch.exp(self.A_log.float())


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model)
        self.mixer = Mixer(config)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mixer(self.norm(x))
        return out


class Head(nn.Module):
    """Logits through the transposed token table (tied), and the loss on them, a chunk of tokens at a time."""

    def __init__(self, weight: nn.Parameter, config: MambaConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None  # padded_vocab_size has checked it
        self.weight, self.vocab_size = weight, config.vocab_size
        # Never more than a sample has, so that its memory does not depend on the batch.
        self.chunk_tokens = min(HEAD_CHUNK_TOKENS, config.max_seq_length)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, L, vocab_size), or the fp32 sum of losses when targets (B, L) are given."""
        if targets is None:
            return F.linear(x, self.weight)[..., : self.vocab_size]
        return linear_cross_entropy(
            x.flatten(0, -2),
            self.weight,
            targets.reshape(-1),
            vocab_size=self.vocab_size,
            chunk_tokens=self.chunk_tokens,
        )


class Mamba(nn.Module):
    """The language model. ``forward(tokens, targets)`` -> ``{"loss": sum}``; ``forward(tokens)`` -> logits."""

    def __init__(self, config: MambaConfig, checkpoint_every: int, recomputation: Recomputation) -> None:
        super().__init__()
        self.config, self.checkpoint_every = config, checkpoint_every
        self.keep = None if recomputation == "full" else recompute.KeepResults(scans=recomputation == "light")
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_f = RMSNorm(config.d_model)
        assert isinstance(self.embedding.weight, nn.Parameter)
        self.head = Head(self.embedding.weight, config)

    def embedded(self, tokens: Tensor) -> Tensor:
        """Tokens of any shape -> the residual stream, one dimension more."""
        x: Tensor = self.embedding(tokens)
        return x.float() if self.config.residual_in_fp32 else x

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        """Args: tokens, targets: (B, L) int64, any L; targets of -100 are not trained on."""
        x = self.norm_f(apply_blocks(self.layers, self.embedded(tokens), self.checkpoint_every, self.keep))
        if targets is None:
            logits: Tensor = self.head(x)
            return logits
        return {"loss": self.head(x, targets)}


#: The step size starts log-uniformly between these, in the units of the sequence, and not below the floor.
STEP_MIN, STEP_MAX, STEP_FLOOR = 0.001, 0.1, 1e-4


class MambaSpec:
    """The recipe; see `zerofit.models.base.ModelSpec`."""

    def build(
        self, config: MambaConfig, *, checkpoint_every: int = 0, recomputation: Recomputation = "full"
    ) -> nn.Module:
        return Mamba(config, checkpoint_every, recomputation)

    def init(self, config: MambaConfig, name: str, seed: int) -> Tensor:
        """As published (mamba_ssm, ``mamba_simple.py`` and ``mixer_seq_simple.py``).

        A = -(1..N) in every channel (S4D-real), D = 1; the step's bias is the inverse softplus of a log-uniform step,
        its matrix uniform within R^-0.5; the embedding normal(0, 0.02); norms 1; the other matrices and the
        convolution uniform within fan_in^-0.5 (PyTorch's default), the out-projection divided by sqrt(n_layers).
        """
        shape = config.parameter_shapes()[name]
        random = parameter_generator(seed, name)
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            return torch.ones(shape)
        if name.endswith(".A_log"):
            return torch.arange(1, shape[1] + 1, dtype=torch.float32).log().expand(shape).clone()
        if name.endswith("dt_proj.bias"):
            return _inverse_softplus_of_steps(shape, random)
        if name == "embedding.weight":
            return torch.empty(shape).normal_(0.0, 0.02, generator=random)
        # Depthwise: each channel of the convolution sees its own taps only.
        fan_in = config.d_conv if ".conv1d." in name else config.step_rank if ".dt_proj." in name else shape[1]
        bound = fan_in**-0.5
        if name.endswith("out_proj.weight"):
            bound /= math.sqrt(config.n_layers)
        return torch.empty(shape).uniform_(-bound, bound, generator=random)

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, Mamba)
        return list(model.layers)

    def compiled_units(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, Mamba)
        return [*model.layers, model.head]

    def example_inputs(self, config: MambaConfig, samples: int) -> dict[str, Tensor]:
        return {name: torch.zeros(samples, config.max_seq_length, dtype=torch.int64) for name in ("tokens", "targets")}

    def decays(self, config: MambaConfig, name: str) -> bool:
        return name in config.decaying()

    def flops_per_item(self, config: MambaConfig) -> int:
        return config.flops_per_item()


def _inverse_softplus_of_steps(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """x with softplus(x) = step; log(exp(s) - 1) = s + log(1 - exp(-s))."""
    exponent = torch.rand(shape, generator=random) * math.log(STEP_MAX / STEP_MIN) + math.log(STEP_MIN)
    step = exponent.exp().clamp(min=STEP_FLOOR)
    return step + torch.log(-torch.expm1(-step))


SPEC = MambaSpec()
