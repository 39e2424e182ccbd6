"""safetensors files written tensor by tensor: 8 bytes of header length, a JSON header, the raw bytes.

Source of the layout: https://github.com/huggingface/safetensors, README, section "Format".
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from .outgoing import Outgoing

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def write_safetensors(path: Path, tensors: Iterable[Outgoing], metadata: Mapping[str, str]) -> None:
    """Write one file and make it durable. Memory: one interval of one tensor."""
    tensors = list(tensors)
    with path.open("wb") as file:
        file.write(_header(tensors, metadata))
        for tensor in tensors:
            for chunk in tensor.chunks():
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: Sequence[Outgoing], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size_bytes
        entries[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.source.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def write_shards(folder: Path, tensors: Sequence[Outgoing], shard_bytes: int, metadata: Mapping[str, str]) -> None:
    """Write ``model.safetensors``, or above `shard_bytes` several files and their index.

    A tensor is never cut: one that is larger than a shard has a file of its own.
    """
    shards = plan_shards(tensors, shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, tensors, metadata)
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, metadata)
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.size_bytes for tensor in tensors)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def plan_shards(tensors: Sequence[Outgoing], shard_bytes: int) -> list[list[Outgoing]]:
    """Consecutive tensors that fit into a shard together."""
    shards: list[list[Outgoing]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.size_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.size_bytes
    return shards


def write_json(path: Path, content: object) -> None:
    """A JSON file, durable."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """A small file, durable."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
