"""Names of Mamba's parameters in state-spaces/mamba and in Hugging Face's transformers.

================================  ============================  ============================
zerofit                           state-spaces/mamba            Hugging Face
================================  ============================  ============================
embedding.weight                  backbone.embedding.weight     backbone.embeddings.weight
layers.N.norm.weight              backbone.layers.N.norm...     the same
layers.N.mixer.PART               backbone.layers.N.mixer...    the same
norm_f.weight                     backbone.norm_f.weight        the same
(tied to the embedding)           lm_head.weight                lm_head.weight
================================  ============================  ============================

state-spaces' ``config.json``: ``d_model n_layer vocab_size ssm_cfg rms_norm residual_in_fp32
pad_vocab_size_multiple``. Hugging Face's: ``model_type: mamba``, ``hidden_size num_hidden_layers state_size
conv_kernel expand time_step_rank``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from ...config.models import MambaConfig, ModelConfig
from ...errors import CheckpointError
from .prefixes import strip_wrappers

Shapes = Mapping[str, tuple[int, ...]]
#: Settings that change what the model computes -> what zerofit's model does. First state-spaces', then Hugging Face's.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "rms_norm": (True,),
    "attn_layer_idx": ([], None),
    "attn_cfg": ({}, None),
    "d_intermediate": (0,),
    "tie_embeddings": (True,),
    "tie_word_embeddings": (True,),
    "hidden_act": ("silu",),
    "use_bias": (False,),
    "use_conv_bias": (True,),
    "layer_norm_epsilon": (1e-5,),
    "use_mambapy": (False,),
}
#: The same inside state-spaces' ``ssm_cfg``.
_FIXED_SSM: Mapping[str, tuple[Any, ...]] = {"layer": ("Mamba1",), "bias": (False,), "conv_bias": (True,)}


class MambaNames:
    """See `names.Architecture`."""

    tied: Mapping[str, str] = {"lm_head.weight": "embedding.weight", "head.weight": "embedding.weight"}
    own_tied: Mapping[str, str] = {"head.weight": "embedding.weight"}
    vocabulary_table: str | None = "embedding.weight"
    hidden_fields: tuple[str, ...] = ()
    _known = frozenset({"embedding.weight", "norm_f.weight", "layers.0.mixer.A_log", "layers.0.mixer.in_proj.weight"})

    def recognizes(self, names: Collection[str]) -> bool:
        return self._known <= set(names)

    def canonical(self, name: str) -> str | None:
        name = strip_wrappers(name)
        for prefix in ("model.", "backbone."):
            name = name.removeprefix(prefix)
        return "embedding.weight" if name == "embeddings.weight" else name

    def transposed(self, shapes: Shapes) -> frozenset[str]:
        return frozenset()

    def told(self, shape: Mapping[str, Any], shapes: Shapes) -> ModelConfig | None:
        """From either description, or from the parameters' shapes alone, which tell everything but the length."""
        if shape.get("model_type", "mamba") != "mamba":
            raise CheckpointError(
                f"The checkpoint's config.json says model_type {shape['model_type']!r}; zerofit's Mamba is 'mamba', "
                f"Mamba-1. A model of another type computes something else with parameters of the same names "
                f"(falcon_mamba has norms inside its blocks, mamba2 other blocks). There is no conversion for it."
            )
        wanted = _own(shape) or _state_spaces(shape) or _huggingface(shape) or {}
        if wanted:
            _check_settings(shape)
        found = {**_from_shapes(shapes), **{key: value for key, value in wanted.items() if value is not None}}
        if "n_layers" not in found:
            return None
        try:
            return MambaConfig.model_validate(found)
        except ValidationError:
            return None

    def huggingface_config(self, model: ModelConfig) -> dict[str, Any]:
        assert isinstance(model, MambaConfig)
        return {
            "architectures": ["MambaForCausalLM"],
            "model_type": "mamba",
            "vocab_size": model.vocab_size,
            "hidden_size": model.d_model,
            "intermediate_size": model.d_inner,
            "state_size": model.d_state,
            "num_hidden_layers": model.n_layers,
            "layer_norm_epsilon": 1e-5,
            "expand": model.expand,
            "conv_kernel": model.d_conv,
            "use_bias": False,
            "use_conv_bias": True,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "residual_in_fp32": model.residual_in_fp32,
            "time_step_rank": model.step_rank,
            "time_step_scale": 1.0,
            "time_step_min": 0.001,
            "time_step_max": 0.1,
            "time_step_init_scheme": "random",
            "time_step_floor": 1e-4,
            # Concerns new weights only; with True transformers 5.23 divides loaded out-projections once more.
            "rescale_prenorm_residual": False,
            "use_cache": True,
            "use_mambapy": False,
            "tie_word_embeddings": True,
            "max_position_embeddings": model.max_seq_length,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def state_spaces_config(self, model: ModelConfig) -> dict[str, Any]:
        """Content of ``config.json`` in state-spaces' layout."""
        assert isinstance(model, MambaConfig)
        return {
            "d_model": model.d_model,
            "d_intermediate": 0,
            "n_layer": model.n_layers,
            "vocab_size": model.vocab_size,
            "ssm_cfg": {
                "layer": "Mamba1",
                "d_state": model.d_state,
                "d_conv": model.d_conv,
                "expand": model.expand,
                "dt_rank": model.dt_rank,
            },
            "attn_layer_idx": [],
            "attn_cfg": {},
            "rms_norm": True,
            "residual_in_fp32": model.residual_in_fp32,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": model.pad_vocab_to,
            "tie_embeddings": True,
        }

    def huggingface_name(self, name: str) -> str:
        return "backbone.embeddings.weight" if name == "embedding.weight" else f"backbone.{name}"

    def huggingface_transposed(self, name: str) -> bool:
        return False

    def huggingface_shapes(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        return model.model_copy(update={"pad_vocab_to": 1}).parameter_shapes()


def _own(shape: Mapping[str, Any]) -> dict[str, Any] | None:
    """zerofit's own description, as its safetensors files carry it."""
    return dict(shape) if shape.get("kind") == "mamba" and {"n_layers", "d_model"} <= shape.keys() else None


def _state_spaces(shape: Mapping[str, Any]) -> dict[str, Any] | None:
    if not {"d_model", "n_layer", "vocab_size"} <= shape.keys():
        return None
    ssm = shape.get("ssm_cfg") or {}
    multiple = shape.get("pad_vocab_size_multiple") or 8
    return {
        "n_layers": shape["n_layer"],
        "d_model": shape["d_model"],
        "vocab_size": shape["vocab_size"],
        "pad_vocab_to": multiple,
        "residual_in_fp32": shape.get("residual_in_fp32", True),
        "d_state": ssm.get("d_state"),
        "d_conv": ssm.get("d_conv"),
        "expand": ssm.get("expand"),
        "dt_rank": ssm.get("dt_rank"),
    }


def _huggingface(shape: Mapping[str, Any]) -> dict[str, Any] | None:
    if shape.get("model_type") != "mamba" or not {"hidden_size", "num_hidden_layers"} <= shape.keys():
        return None
    rank = shape.get("time_step_rank")
    return {
        "n_layers": shape["num_hidden_layers"],
        "d_model": shape["hidden_size"],
        "vocab_size": shape.get("vocab_size"),
        "residual_in_fp32": shape.get("residual_in_fp32", True),
        "d_state": shape.get("state_size"),
        "d_conv": shape.get("conv_kernel"),
        "expand": shape.get("expand"),
        "dt_rank": None if rank == math.ceil(shape["hidden_size"] / 16) else rank,
        "max_seq_length": shape.get("max_position_embeddings"),
    }


def _from_shapes(shapes: Shapes) -> dict[str, Any]:
    """What the parameters' own shapes say. Empty where they are not all there."""
    block = "layers.0.mixer."
    needed = [f"{block}{part}" for part in ("A_log", "conv1d.weight", "dt_proj.weight")]
    if "embedding.weight" not in shapes or any(name not in shapes for name in needed):
        return {}
    (rows, width), (inner, states) = shapes["embedding.weight"], shapes[needed[0]]
    rank = shapes[needed[2]][1]
    return {
        "n_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers.")),
        "d_model": width,
        "d_state": states,
        "d_conv": shapes[needed[1]][-1],
        "expand": inner // width,
        "dt_rank": "auto" if rank == math.ceil(width / 16) else rank,
        "vocab_size": rows,
    }


def _check_settings(shape: Mapping[str, Any]) -> None:
    ssm = shape.get("ssm_cfg") or {}
    for found, fixed in ((shape, _FIXED), (ssm, _FIXED_SSM)):
        for key, fits in fixed.items():
            if key in found and found[key] not in fits:
                raise CheckpointError(
                    f"The checkpoint's model was configured with {key} {found[key]!r}; zerofit's Mamba has "
                    f"{fits[0]!r}, so the same weights would compute something else. There is no conversion for it."
                )
