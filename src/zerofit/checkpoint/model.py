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
from .manifest import check_same_model
from .source import Source


def initial_reader(spec: ModelSpec[Any], config: Any, seed: int) -> Reader:
    """The reader of a fresh start: parameters and buffers computed from the seed, no moments.

    The last tensor is kept, because engines read a tensor interval by interval.
    """
    last: dict[str, Tensor] = {}

    def read(name: str, role: str, start: int, stop: int) -> Tensor | None:
        if role not in ("parameter", "buffer"):
            return None
        if name not in last:
            last.clear()
            last[name] = spec.init(config, name, seed).reshape(-1)
        return last[name][start:stop]

    return read


def parameters_only(read: Reader) -> Reader:
    """`read` without its moments."""
    wanted = ("parameter", "buffer")
    return lambda name, role, start, stop: read(name, role, start, stop) if role in wanted else None


def model_config(source: Source) -> ModelConfig:
    """The model's shape, as the checkpoint tells it.

    Raises:
        CheckpointError: it does not.
    """
    found = source.state.get("model")
    if found is None:
        raise CheckpointError(
            f"{source.folder} does not tell the shape of its model. Name a configuration with the model section."
        )
    config: ModelConfig = TypeAdapter[ModelConfig](ModelConfig).validate_python(found)
    return config


def load_model(
    source: Source, device: torch.device | str = "cpu", config: ModelConfig | None = None
) -> tuple[nn.Module, ModelConfig]:
    """The plain fp32 module in evaluation mode, and its config.

    Args:
        source: where the weights are.
        device: where they go.
        config: the shape; by default what the source tells.

    Raises:
        CheckpointError: the source holds another model, or not all of it.
    """
    config = config or model_config(source)
    check_same_model(source.folder, source.shapes(), config)
    model = model_spec(config.kind).build(config)
    with torch.no_grad():
        for name, parameter in named_unique_parameters(model).items():
            values = source.read(name, "parameter", 0, math.prod(parameter.shape))
            if values is None:
                raise CheckpointError(f"Checkpoint {source.folder} holds no parameter {name}.")
            parameter.copy_(values.view(parameter.shape))
        for name, shape in config.buffer_shapes().items():
            values = source.read(name, "buffer", 0, math.prod(shape))
            if values is None:
                raise CheckpointError(f"Checkpoint {source.folder} holds no buffer {name}.")
            model.get_buffer(name).copy_(values.view(shape))
    return model.to(device).eval(), config
