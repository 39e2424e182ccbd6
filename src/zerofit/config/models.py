"""Model shapes. Plain pydantic: counting parameters needs no torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from .image_models import ResNetConfig as ResNetConfig
from .shapes import ModelShape as ModelShape
from .shapes import Section as Section


class LanguageModelShape(ModelShape):
    """A model of token sequences."""

    task: ClassVar[str] = "language_modeling"

    vocab_size: Annotated[int, Field(ge=1)] | None = None
    """Tokens in the vocabulary; unset takes it from the prepared data."""
    pad_vocab_to: Annotated[int, Field(ge=1)] = 1
    """Round the embedding table up to a multiple of this (64 suits GPUs). Padding never enters the loss."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table.

        Raises:
            ValueError: the vocabulary is still open.
        """
        if self.vocab_size is None:
            raise ValueError("vocab_size is not set: prepare the data first, or set model.vocab_size")
        return math.ceil(self.vocab_size / self.pad_vocab_to) * self.pad_vocab_to

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sample."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        raise NotImplementedError

    @property
    def saved_elements_per_token(self) -> int:
        """What a block keeps of a token for its backward pass, in elements; for the coarse estimate alone."""
        raise NotImplementedError

    @property
    def items_per_sample(self) -> int:
        return self.sequence_length

    def saved_elements_per_sample(self, every: int) -> int:
        block, boundary = (n * self.sequence_length for n in (self.saved_elements_per_token, self.width))
        if not every:
            return self.depth * block
        checkpointed = math.ceil(self.depth / every)
        # One checkpointed block at a time is alive again while it is recomputed.
        return (self.depth - checkpointed) * block + checkpointed * boundary + block

    @property
    def logits_per_sample(self) -> int:
        return self.sequence_length * self.padded_vocab_size


class GPT2Config(LanguageModelShape):
    """GPT-2 (Radford et al. 2019): pre-norm Transformer decoder with learned positions and a tied head."""

    depth_key: ClassVar[str] = "n_layer"

    kind: Literal["gpt2"] = "gpt2"
    n_layer: Annotated[int, Field(ge=1)] = 12
    """Transformer blocks."""
    n_head: Annotated[int, Field(ge=1)] = 12
    """Attention heads; must divide ``n_embd``."""
    n_embd: Annotated[int, Field(ge=1)] = 768
    """Width of the residual stream."""
    block_size: Annotated[int, Field(ge=1)] = 1024
    """Longest sequence, in tokens; also the length of a training sample."""
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
    def sequence_length(self) -> int:
        return self.block_size

    @property
    def width(self) -> int:
        return self.n_embd

    @property
    def saved_elements_per_token(self) -> int:
        """Two norms' inputs and outputs 4 C, q k v 3, attention output 1, MLP hidden before and after GELU 8,
        residual 1."""
        return 17 * self.n_embd

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
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

    def flops_per_item(self) -> int:
        """6 per parameter that multiplies (positions do not) + 12 L C T for attention (PaLM paper, appendix B)."""
        multiplying = self.parameter_count() - self.block_size * self.n_embd
        return 6 * multiplying + 12 * self.n_layer * self.n_embd * self.block_size


class MambaConfig(LanguageModelShape):
    """Mamba-1 (Gu & Dao 2023): pre-norm residual blocks with a selective state space, and a tied head."""

    depth_key: ClassVar[str] = "n_layers"

    kind: Literal["mamba"] = "mamba"
    n_layers: Annotated[int, Field(ge=1)] = 24
    """Blocks."""
    d_model: Annotated[int, Field(ge=1)] = 768
    """Width of the residual stream."""
    d_state: Annotated[int, Field(ge=1)] = 16
    """States of each channel; the GPU kernel takes 8 to 64."""
    d_conv: Annotated[int, Field(ge=1)] = 4
    """Width of the causal convolution, in tokens."""
    expand: Annotated[int, Field(ge=1)] = 2
    """The blocks' inner width is this times ``d_model``."""
    dt_rank: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rank of the projection to the step size; ``auto``: d_model / 16, rounded up."""
    max_seq_length: Annotated[int, Field(ge=1)] = 2048
    """Length of a training sample, in tokens. No parameter depends on it."""

    @property
    def d_inner(self) -> int:
        """Channels of a block's inner part."""
        return self.expand * self.d_model

    @property
    def step_rank(self) -> int:
        """`dt_rank` as a number."""
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    @property
    def sequence_length(self) -> int:
        return self.max_seq_length

    @property
    def width(self) -> int:
        return self.d_model

    @property
    def saved_elements_per_token(self) -> int:
        """The norm's input and output 2 C; both halves of the projection, convolution, step, scan's states and output
        6 of the inner width; step rank and B, C."""
        return 2 * self.d_model + 6 * self.d_inner + self.step_rank + 2 * self.d_state

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        width, inner, states, rank = self.d_model, self.d_inner, self.d_state, self.step_rank
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.padded_vocab_size, width)}
        for layer in range(self.n_layers):
            block = f"layers.{layer}"
            shapes[f"{block}.norm.weight"] = (width,)
            shapes[f"{block}.mixer.A_log"] = (inner, states)
            shapes[f"{block}.mixer.D"] = (inner,)
            shapes[f"{block}.mixer.in_proj.weight"] = (2 * inner, width)
            shapes[f"{block}.mixer.conv1d.weight"] = (inner, 1, self.d_conv)
            shapes[f"{block}.mixer.conv1d.bias"] = (inner,)
            shapes[f"{block}.mixer.x_proj.weight"] = (rank + 2 * states, inner)
            shapes[f"{block}.mixer.dt_proj.weight"] = (inner, rank)
            shapes[f"{block}.mixer.dt_proj.bias"] = (inner,)
            shapes[f"{block}.mixer.out_proj.weight"] = (width, inner)
        shapes["norm_f.weight"] = (width,)
        return shapes

    def flops_per_item(self) -> int:
        """6 per parameter of the matrices and the head. The scan is no matrix product and is left out."""
        per_block = 3 * self.d_inner * self.d_model + self.d_inner * (2 * self.step_rank + 2 * self.d_state)
        return 6 * (self.n_layers * per_block + self.padded_vocab_size * self.d_model)


def _kind(shape: Any) -> str:
    """Files from before there were several architectures name none: they mean GPT-2."""
    return str(shape.get("kind", "gpt2") if isinstance(shape, dict) else shape.kind)


#: One of the architectures, told apart by ``kind``.
ModelConfig = Annotated[
    Annotated[GPT2Config, Tag("gpt2")] | Annotated[MambaConfig, Tag("mamba")] | Annotated[ResNetConfig, Tag("resnet")],
    Discriminator(_kind),
]
