"""What an architecture owes the rest: a recipe, never a built model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from ..config.models import Recomputation

Config_contra = TypeVar("Config_contra", contravariant=True)


class ModelSpec(Protocol[Config_contra]):
    """Recipe of an architecture. Engines get this and a config, because ZeRO-3 and FSDP2 own construction.

    A model's ``forward(**inputs)`` returns loss sums, ``{"loss": scalar fp32 tensor}``, when targets are among the
    inputs, and logits otherwise.
    """

    def build(
        self, config: Config_contra, *, checkpoint_every: int = 0, recomputation: Recomputation = "full"
    ) -> nn.Module:
        """The module, uninitialised, on whatever device is the default (meta too).

        Args:
            config: the shape.
            checkpoint_every: recompute the activations of every n-th block; 0 keeps them all.
            recomputation: what of these blocks is recomputed: one of the config's `recomputations`.
        """

    def init(self, config: Config_contra, name: str, seed: int) -> Tensor:
        """The fp32 CPU tensor that parameter `name` starts from: a pure function of the seed and the name. Several
        threads may call it at once."""

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The repeated unit: of sharding, checkpointing, compilation, tracing and pipeline cuts."""

    def compiled_units(self, model: nn.Module) -> Sequence[nn.Module]:
        """What ``compile: true`` compiles, each for itself: the blocks and the head with its loss."""

    def example_inputs(self, config: Config_contra, samples: int) -> dict[str, Tensor]:
        """Inputs and targets of one training micro-batch, zeros, on whatever device is the default."""

    def decays(self, config: Config_contra, name: str) -> bool:
        """True when weight decay applies to parameter `name`."""

    def flops_per_item(self, config: Config_contra) -> int:
        """Model FLOPs (multiply and add count as two) of forward and backward for one trained token."""


def apply_blocks(
    blocks: Iterable[nn.Module], x: Tensor, every: int, keep: Callable[[], tuple[Any, Any]] | None = None
) -> Tensor:
    """Run `x` through the blocks, recomputing every `every`-th in the backward pass (0: none).

    Non-reentrant checkpointing, so that hooks of DDP and ZeRO see the same order of calls.

    Args:
        blocks: those with an attribute ``input_offload`` (`models.offload`) keep their input in host memory.
        keep: makes the two contexts in which a block is computed and recomputed, see `models.recompute`.
    """
    for index, block in enumerate(blocks):
        if every and torch.is_grad_enabled() and index % every == 0:
            offload = getattr(block, "input_offload", None)
            with offload.hooks() if offload else nullcontext():
                x = checkpoint(block, x, use_reentrant=False, context_fn=keep or noop_context_fn)
        else:
            x = block(x)
    return x


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """Random numbers for one parameter: a function of the seed and the name, not of construction order."""
    import hashlib

    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def named_unique_parameters(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """Canonical name -> parameter; a tied tensor appears once, under the name it was registered with first."""
    return dict(model.named_parameters(remove_duplicate=True))
