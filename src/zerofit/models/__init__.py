"""Architectures, one file each. The registry is a literal of lazy references, so that reading it imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import ModelSpec

MODELS = {
    "gpt2": "zerofit.models.gpt2:SPEC",
    "huggingface": "zerofit.models.huggingface:SPEC",
    "resnet": "zerofit.models.resnet:SPEC",
}


def model_spec(kind: str) -> ModelSpec[Any]:
    """The recipe of architecture `kind` (a key of `MODELS`); imports torch."""
    module, _, attribute = MODELS[kind].partition(":")
    spec: ModelSpec[Any] = getattr(import_module(module), attribute)
    return spec
