"""Model shapes. Plain pydantic: counting parameters needs no torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from .image_models import ResNetConfig as ResNetConfig
from .image_models import TimmConfig as TimmConfig
from .shapes import ModelShape as ModelShape
from .shapes import Recomputation as Recomputation
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

    def block_inputs_per_sample(self) -> list[int]:
        return [self.sequence_length * self.width] * self.depth

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


#: Tokens of a sample that Mamba's scan takes on a GPU: its kernel counts steps, and chunks of them, in 32 bits.
SCAN_MAX_LENGTH = 2**30
#: States a channel that the scan's GPU kernel takes, and taps that the convolution's takes.
SCAN_MAX_STATES, CONV_MAX_TAPS = 64, 4
#: Compute capability that the scan's kernel needs.
SCAN_CAPABILITY = (8, 0)


class MambaConfig(LanguageModelShape):
    """Mamba-1 (Gu & Dao 2023): pre-norm residual blocks with a selective state space, and a tied head."""

    depth_key: ClassVar[str] = "n_layers"
    recomputations: ClassVar[tuple[Recomputation, ...]] = ("light", "selective", "full")

    kind: Literal["mamba"] = "mamba"
    n_layers: Annotated[int, Field(ge=1)] = 24
    """Blocks."""
    d_model: Annotated[int, Field(ge=1)] = 768
    """Width of the residual stream."""
    d_state: Annotated[int, Field(ge=1)] = 16
    """States of each channel; the GPU kernel takes up to 64, and PyTorch 10 to 50 times as long beyond."""
    d_conv: Annotated[int, Field(ge=1)] = 4
    """Width of the causal convolution, in tokens."""
    expand: Annotated[int, Field(ge=1)] = 2
    """The blocks' inner width is this times ``d_model``."""
    dt_rank: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rank of the projection to the step size; ``auto``: d_model / 16, rounded up."""
    max_seq_length: Annotated[int, Field(ge=1)] = 2048
    """Length of a training sample, in tokens. No parameter depends on it."""
    residual_in_fp32: bool = True
    """The residual stream in fp32 under half precision, as published; false saves 2 bytes a token, channel and block,
    and the sum of many blocks loses low bits."""

    @field_validator("max_seq_length")
    @classmethod
    def _check_length(cls, length: int) -> int:
        if length > SCAN_MAX_LENGTH:
            raise ValueError(
                f"a sample of {length:,} tokens is longer than the scan's {SCAN_MAX_LENGTH:,}: its GPU kernel counts "
                f"steps in 32 bits. Train on shorter samples; what is generated may be of any length"
            )
        return length

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

    def decaying(self) -> frozenset[str]:
        """Not A either: decay would pull the dynamics themselves (mamba_ssm marks A and D ``_no_weight_decay``)."""
        return frozenset(name for name in super().decaying() if not name.endswith(".A_log"))

    def flops_per_item(self) -> int:
        """6 per parameter of the matrices and the head. The scan is no matrix product and is left out."""
        per_block = 3 * self.d_inner * self.d_model + self.d_inner * (2 * self.step_rank + 2 * self.d_state)
        return 6 * (self.n_layers * per_block + self.padded_vocab_size * self.d_model)


class HuggingFaceConfig(LanguageModelShape):
    """Any causal language model that transformers knows, by its config.json. It can be planned, not trained yet."""

    kind: Literal["huggingface"] = "huggingface"
    path: str
    """Folder with a config.json, that file itself, or a model's name on the hub."""
    max_seq_length: Annotated[int, Field(ge=1)] = 2048
    """Length of a training sample, in tokens."""
    settings: dict[str, Any] = Field(default_factory=dict, repr=False)
    """What config.json says; read from `path` when a plan is made."""
    shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict, repr=False, exclude=True)
    """Name -> shape of every parameter; from transformers, remembered in the user's cache folder."""

    def __hash__(self) -> int:
        return hash((self.path, self.max_seq_length, self.vocab_size, self.pad_vocab_to, self.depth))

    @property
    def sequence_length(self) -> int:
        return self.max_seq_length

    @property
    def text_settings(self) -> dict[str, Any]:
        """The settings of the language model; models that also see or hear nest them."""
        return self.settings.get("text_config") or self.settings

    def _setting(self, *names: str) -> int:
        value = next((self.text_settings[name] for name in names if self.text_settings.get(name) is not None), None)
        if not isinstance(value, int):
            raise ValueError(f"{self.path}: config.json has none of {', '.join(names)}")
        return value

    @property
    def depth(self) -> int:
        return self._setting(*_DEPTHS)

    def with_depth(self, depth: int) -> Self:
        """Settings that list something for every block are cut to the same length."""
        count = self.depth

        def cut(name: str, value: Any) -> Any:
            if name in _DEPTHS:
                return depth
            return value[:depth] if isinstance(value, list) and len(value) == count else value

        settings = {name: cut(name, value) for name, value in self.text_settings.items()}
        if "text_config" in self.settings:
            settings = {**self.settings, "text_config": settings}
        return self.model_copy(update={"settings": settings})

    @property
    def width(self) -> int:
        return self._setting("hidden_size", "n_embd", "d_model")

    @property
    def hidden_width(self) -> int:
        """Channels inside a block's MLP; four times the width where config.json does not say."""
        try:
            return self._setting("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
        except ValueError:
            return 4 * self.width

    @property
    def saved_elements_per_token(self) -> int:
        """Two norms' inputs, statistics in fp32 and outputs 8 C, q k v 3, attention output 1, residual 1; a gated MLP's
        four products."""
        return 13 * self.width + 4 * self.hidden_width

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        if not self.shapes:
            raise ValueError(f"{self.path}: the model's parameters are not known yet")
        return self.shapes

    def flops_per_item(self) -> int:
        """6 per parameter that multiplies (tables that are only looked up do not) + 12 L C T for attention (PaLM paper,
        appendix B)."""
        multiplying = sum(math.prod(shape) for shape in self.shapes.values() if len(shape) > 1)
        if not self.text_settings.get("tie_word_embeddings", self.settings.get("tie_word_embeddings", True)):
            multiplying -= self.padded_vocab_size * self.width
        return 6 * multiplying + 12 * self.depth * self.width * self.max_seq_length


#: How the settings of transformers spell the number of blocks.
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def _kind(shape: Any) -> str:
    """Files from before there were several architectures name none: they mean GPT-2."""
    return str(shape.get("kind", "gpt2") if isinstance(shape, dict) else shape.kind)


#: One of the architectures, told apart by ``kind``.
ModelConfig = Annotated[
    Annotated[GPT2Config, Tag("gpt2")]
    | Annotated[MambaConfig, Tag("mamba")]
    | Annotated[HuggingFaceConfig, Tag("huggingface")]
    | Annotated[ResNetConfig, Tag("resnet")]
    | Annotated[TimmConfig, Tag("timm")],
    Discriminator(_kind),
]
