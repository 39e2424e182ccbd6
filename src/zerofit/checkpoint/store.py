"""Reading checkpoints: intervals of tensors, out of the ranks' files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .manifest import Manifest, read_manifest

#: Longest header of a safetensors file that is read (the format's own limit).
_HEADER_LIMIT_BYTES = 100_000_000


class Saved:
    """A checkpoint opened for reading; its `read` is a `types.Reader`. Its files stay on the disk."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.step, self.scalars, self.state = manifest.step, manifest.scalars, manifest.state
        self._files = {name: TensorFile(folder / name) for name in manifest.files}

    @property
    def notes(self) -> tuple[str, ...]:
        """What is carried over, for `source.Source`."""
        best = self.state.get("best_value", self.state.get("best_loss"))
        metric = self.state.get("best_metric", "val_loss").replace("_", " ").replace("val ", "validation ")
        return (
            f"Starting from {self.folder}: step {self.step}, optimizer included, best {metric} "
            f"{'absent' if best is None else format(best, '.4f')}.",
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape."""
        return {name: shape for (role, name), (shape, _) in self.manifest.tensors.items() if role == "parameter"}

    def read(self, name: str, role: str, start: int, stop: int) -> Tensor | None:
        """Elements ``[start, stop)`` of a flattened tensor, fp32, put together from the ranks' files."""
        if (role, name) not in self.manifest.tensors:
            return None
        out = torch.empty(stop - start, dtype=torch.float32)
        filled = 0
        for part in self.manifest.tensors[role, name][1]:
            low, high = max(start, part.start), min(stop, part.start + part.length)
            if low < high:
                target = out[low - start : high - start]
                self._files[part.file].read_into(target, f"{role}/{name}/{part.start}", low - part.start)
                filled += high - low
        if filled != stop - start:
            raise CheckpointError(
                f"Checkpoint {self.folder}: {role} of {name} has {filled} of {stop - start} elements from {start}. "
                f"The checkpoint is incomplete; resume from another one."
            )
        return out


class TensorFile:
    """Reads intervals of the fp32 tensors of a safetensors file with plain reads, which memory does not pay for.

    The library's own slices map the file, so that all that was read counts as the process's memory. Format:
    https://huggingface.co/docs/safetensors (an 8-byte length, a JSON header, the bytes).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_HEADER_LIMIT_BYTES, path.stat().st_size):
                raise CheckpointError(f"{path} has a header of {length} bytes, more than a safetensors file may have.")
            self._entries = json.loads(file.read(length))
        self._data = 8 + length

    def read_into(self, target: Tensor, key: str, first: int) -> None:
        """Fill `target` (1-D fp32, on the CPU, contiguous) from element `first` of tensor `key` on."""
        low, high = self._entries[key]["data_offsets"]
        start = low + 4 * first
        view = memoryview(target.numpy().data).cast("B")
        if start + len(view) > high:
            raise CheckpointError(f"{self.path}: {key} ends before element {first + target.numel()}.")
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._data + start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{self.path} ends inside {key}; it was truncated.")
                view = view[count:]


def open_checkpoint(folder: Path) -> Saved:
    """Open a step folder. Hashes are not compared: `retention.find_whole` and `verify` do that.

    Raises:
        CheckpointError: no manifest, or one that cannot be read, or a file of it is missing.
    """
    manifest = read_manifest(folder)
    try:
        return Saved(folder, manifest)
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"Checkpoint {folder} is damaged ({error}). Resume from another checkpoint of the run; `zerofit checkpoint "
            f"list` shows which are whole."
        ) from error
