"""What a plan needs of a timm model. Imports timm once for each model and version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..config.image_models import TimmConfig
from .store import remembered

#: Any change of what a description holds.
FORMAT = 2


def described(model: TimmConfig) -> TimmConfig:
    """The model with its parameters, blocks and work; its classes and its pictures' size are known.

    Raises:
        MissingDependency: timm is not installed.
        ConfigError: timm has no such model, or it does not take these pictures.
    """

    def make() -> dict[str, Any]:
        from ..models.timm_models import describe

        return describe(model)

    asked = model.model_dump(mode="json", exclude={"architecture", "weights_from", "pretrained", "freeze_epochs"})
    return model.model_copy(update={"architecture": remembered("timm", [asked, _version(), FORMAT], make)})


def _version() -> str:
    try:
        return version("timm")
    except PackageNotFoundError:
        return "none"
