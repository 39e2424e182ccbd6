"""What a plan needs of a Hugging Face model, from its config.json. Imports transformers once for each config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config.models import HuggingFaceConfig
from ..errors import ConfigError
from .store import remembered


def completed(model: HuggingFaceConfig) -> HuggingFaceConfig:
    """The model with its settings, shapes and vocabulary.

    Raises:
        ConfigError: there is no config.json, or transformers makes no causal language model of it.
    """
    settings = _settings(model.path)
    vocabulary = model.vocab_size or (settings.get("text_config") or settings).get("vocab_size")
    model = model.model_copy(update={"settings": settings, "vocab_size": vocabulary})

    def shapes() -> dict[str, Any]:
        from ..models.huggingface import parameter_shapes

        return {name: list(shape) for name, shape in parameter_shapes(model).items()}

    found = remembered("shapes", settings, shapes)
    return model.model_copy(update={"shapes": {name: tuple(shape) for name, shape in found.items()}})


def _settings(path: str) -> dict[str, Any]:
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        return _from_hub(path)
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as reason:
        raise ConfigError(f"{file} cannot be read as JSON ({reason}). Give the model's own config.json.") from reason
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ConfigError(f"{file} names no model_type, as every Hugging Face config.json does. Give the model's own.")
    return settings


def _from_hub(name: str) -> dict[str, Any]:
    try:
        from transformers import AutoConfig

        return dict(AutoConfig.from_pretrained(name).to_dict())
    except Exception as reason:  # not installed, no network, no such model, no access
        first = str(reason).strip().partition("\n")[0]
        raise ConfigError(
            f"model.path {name}: no folder with a config.json here, and the hub was not reached or does not know it "
            f"({type(reason).__name__}: {first}). Give a folder that holds config.json, or the file itself."
        ) from reason
