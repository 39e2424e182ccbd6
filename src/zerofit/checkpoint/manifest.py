"""Checkpoints on disk: one safetensors file a rank, and a JSON manifest that says which interval lies where.

::

    checkpoints/step-00000100/manifest.json         step, scalars, state, files with their hashes, tensors
                              rank-00000.safetensors  keys "ROLE/NAME/START", 1-D fp32
                              probe.safetensors       one sample, and in `state` its loss under these weights
    checkpoints/latest  best  final  NAME           text files that hold a step folder's name
    checkpoints/.step-…                             a save or a removal that goes on, or was interrupted

Every engine writes fragments and reads intervals, so any strategy and world size reads what any other wrote. A folder
gets its name when every byte of it is on the disk. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.models import ModelConfig
from ..errors import CheckpointError
from ..types import Scalars
from .pieces import Piece, changed

FORMAT = 2
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-[0-9]{8,}")
PROBE = "probe.safetensors"


class CannotTell(CheckpointError):
    """Another version wrote it, or the disk does not answer: it may be whole."""


@dataclass(frozen=True)
class Part:
    """``length`` elements of a flattened tensor from `start` on, in `file`."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredFile:
    """A file of a checkpoint: its size and its hashes."""

    size_bytes: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Attributes:
        step: optimizer steps attempted when it was written; the step to go on with.
        scalars: the engine's.
        state: what the loop remembers: metrics, best metric, configuration, probe.
        files: by name.
        tensors: (role, name) -> shape of the whole tensor and its parts.
    """

    step: int
    scalars: Scalars
    state: Mapping[str, Any]
    files: Mapping[str, StoredFile]
    tensors: Mapping[tuple[str, str], tuple[tuple[int, ...], tuple[Part, ...]]]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, without the manifest."""
        return sum(file.size_bytes for file in self.files.values())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` with a hash of itself, and make it durable."""
    body = {
        "format": FORMAT,
        "step": manifest.step,
        "scalars": dict(manifest.scalars),
        "state": dict(manifest.state),
        "files": {
            name: {"bytes": file.size_bytes, "pieces": [[p.start, p.length, p.sha256] for p in file.pieces]}
            for name, file in manifest.files.items()
        },
        "tensors": {
            f"{role}/{name}": {"shape": list(shape), "parts": [[p.file, p.start, p.length] for p in parts]}
            for (role, name), (shape, parts) in manifest.tensors.items()
        },
    }
    text = json.dumps({"sha256": _hash_of(body), "manifest": body})
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    make_durable(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json``; the files themselves are not looked at.

    Raises:
        CheckpointError: there is none, it was changed, or another version wrote it.
    """
    try:
        outer = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        body = outer["manifest"]
        if outer["sha256"] != _hash_of(body):
            raise CheckpointError(f"Checkpoint {folder}: {MANIFEST} was changed after it was written; not loaded.")
        if body["format"] != FORMAT:
            raise CannotTell(
                f"Checkpoint {folder} has format {body['format']}; this version reads {FORMAT}. Use the version that "
                f"wrote it, or a newer one."
            )
        return _parsed(body)
    except CheckpointError:
        raise
    except Exception as error:
        missing = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        raise (CannotTell if missing else CheckpointError)(
            f"Checkpoint {folder} cannot be read ({type(error).__name__}: {error}). Resume from another checkpoint of "
            f"the run; `zerofit checkpoint list` shows which are whole."
        ) from error


def _hash_of(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _parsed(body: Mapping[str, Any]) -> Manifest:
    files = {
        _plain(name): StoredFile(int(file["bytes"]), tuple(Piece(*piece) for piece in file["pieces"]))
        for name, file in body["files"].items()
    }
    tensors = {}
    for key, tensor in body["tensors"].items():
        role, _, name = key.partition("/")
        parts = tuple(Part(_plain(file), start, length) for file, start, length in tensor["parts"])
        tensors[role, name] = tuple(tensor["shape"]), parts
    return Manifest(int(body["step"]), body["scalars"], body["state"], files, tensors)


def _plain(file: str) -> str:
    """A file name inside the checkpoint's own folder; anything else is refused."""
    if Path(file).name != file or "\\" in file or file in ("", ".", ".."):
        raise CheckpointError(f"A manifest names the file {file!r}, which is not inside its own folder; not loaded.")
    return file


def sizes_differ(folder: Path, manifest: Manifest) -> str | None:
    """The first file that is missing or has another size, in words; its bytes are not read."""
    for name, file in manifest.files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != file.size_bytes:
            return f"{name} is missing" if found is None else f"{name} has {found} of {file.size_bytes} bytes"
        if sum(piece.length for piece in file.pieces) != file.size_bytes:
            return f"the hashes of {name} do not cover it"
    return None


def verify(folder: Path, manifest: Manifest) -> str | None:
    """What is wrong with the checkpoint's files, in words; None when every byte is what was written."""
    pieces = [(folder / name, piece) for name, file in manifest.files.items() for piece in file.pieces]
    return sizes_differ(folder, manifest) or changed(pieces)


def step_name(step: int) -> str:
    """Folder name of a step; sorts by step."""
    return f"step-{step:08d}"


def step_folders(root: Path) -> list[Path]:
    """The run's checkpoints, oldest first. What a user keeps beside them under other names is none of them."""
    return sorted(path for path in root.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir())


def make_durable(*paths: Path) -> None:
    """Bring files or folders to the disk. Windows opens no folders; its rename is durable enough for a pointer."""
    for path in paths:
        if os.name == "nt" and path.is_dir():
            continue
        # Windows flushes only what was opened for writing; Unix opens no folder for it.
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old or the new one, whatever happens."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    make_durable(temporary)
    temporary.replace(path)
    make_durable(path.parent)


def merged(parts: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[tuple[int, ...], tuple[Part, ...]]]:
    """The ranks' lists of what they wrote as one table of tensors."""
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    found: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        for role, name, shape, start, length in part["entries"]:
            shapes[role, name] = tuple(shape)
            found.setdefault((role, name), []).append(Part(part["file"], start, length))
    return {key: (shapes[key], tuple(sorted(found[key], key=lambda part: part.start))) for key in found}


def check_same_model(folder: Path, shapes: dict[str, tuple[int, ...]], model: ModelConfig) -> None:
    """Refuse a checkpoint of another model.

    Args:
        folder: for the message.
        shapes: parameter name -> shape, in the checkpoint.
        model: wanted.

    Raises:
        CheckpointError: names the first parameter that differs, with both shapes.
    """
    wanted = model.parameter_shapes()
    for name in sorted(shapes.keys() | wanted.keys()):
        if shapes.get(name) != wanted.get(name):
            raise CheckpointError(
                f"Checkpoint {folder} is of another model: {name} has the shape {shapes.get(name, 'absent')} there and "
                f"{wanted.get(name, 'absent')} in this configuration. Resume with the model section of the run that "
                f"wrote it."
            )
