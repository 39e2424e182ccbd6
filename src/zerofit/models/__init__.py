"""Architectures, one file each. The registry is a literal of lazy references, so that reading it imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from .base import ModelSpec
    from .stepping import Stepper

MODELS = {
    "gpt2": "zerofit.models.gpt2:SPEC",
    "mamba": "zerofit.models.mamba:SPEC",
    "huggingface": "zerofit.models.huggingface:SPEC",
    "resnet": "zerofit.models.resnet:SPEC",
    "timm": "zerofit.models.timm_models:SPEC",
}


#: Architectures that can go on from a state; the others are generated from with their forward pass.
STEPPERS = {
    "gpt2": "zerofit.models.gpt2_stepping:GPT2Stepper",
    "mamba": "zerofit.models.mamba_stepping:MambaStepper",
}


def stepper_of(kind: str, model: nn.Module) -> Stepper | None:
    """A `stepping.Stepper` of a plain built model of architecture `kind`; None where it has none. Imports torch."""
    if kind not in STEPPERS:
        return None
    module, _, attribute = STEPPERS[kind].partition(":")
    stepper: Stepper = getattr(import_module(module), attribute)(model)
    return stepper


def model_spec(kind: str) -> ModelSpec[Any]:
    """The recipe of architecture `kind` (a key of `MODELS`); imports torch."""
    module, _, attribute = MODELS[kind].partition(":")
    spec: ModelSpec[Any] = getattr(import_module(module), attribute)
    return spec
