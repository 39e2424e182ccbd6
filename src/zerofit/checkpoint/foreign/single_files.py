"""Single files: nanoGPT's ``ckpt.pt`` and plain state dicts, as ``torch.save`` or safetensors wrote them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from .contents import PARAMETER, Contents
from .names import without_buffers
from .optimizer_states import add_moments_in_order
from .sources import FileSource
from .torch_file import TorchFile

#: Keys under which a training script's dictionary holds the state dict.
NESTED = ("module", "state_dict", "model", "model_state_dict")
#: safetensors' names of element types.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: Largest header that safetensors itself accepts.
HEADER_LIMIT_BYTES = 100_000_000


def is_safetensors(path: Path) -> bool:
    """True when the file starts with a length and a JSON object, as safetensors does."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= path.stat().st_size


def read_torch_file(path: Path) -> Contents:
    """A nanoGPT checkpoint, a training script's dictionary or a state dict. Reads no tensor.

    Raises:
        CheckpointError: it holds no state dict.
    """
    file = TorchFile(path)
    content = file.content
    contents = Contents("PyTorch state dict", path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, and a checkpoint holds named tensors. Save "
            f"model.state_dict() in the program that wrote it."
        )
    nested = next((key for key in NESTED if isinstance(content.get(key), Mapping)), None)
    weights = content[nested] if nested else content
    parameters = {name: t for name, t in weights.items() if isinstance(t, Tensor) and t.is_floating_point()}
    if not parameters:
        raise CheckpointError(
            f"{path} holds no floating-point tensors under {', '.join(NESTED)} or at its top level; its keys are "
            f"{', '.join(map(str, list(content)[:6]))}. Name a file that holds a state dict."
        )
    contents.tensors[PARAMETER] = {name: file.source(tensor) for name, tensor in parameters.items()}
    if nested:
        _carry_script_state(contents, file, nested, parameters)
    else:
        contents.note("It holds weights only: no step, no best loss, no moments.")
    return contents


def _carry_script_state(contents: Contents, file: TorchFile, nested: str, parameters: Mapping[str, Tensor]) -> None:
    content = file.content
    others = {key: value for key, value in content.items() if key != nested and not _is_optimizer(key)}
    client = {str(key): file.plain(value) for key, value in others.items()}
    contents.describe_model(client)
    if {"model_args", "iter_num"} <= content.keys():
        contents.what = "nanoGPT checkpoint"
        contents.note(
            "nanoGPT does not store which GELU it computed: its versions since 2023 use the exact one and zerofit the "
            "tanh approximation of the paper, so logits may differ in the third digit."
        )
    contents.carry_progress(client)
    if client:
        contents.state["client_state"] = client
    optimizer = next((content[key] for key in content if _is_optimizer(key)), None)
    if isinstance(optimizer, Mapping) and optimizer.get("param_groups"):
        trained = {name: parameters[name] for name in without_buffers(parameters)}
        add_moments_in_order(contents, file, trained, optimizer)
    found = bool(contents.tensors["exp_avg"])
    contents.note("It holds the optimizer's moments." if found else "It holds no moments that can be read.")


def _is_optimizer(key: Any) -> bool:
    return str(key) in ("optimizer", "optimizer_state_dict", "optim")


def read_safetensors(path: Path) -> Contents:
    """One safetensors file. Reads no tensor."""
    contents = Contents("safetensors file", path)
    contents.tensors[PARAMETER] = dict(safetensors_sources(path))
    contents.note("It holds weights only: no step, no best loss, no moments.")
    metadata = safetensors_header(path)[0].get("__metadata__", {})
    try:
        shape = json.loads(metadata.get("zerofit_model", "{}"))
        contents.descriptions += [shape] if isinstance(shape, dict) else []
    except json.JSONDecodeError:
        contents.note("Its metadata zerofit_model is no JSON and was left out.")
    return contents


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header, and the first byte of the data.

    Raises:
        CheckpointError: the file is cut off or is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(HEADER_LIMIT_BYTES, path.stat().st_size):
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(file.read(length))
            return header, 8 + length
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} cannot be read as a safetensors file ({type(error).__name__}: {error}). Copy it again from where "
            f"it was written."
        ) from error


def safetensors_sources(path: Path) -> dict[str, FileSource]:
    """Name -> source of each floating-point tensor of a file.

    Raises:
        CheckpointError: an entry whose bytes are not those of its shape, or lie beyond the end of the file.
    """
    header, data = safetensors_header(path)
    room = path.stat().st_size - data
    sources = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        source = _entry(path, name, entry, data, room)
        if source.dtype.is_floating_point:
            sources[name] = source
    return sources


def _entry(path: Path, name: str, entry: Any, data: int, room: int) -> FileSource:
    try:
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])), entry["data_offsets"]
        fits = 0 <= start <= stop <= room and stop - start == torch.Size(shape).numel() * dtype.itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the entry of {name} cannot be read ({type(error).__name__}: {error}); zerofit reads "
            f"{', '.join(DTYPES)}. Save the weights in one of these types."
        ) from error
    if not fits:
        raise CheckpointError(
            f"{path}: {name} of shape {shape} is said to lie in bytes {start} to {stop} of {room}. The file is cut "
            f"off or damaged; copy it again from where it was written."
        )
    return FileSource(path, data + start, dtype, shape)
