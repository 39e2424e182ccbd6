"""What other programs call the parameters of each architecture. The only place that knows; the formats know none.

`ARCHITECTURES` is keyed by the model's ``kind``; a new architecture adds one class here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from pydantic import ValidationError

from ...config.models import GPT2Config, ModelConfig
from ...errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


class Architecture(Protocol):
    """Names and layouts of one architecture.

    Attributes:
        tied: foreign name of a tensor that is another one -> canonical name of that one.
        vocabulary_table: canonical name of the table whose rows may be padded; None without one.
        own_tied: names under which zerofit's module registers a tied tensor again -> canonical name.
        hidden_fields: fields of the model's config that no parameter's shape shows.
    """

    tied: Mapping[str, str]
    vocabulary_table: str | None
    own_tied: Mapping[str, str]
    hidden_fields: tuple[str, ...]

    def recognizes(self, names: Collection[str]) -> bool:
        """True when `canonical` names are those of this architecture."""

    def canonical(self, name: str) -> str | None:
        """zerofit's name of a foreign one; None for a buffer that holds no parameter."""

    def transposed(self, shapes: Shapes) -> frozenset[str]:
        """Canonical names of the matrices that the file holds transposed, told by the shapes."""

    def told(self, shape: Mapping[str, Any], shapes: Shapes) -> ModelConfig | None:
        """The model that a foreign description tells (nanoGPT's or Hugging Face's keys), None when it tells none.

        Raises:
            CheckpointError: the description asks for something that zerofit's model does not do.
        """

    def huggingface_config(self, model: ModelConfig) -> dict[str, Any]:
        """Content of ``config.json``."""

    def huggingface_name(self, name: str) -> str:
        """Name in ``model.safetensors`` of a canonical one."""

    def huggingface_transposed(self, name: str) -> bool:
        """True when Hugging Face holds this matrix transposed."""

    def huggingface_shapes(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Canonical name -> canonical shape of what Hugging Face's model needs: no padded rows, every bias."""


def strip_wrappers(name: str) -> str:
    """A name without what DDP, ``torch.compile`` and FSDP put around modules."""
    name = name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "").replace("_forward_module.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


class GPT2Names:
    """GPT-2 in zerofit, nanoGPT (``transformer.h.0...``, tied ``lm_head``) and Hugging Face (the same, transposed)."""

    tied: Mapping[str, str] = {"lm_head.weight": "wte.weight", "head.weight": "wte.weight"}
    own_tied: Mapping[str, str] = {"head.weight": "wte.weight"}
    vocabulary_table: str | None = "wte.weight"
    hidden_fields: tuple[str, ...] = ("n_head",)
    _known = frozenset({"wte.weight", "wpe.weight", "ln_f.weight", "h.0.attn.c_attn.weight"})
    #: The causal mask, and the value behind it.
    _buffer = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
    _matrix = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
    #: Settings of Hugging Face's GPT2Config that change what the model computes -> what zerofit's model does.
    _fixed: Mapping[str, tuple[Any, ...]] = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }

    def recognizes(self, names: Collection[str]) -> bool:
        return self._known <= set(names)

    def canonical(self, name: str) -> str | None:
        name = strip_wrappers(name)
        for prefix in ("model.", "transformer."):
            name = name.removeprefix(prefix)
        if self._buffer.fullmatch(name):
            return None
        return name

    def transposed(self, shapes: Shapes) -> frozenset[str]:
        rows, columns = (*shapes.get("h.0.attn.c_attn.weight", (3, 1)), 1)[:2]
        # Linear: (3 C, C). Conv1D: (C, 3 C). The square matrices follow this one.
        return frozenset(filter(self._matrix.fullmatch, shapes)) if columns == 3 * rows else frozenset()

    def told(self, shape: Mapping[str, Any], shapes: Shapes) -> ModelConfig | None:
        if not {"n_layer", "n_head", "n_embd"} <= shape.keys():
            return None
        self._check_settings(shape)
        rows, positions = (shapes[name][0] if name in shapes else None for name in ("wte.weight", "wpe.weight"))
        wanted = {
            "n_layer": shape["n_layer"],
            "n_head": shape["n_head"],
            "n_embd": shape["n_embd"],
            "block_size": shape.get("block_size") or shape.get("n_positions") or positions,
            "vocab_size": shape.get("vocab_size") or rows,
            "pad_vocab_to": shape.get("pad_vocab_to") or 1,
            "dropout": shape.get("dropout", shape.get("resid_pdrop")) or 0.0,
            "bias": shape.get("bias", "ln_f.bias" in shapes or not shapes),
        }
        try:
            return GPT2Config.model_validate({key: value for key, value in wanted.items() if value is not None})
        except ValidationError:
            return None

    def _check_settings(self, shape: Mapping[str, Any]) -> None:
        found = {key: shape[key] for key, fits in self._fixed.items() if key in shape and shape[key] not in fits}
        if shape.get("n_inner") not in (None, 4 * shape["n_embd"]):
            found["n_inner"] = shape["n_inner"]
        if found:
            (key, value), *_ = found.items()
            wants = self._fixed.get(key, (4 * shape["n_embd"],))[0]
            raise CheckpointError(
                f"The checkpoint's model was configured with {key} {value!r}; zerofit's GPT-2 has {wants!r}, so the "
                f"same weights would compute something else. There is no conversion for it."
            )

    def huggingface_config(self, model: ModelConfig) -> dict[str, Any]:
        assert isinstance(model, GPT2Config)
        # GPT-2's end-of-text token where it is in the vocabulary; a vocabulary of characters has none.
        end = 50_256 if model.vocab_size is not None and model.vocab_size > 50_256 else None
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": model.vocab_size,
            "n_positions": model.block_size,
            "n_ctx": model.block_size,
            "n_embd": model.n_embd,
            "n_layer": model.n_layer,
            "n_head": model.n_head,
            "n_inner": None,
            "activation_function": "gelu_new",
            "resid_pdrop": model.dropout,
            "embd_pdrop": model.dropout,
            "attn_pdrop": model.dropout,
            "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "tie_word_embeddings": True,
            "use_cache": True,
            "bos_token_id": end,
            "eos_token_id": end,
        }

    def huggingface_name(self, name: str) -> str:
        return f"transformer.{name}"

    def huggingface_transposed(self, name: str) -> bool:
        return self._matrix.fullmatch(name) is not None

    def huggingface_shapes(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        return model.model_copy(update={"bias": True, "pad_vocab_to": 1}).parameter_shapes()


ARCHITECTURES: Mapping[str, Architecture] = {"gpt2": GPT2Names()}


def is_buffer(name: str) -> bool:
    """True for a foreign tensor that is no parameter in any architecture: no optimizer has a state for it."""
    return any(architecture.canonical(name) is None for architecture in ARCHITECTURES.values())
