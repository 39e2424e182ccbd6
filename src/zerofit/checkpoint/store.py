"""Checkpoints on disk: one safetensors file a rank, and a JSON manifest that says which interval lies where.

::

    checkpoints/step-000100/manifest.json         step, scalars, metrics, entries
                           rank-00000.safetensors  keys "ROLE/NAME/START", 1-D fp32
    checkpoints/latest  best  final               text files that hold a step folder's name

Every engine writes fragments and reads intervals, so any strategy and world size reads what any other wrote.
Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, TrainingFailed
from ..types import Fragment, Scalars, World

FORMAT = 1
MANIFEST = "manifest.json"
POINTERS = ("latest", "best", "final")


class Saved:
    """A checkpoint opened for reading; its `read` is a `types.Reader`."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        #: Optimizer steps attempted when it was written; the step to go on with.
        self.step = int(manifest["step"])
        #: The engine's scalars.
        self.scalars: Scalars = manifest["scalars"]
        #: What the loop remembers: metrics, best metric, model, data.
        self.state: Mapping[str, Any] = manifest["state"]
        self._index: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for entry in manifest["entries"]:
            self._index[entry["name"], entry["role"]].append(entry)
        files = {_plain(entry["file"]) for entry in manifest["entries"]}
        self._files = {file: safe_open(folder / file, framework="pt") for file in files}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape."""
        return {name: tuple(found[0]["shape"]) for (name, role), found in self._index.items() if role == "parameter"}

    def read(self, name: str, role: str, start: int, stop: int) -> Tensor | None:
        """Elements ``[start, stop)`` of a flattened tensor, fp32, put together from the ranks' files."""
        if (name, role) not in self._index:
            return None
        out = torch.empty(stop - start, dtype=torch.float32)
        filled = 0
        for entry in self._index[name, role]:
            low, high = max(start, entry["start"]), min(stop, entry["start"] + entry["length"])
            if low < high:
                tensor = self._files[entry["file"]].get_slice(f"{role}/{name}/{entry['start']}")
                out[low - start : high - start] = tensor[low - entry["start"] : high - entry["start"]]
                filled += high - low
        if filled != stop - start:
            raise CheckpointError(
                f"Checkpoint {self.folder}: {role} of {name} has {filled} of {stop - start} elements from {start}. "
                f"The checkpoint is incomplete; resume from another one."
            )
        return out


def _plain(file: str) -> str:
    """A file name inside the checkpoint's own folder; anything else is refused."""
    if Path(file).name != file or file in ("", ".", ".."):
        raise CheckpointError(f"A manifest names the file {file!r}, which is not inside its own folder; not loaded.")
    return file


def open_checkpoint(folder: Path) -> Saved:
    """Open a step folder.

    Raises:
        CheckpointError: no manifest, or one that cannot be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"Checkpoint {folder} has format {manifest['format']}; this version reads {FORMAT}. Use the version "
                f"that wrote it, or a newer one."
            )
        return Saved(folder, manifest)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"Checkpoint {folder} cannot be read ({type(error).__name__}: {error}). Resume from another checkpoint of "
            f"the run."
        ) from error


def find_checkpoint(run: Path, which: str) -> Path:
    """The step folder that `which` names: ``latest``, ``best``, ``final``, a step number, or a path.

    Raises:
        CheckpointError: there is none; the message lists what is there.
    """
    root = run / "checkpoints"
    if which in POINTERS:
        pointer = root / which
        found = root / _plain(pointer.read_text().strip()) if pointer.is_file() else None
    elif which.isdigit():
        found = root / step_name(int(which))
    else:
        found = Path(which)
        if not (found / MANIFEST).is_file() and (found / "checkpoints").is_dir():
            return find_checkpoint(found, "latest")
    if found is None or not (found / MANIFEST).is_file():
        there = ", ".join(sorted(p.name for p in root.glob("step-*"))) or "none"
        raise CheckpointError(f"No checkpoint {which!r} under {run}; there are: {there}.")
    return found


def step_name(step: int) -> str:
    """Folder name of a step; sorts by step."""
    return f"step-{step:08d}"


def save(
    root: Path, step: int, fragments: Iterable[Fragment], scalars: Scalars, state: Mapping[str, Any], world: World
) -> Path:
    """Write a checkpoint from all ranks at once, each its own fragments. Collective.

    The folder appears under its name only when it is whole; a step that is there already is left as it is.

    Raises:
        TrainingFailed: a rank could not write; nothing of an older checkpoint was touched.
    """
    final, work = root / step_name(step), root / f".{step_name(step)}.partial"
    if _agree(final.exists(), world):
        return final
    if world.is_main:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    _agree(True, world)
    error = _attempt(lambda: _write_rank(work, fragments, world.rank))
    if not _agree(error is None, world):
        raise _write_failed(final, error)
    if world.is_main:
        error = _attempt(lambda: _publish(work, final, step, scalars, state))
    if not _agree(error is None, world):
        raise _write_failed(final, error)
    return final


def _attempt(action: Any) -> OSError | None:
    try:
        action()
    except OSError as error:
        return error
    return None


def _write_failed(final: Path, error: OSError | None) -> TrainingFailed:
    cause = f"this rank's error: {error}" if error else "another rank could not write its part"
    return TrainingFailed(f"Saving {final} failed ({cause}). Older checkpoints are whole; free some disk and resume.")


def _write_rank(work: Path, fragments: Iterable[Fragment], rank: int) -> None:
    file = f"rank-{rank:05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    entries = []
    for fragment in fragments:
        tensors[f"{fragment.role}/{fragment.name}/{fragment.start}"] = fragment.data.detach().cpu().contiguous()
        entries.append(
            {
                "name": fragment.name,
                "role": fragment.role,
                "shape": fragment.shape,
                "start": fragment.start,
                "length": fragment.data.numel(),
                "file": file,
            }
        )
    save_file(tensors, work / file)
    _sync(work / file)
    (work / f"rank-{rank:05d}.json").write_text(json.dumps(entries))


def _publish(work: Path, final: Path, step: int, scalars: Scalars, state: Mapping[str, Any]) -> None:
    """Merge the ranks' entries into the manifest and give the folder its name."""
    parts = sorted(work.glob("rank-*.json"))
    entries = [entry for part in parts for entry in json.loads(part.read_text())]
    sizes = {path.name: path.stat().st_size for path in work.glob("*.safetensors")}
    manifest = {"format": FORMAT, "step": step, "scalars": scalars, "state": state, "files": sizes, "entries": entries}
    (work / MANIFEST).write_text(json.dumps(manifest))
    _sync(work / MANIFEST)
    for part in parts:
        part.unlink()
    work.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    """Make a file or folder durable. Windows opens no folders; its rename is durable enough for a pointer."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _agree(fine: bool, world: World) -> bool:
    """True when `fine` is true on every rank. Collective."""
    if world.world_size == 1:
        return fine
    flag = torch.tensor(int(fine), device=world.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def point(root: Path, pointer: str, folder: Path) -> None:
    """Let `latest`, `best` or `final` name a step folder; atomic. For the main rank."""
    temporary = root / f".{pointer}.partial"
    temporary.write_text(folder.name + "\n")
    _sync(temporary)
    temporary.replace(root / pointer)
    _sync(root)


def prune(root: Path, keep: int) -> list[str]:
    """Delete all but the newest `keep` step folders and those that a pointer names. For the main rank."""
    pointed = {(root / p).read_text().strip() for p in POINTERS if (root / p).is_file()}
    folders = sorted(path for path in root.glob("step-*") if path.name not in pointed)
    gone = folders[: max(len(folders) - keep, 0)]
    for folder in gone:
        shutil.rmtree(folder)
    return [folder.name for folder in gone]
