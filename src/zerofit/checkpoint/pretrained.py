"""Weights that a new image classifier starts from: a file, a run of zerofit, or torchvision's published ones.

What the source does not hold in the model's shape starts afresh: a head of another number of classes, and nothing else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.image_models import PUBLISHED_WIDTH, ImageModelShape, TimmConfig
from ..errors import CheckpointError, ConfigError
from ..models.base import ModelSpec
from ..types import Reader
from .foreign.prefixes import strip_wrappers
from .model import initial_reader
from .source import own_checkpoint

#: torchvision's ImageNet weights (``torchvision/models/resnet.py``, IMAGENET1K_V1) by `ResNetConfig.layers`; the hash
#: in the name is the first part of the file's SHA-256 and is checked.
PUBLISHED = {
    18: "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    34: "https://download.pytorch.org/models/resnet34-b627a593.pth",
    50: "https://download.pytorch.org/models/resnet50-0676ba61.pth",
}
#: Keys under which training scripts hold the state dict.
NESTED = ("state_dict", "model", "model_state_dict", "module")


def starting_weights(model: ImageModelShape) -> dict[str, Tensor] | None:
    """What `model` names to start from: canonical name -> tensor, parameters and buffers; None when it names nothing.

    Raises:
        CheckpointError: the file is no state dict, is damaged, or is of another model.
        ConfigError: there are no published weights of this shape, or they cannot be fetched.
    """
    if model.pretrained:
        return _checked(_published(model), model, "the published weights")
    if model.weights_from is None:
        return None
    return _checked(_from_path(model.weights_from), model, str(model.weights_from))


def starting_reader(spec: ModelSpec[Any], model: ImageModelShape, seed: int) -> Reader:
    """The reader of a new run: `starting_weights`, and initial values for what they lack."""
    held, fresh = starting_weights(model) or {}, initial_reader(spec, model, seed)

    def read(name: str, role: str, start: int, stop: int) -> Tensor | None:
        if role in ("parameter", "buffer") and name in held:
            return held[name].reshape(-1)[start:stop].float()
        return fresh(name, role, start, stop)

    return read


def published_by(model: ImageModelShape) -> str:
    """Whose published weights ``pretrained`` means."""
    return "timm" if isinstance(model, TimmConfig) else "torchvision"


def _published(model: ImageModelShape) -> Mapping[str, Tensor]:
    if isinstance(model, TimmConfig):
        from ..models.timm_models import published_weights

        return published_weights(model)
    layers = getattr(model, "layers", None)
    if layers not in PUBLISHED or getattr(model, "base_width", PUBLISHED_WIDTH) != PUBLISHED_WIDTH:
        raise ConfigError(
            f"model.pretrained true with model.kind {model.kind}, layers {layers}, base_width "
            f"{getattr(model, 'base_width', None)}: published weights are known for ResNets of 18, 34 and 50 layers "
            f"and base_width 64. Choose one of those, or name a file with model.weights_from."
        )
    return _state_dict(_fetched(PUBLISHED[layers]), "model.pretrained")


def _fetched(url: str) -> Path:
    """The file, in the folder where torch.hub keeps such files; checked by the hash in its name.

    Raises:
        ConfigError: it cannot be fetched.
        CheckpointError: what lies there, or what was fetched, is something else.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    wanted = path.stem.rpartition("-")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"model.pretrained true: {url} could not be fetched ({error}). Fetch it where there is a network, and "
                f"name the file with --model.weights_from."
            ) from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(wanted):
        raise CheckpointError(
            f"model.pretrained true: {path} should be {url}, whose SHA-256 begins with {wanted}, and its begins with "
            f"{found[: len(wanted)]}: it is damaged or something else. Remove it, and it is fetched again."
        )
    return path


def _from_path(path: Path) -> Mapping[str, Tensor]:
    if not path.exists():
        raise CheckpointError(
            f"model.weights_from names {path}, which does not exist. Name a state dict or a run folder."
        )
    if path.is_dir():
        saved = own_checkpoint(path, "best")
        if saved is None:
            raise CheckpointError(f"model.weights_from names {path}, which holds no checkpoints of zerofit.")
        wanted = [
            (key, shape) for key, (shape, _) in saved.manifest.tensors.items() if key[0] in ("parameter", "buffer")
        ]
        read = {name: (saved.read(name, role, 0, math.prod(shape)), shape) for (role, name), shape in wanted}
        return {name: values.view(shape) for name, (values, shape) in read.items() if values is not None}
    return _state_dict(path)


def _state_dict(path: Path, key: str = "model.weights_from") -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load, pickle and zip raise errors of many kinds
        raise CheckpointError(
            f"{key} {path} cannot be read ({type(error).__name__}: {str(error)[:200]}). It takes a state "
            f"dict that torch.save wrote (tensors alone: no code is run), or safetensors."
        ) from error
    nested = next(
        (content[key] for key in NESTED if isinstance(content, dict) and isinstance(content.get(key), dict)), 0
    )
    found = nested or content
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{key} {path} holds no tensors under names. Save model.state_dict().")
    return {strip_wrappers(str(name)): value for name, value in found.items() if isinstance(value, Tensor)}


def _checked(found: Mapping[str, Tensor], model: ImageModelShape, where: str) -> dict[str, Tensor]:
    """What of `found` the model takes.

    Raises:
        CheckpointError: something but the head is missing or has another shape.
    """
    parameters, buffers = model.parameter_shapes(), model.buffer_shapes()
    taken = {}
    for name, shape in (parameters | buffers).items():
        there = tuple(found[name].shape) if name in found else None
        if there == shape:
            taken[name] = found[name]
        elif name not in model.head_parameters() and not name.endswith("num_batches_tracked"):
            raise CheckpointError(
                f"{where} is of another model: {name} has the shape {there or 'absent'} there and {shape} in this "
                f"configuration; only a head may differ. Name the model that it was written from (model.kind, "
                f"model.layers, model.name)."
            )
    return taken
