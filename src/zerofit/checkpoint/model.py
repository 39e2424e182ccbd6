"""From a checkpoint to a plain module, and the reader of a fresh start."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from ..config.models import ModelConfig
from ..errors import CheckpointError
from ..models import model_spec
from ..models.base import ModelSpec, named_unique_parameters
from ..types import Reader
from .store import Saved


def initial_reader(spec: ModelSpec[Any], config: Any, seed: int) -> Reader:
    """The reader of a fresh start: parameters computed from the seed, no moments.

    The last tensor is kept, because engines read a tensor interval by interval.
    """
    last: dict[str, Tensor] = {}

    def read(name: str, role: str, start: int, stop: int) -> Tensor | None:
        if role != "parameter":
            return None
        if name not in last:
            last.clear()
            last[name] = spec.init(config, name, seed).reshape(-1)
        return last[name][start:stop]

    return read


def saved_model_config(saved: Saved) -> ModelConfig:
    """The model's shape, as the run recorded it."""
    config: ModelConfig = TypeAdapter(ModelConfig).validate_python(saved.state["model"])
    return config


def check_same_model(saved: Saved, config: ModelConfig) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        CheckpointError: names the first parameter that differs, with both shapes.
    """
    there, wanted = saved.shapes(), config.parameter_shapes()
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise CheckpointError(
                f"Checkpoint {saved.folder} is of another model: {name} has the shape "
                f"{there.get(name, 'absent')} there and {wanted.get(name, 'absent')} in this configuration. Resume "
                f"with the model section of the run that wrote it."
            )


def load_model(saved: Saved, device: torch.device | str = "cpu") -> tuple[nn.Module, ModelConfig]:
    """The plain fp32 module in evaluation mode, and its config."""
    config = saved_model_config(saved)
    check_same_model(saved, config)
    model = model_spec(config.kind).build(config)
    with torch.no_grad():
        for name, parameter in named_unique_parameters(model).items():
            values = saved.read(name, "parameter", 0, math.prod(parameter.shape))
            if values is None:
                raise CheckpointError(f"Checkpoint {saved.folder} holds no parameter {name}.")
            parameter.copy_(values.view(parameter.shape))
    return model.to(device).eval(), config
