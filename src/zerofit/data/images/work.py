"""What the processes that read pictures do: some pictures of a store, into memory. Imports no torch, so that they start
quickly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from ..order import Indices
from .decode import BadPicture, Limits, Pixels, decode, find_resize
from .store import ImageStore

#: What the accepted files were checked with no longer matters when they are read again.
ANYTHING = Limits(min_side=1, max_pixels=1 << 62)

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Filled:
    """What came of a piece.

    Attributes:
        lengths: bytes of each of its parts, one after another in the memory.
        elsewhere: the bytes themselves where the memory was too small.
    """

    lengths: list[int]
    elsewhere: Bytes | None = None


@dataclass(frozen=True)
class Canvases:
    """Each picture in the upper left of a canvas of ``store.canvas``; the rest of it is left as it is.

    Attributes:
        decoded: from the files, to the very pixels that the cache would hold; else out of the cache.
    """

    store: ImageStore
    decoded: bool = False

    @property
    def bytes_each(self) -> int:
        height, width = self.store.canvas
        return height * width * 3

    def __call__(self, numbers: Indices, memory: Bytes) -> Filled:
        """
        Raises:
            DataError: a file has changed since it was prepared.
        """
        height, width = self.store.canvas
        whole = memory[: len(numbers) * self.bytes_each].reshape(len(numbers), height, width, 3)
        for number, out in zip(numbers.tolist(), whole, strict=True):
            if self.decoded:
                decode_file(self.store, number, out)
            else:
                pixels = self.store.pixels(number)
                out[: pixels.shape[0], : pixels.shape[1]] = pixels
        return Filled([self.bytes_each] * len(numbers))


@dataclass(frozen=True)
class WholeFiles:
    """A JPEG's bytes; the pixels of anything else, as the cache would hold them."""

    store: ImageStore

    def __call__(self, numbers: Indices, memory: Bytes) -> Filled:
        """
        Raises:
            DataError: a file has changed since it was prepared.
        """
        found = []
        for number, jpeg in zip(numbers.tolist(), self.store.index["plain_jpeg"][numbers].tolist(), strict=True):
            found.append(self._bytes(number) if jpeg else decode_here(self.store, number).reshape(-1))
        lengths = [len(data) for data in found]
        if sum(lengths) > len(memory):
            return Filled(lengths, np.concatenate(found))
        np.concatenate(found, out=memory[: sum(lengths)])
        return Filled(lengths)

    def _bytes(self, number: int) -> Bytes:
        path = self.store.paths[number]
        try:
            return np.frombuffer(Path(path).read_bytes(), np.uint8)
        except OSError as error:
            raise DataError(f"{path} cannot be read any more ({error.strerror}).") from error


def decode_file(store: ImageStore, number: int, out: Pixels) -> None:
    """Decode a file into the upper left of `out` (H, W, 3), as the cache would hold it.

    Raises:
        DataError: the file has changed since it was prepared.
        MissingDependency: what shrank the cache's pictures is not installed.
    """
    path, record = store.paths[number], store.index[number]
    resize = find_resize(store.meta["resize"])
    try:
        pixels = decode(Path(path).read_bytes(), store.meta["request"]["cache_size"], ANYTHING, resize).pixels
    except (OSError, BadPicture) as error:
        raise DataError(
            f"{path} cannot be read any more ({error}). Prepare the pictures again with --force."
        ) from error
    height, width = int(record["height"]), int(record["width"])
    if pixels.shape[:2] != (height, width):
        raise DataError(f"{path} has changed since it was prepared. Prepare the pictures again with --force.")
    out[:height, :width] = pixels


def decode_here(store: ImageStore, number: int) -> Pixels:
    """(height, width, 3), as the cache would hold it."""
    record = store.index[number]
    pixels = np.empty((int(record["height"]), int(record["width"]), 3), np.uint8)
    decode_file(store, number, pixels)
    return pixels
