"""Model shapes. Plain pydantic: counting parameters needs no torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of every part of the configuration: frozen, and unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class GPT2Config(Section):
    """GPT-2 (Radford et al. 2019): pre-norm Transformer decoder with learned positions and a tied head."""

    kind: Literal["gpt2"] = "gpt2"
    n_layer: Annotated[int, Field(ge=1)] = 12
    """Transformer blocks."""
    n_head: Annotated[int, Field(ge=1)] = 12
    """Attention heads; must divide ``n_embd``."""
    n_embd: Annotated[int, Field(ge=1)] = 768
    """Width of the residual stream."""
    block_size: Annotated[int, Field(ge=1)] = 1024
    """Longest sequence, in tokens; also the length of a training sample."""
    vocab_size: Annotated[int, Field(ge=1)] | None = None
    """Tokens in the vocabulary; unset takes it from the prepared data."""
    pad_vocab_to: Annotated[int, Field(ge=1)] = 1
    """Round the embedding table up to a multiple of this (64 suits GPUs). Padding never enters the loss."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout after embeddings, attention and each residual projection; 0 for pretraining."""
    bias: bool = True
    """Biases in linear layers and norms, as published."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> GPT2Config:
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: each head takes an equal share "
                f"of the width; use n_embd {math.ceil(self.n_embd / self.n_head) * self.n_head}"
            )
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table.

        Raises:
            ValueError: the vocabulary is still open.
        """
        if self.vocab_size is None:
            raise ValueError("vocab_size is not set: prepare the data first, or set model.vocab_size")
        return math.ceil(self.vocab_size / self.pad_vocab_to) * self.pad_vocab_to

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every parameter, in the order in which the model registers them."""
        width, hidden = self.n_embd, 4 * self.n_embd
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (self.padded_vocab_size, width),
            "wpe.weight": (self.block_size, width),
        }

        def add(name: str, *shape: int) -> None:
            shapes[f"{name}.weight"] = shape
            if self.bias:
                shapes[f"{name}.bias"] = shape[:1]

        for layer in range(self.n_layer):
            add(f"h.{layer}.ln_1", width)
            add(f"h.{layer}.attn.c_attn", 3 * width, width)
            add(f"h.{layer}.attn.c_proj", width, width)
            add(f"h.{layer}.ln_2", width)
            add(f"h.{layer}.mlp.c_fc", hidden, width)
            add(f"h.{layer}.mlp.c_proj", width, hidden)
        add("ln_f", width)
        return shapes

    def parameter_count(self) -> int:
        """Distinct parameters (the tied head counts once), padding rows included."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    def flops_per_token(self) -> int:
        """Of forward and backward for one trained token; a multiplication and its addition count as two.

        6 per parameter that multiplies (positions do not) + 12 L C T for attention (PaLM paper, appendix B).
        """
        multiplying = self.parameter_count() - self.block_size * self.n_embd
        return 6 * multiplying + 12 * self.n_layer * self.n_embd * self.block_size


#: The union grows with each architecture: ``GPT2Config | MambaConfig``, discriminated by ``kind``.
ModelConfig = GPT2Config
