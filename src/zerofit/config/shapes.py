"""What every model shape tells. Plain pydantic: counting parameters needs no torch."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict

#: What a checkpointed block computes again in the backward pass: all of it; what is not a large matrix product; or what
#: costs next to nothing. A model's configuration says which it has.
Recomputation = Literal["full", "selective", "light"]


class Section(BaseModel):
    """Base of every part of the configuration: frozen, and unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelShape(Section):
    """What every architecture's configuration tells, whatever it computes."""

    task: ClassVar[str]
    """Key of `zerofit.tasks.TASKS`: what the model is trained for."""
    items: ClassVar[str] = "tokens"
    """What is counted, in the plural."""
    depth_key: ClassVar[str]
    """The setting that counts the blocks."""
    recomputations: ClassVar[tuple[Recomputation, ...]] = ("full",)
    """Ways of activation checkpointing that the model has."""
    blocks_alike: ClassVar[bool] = True
    """Whether a few blocks stand for any number of them."""
    inputs_to_host: ClassVar[bool] = True
    """Whether recomputed blocks can keep their inputs in host memory (``activation_offload``)."""

    kind: Any

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every parameter, in the order in which the model registers them."""
        raise NotImplementedError

    def decaying(self) -> frozenset[str]:
        """Names of the parameters that weight decay applies to: matrices, not norms and biases."""
        return frozenset(name for name, shape in self.parameter_shapes().items() if len(shape) >= 2)

    def head_parameters(self) -> frozenset[str]:
        """Names of the parameters that are trained while the rest is frozen; empty where nothing can be frozen."""
        return frozenset()

    def flops_per_item(self) -> int:
        """Of forward and backward for one trained item (a token, a picture); a multiplication and its addition count
        as two."""
        raise NotImplementedError

    @property
    def items_per_sample(self) -> int:
        """Tokens of a sample; 1 where a sample is one item."""
        return 1

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of what the model remembers and no gradient changes (running statistics)."""
        return {}

    def block_inputs_per_sample(self) -> list[int]:
        """Elements of each block's input, in order; of models with `inputs_to_host`."""
        raise NotImplementedError

    def saved_elements_per_sample(self, every: int) -> int:
        """What all blocks keep of a sample for the backward pass with every `every`-th recomputed (0: none), in
        elements; for the coarse estimate alone."""
        raise NotImplementedError

    @property
    def logits_per_sample(self) -> int:
        """Numbers that the head puts out for a sample."""
        raise NotImplementedError

    def parameter_count(self) -> int:
        """Distinct parameters (a tied head counts once), padding rows included."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    @property
    def depth(self) -> int:
        """Blocks."""
        depth: int = getattr(self, self.depth_key)
        return depth

    def with_depth(self, depth: int) -> Self:
        """The same with another number of blocks."""
        return self.model_copy(update={self.depth_key: depth})
