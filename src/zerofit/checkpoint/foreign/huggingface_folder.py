"""Folders in Hugging Face's layout, read without transformers.

::

    config.json                                      shape of the model
    model.safetensors                                or model-00001-of-0000N.safetensors and
    model.safetensors.index.json                     {"weight_map": {tensor name: file name}}
    pytorch_model.bin, pytorch_model.bin.index.json  the same as PyTorch files
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from .contents import PARAMETER, Contents
from .single_files import safetensors_sources
from .sources import Source
from .torch_file import TorchFile

#: In the order of preference: safetensors first.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def is_huggingface_folder(folder: Path) -> bool:
    """True when the folder holds weights under one of Hugging Face's names."""
    return any((folder / f"{name}{suffix}").is_file() for name in WEIGHTS for suffix in ("", ".index.json"))


def read_huggingface_folder(folder: Path) -> Contents:
    """Open a folder. Reads no tensor of a safetensors file.

    Raises:
        CheckpointError: a file is missing, or an index names one outside the folder.
    """
    config = read_config(folder)
    # mamba_ssm's files lie under the same names; its config.json names no model_type.
    theirs = "ssm_cfg" in config and "model_type" not in config
    contents = Contents("state-spaces folder" if theirs else "Hugging Face folder", folder)
    contents.descriptions.append(config)
    for file in _files(folder):
        sources = safetensors_sources(file) if file.suffix == ".safetensors" else _torch_sources(file)
        twice = sources.keys() & contents.tensors[PARAMETER].keys()
        if twice:
            raise CheckpointError(f"{folder}: {min(twice)} stands in two files. Remove the files of another export.")
        contents.tensors[PARAMETER] |= sources
    contents.note("It holds weights only: no step, no best loss, no moments.")
    return contents


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``, empty when there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    found = _json(path)
    return found if isinstance(found, dict) else {}


def _files(folder: Path) -> list[Path]:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [_inside(folder, index, file) for file in _indexed(index)]
    raise CheckpointError(f"{folder} holds none of {', '.join(WEIGHTS)}. Name the folder that holds the weights.")


def _indexed(index: Path) -> list[str]:
    found = _json(index)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} has no weight_map, so nothing says which files hold the weights. Copy it again."
        )
    return sorted({str(file) for file in weight_map.values()})


def _inside(folder: Path, index: Path, name: str) -> Path:
    if Path(name).name != name or name in ("", ".", ".."):
        raise CheckpointError(f"{index} names the file {name!r}, which is not inside its own folder; not loaded.")
    if not (folder / name).is_file():
        raise CheckpointError(f"{index} names {name}, which is not there. The download is incomplete; copy it again.")
    return folder / name


def _torch_sources(path: Path) -> dict[str, Source]:
    file = TorchFile(path)
    if not isinstance(file.content, dict):
        raise CheckpointError(f"{path} holds no state dict. Save model.state_dict() in the program that wrote it.")
    return {
        name: file.source(tensor)
        for name, tensor in file.content.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    }


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Copy it again from where it was written.") from error
