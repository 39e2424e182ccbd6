"""What the processes that read pictures do: some pictures of a store, into memory. Imports no torch, so that they start
quickly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from ..order import Indices
from .decode import ANYTHING, BadPicture, Pixels, decode, decode_whole, find_resize
from .store import ImageStore

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


#: What `WholeFiles` gives of a file: its bytes; its pixels, (source_height, source_width, 3), as they lie in it; or the
#: pixels, (height, width, 3), that the cache would hold.
ENCODED, FULL, KEPT = range(3)


@dataclass(frozen=True)
class WholeFiles:
    """Files for a GPU's decoder, first of all that it is to decode, then pixels of the others.

    Attributes:
        cpu_share: of the JPEGs that the GPU could decode, how many are decoded here. Which is a function of the
            picture's number alone, so that it always looks the same.
    """

    store: ImageStore
    cpu_share: float = 0.0

    def kinds(self, numbers: Indices) -> NDArray[np.uint8]:
        """`ENCODED`, `FULL` or `KEPT`, each. What is more than twice as large as the cache's is shrunk here."""
        rows, size = self.store.index[numbers], self.store.meta["request"]["cache_size"]
        jpeg = rows["plain_jpeg"] == 1
        here = numbers * 2654435761 % 2**32 < self.cpu_share * 2**32  # Knuth's multiplicative hash
        large = np.minimum(rows["source_height"], rows["source_width"]) > 2 * size
        return np.where(jpeg & ~here, ENCODED, np.where(jpeg & ~large, FULL, KEPT)).astype(np.uint8)

    def mean_bytes(self) -> int:
        """Of a file that is handed over, about."""
        index = self.store.index
        kinds = self.kinds(np.arange(len(index)))
        sides = np.where(kinds == FULL, index["source_height"], index["height"]).astype(np.int64)
        pixels = 3 * sides * np.where(kinds == FULL, index["source_width"], index["width"])
        return int(np.where(kinds == ENCODED, self.store.mean_file_bytes, pixels).mean()) + 1

    def __call__(self, numbers: Indices, memory: Bytes) -> Filled:
        """
        Raises:
            DataError: a file has changed since it was prepared.
        """
        found, kinds = [], self.kinds(numbers)
        for place in in_order(kinds).tolist():
            number = int(numbers[place])
            if kinds[place] == ENCODED:
                found.append(self._bytes(number))
            else:
                pixels = self._full(number) if kinds[place] == FULL else decode_here(self.store, number)
                found.append(pixels.reshape(-1))
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

    def _full(self, number: int) -> Pixels:
        record = self.store.index[number]
        try:
            pixels = decode_whole(self._bytes(number).tobytes())
        except BadPicture as error:
            raise _changed(self.store, number, str(error)) from error
        if pixels.shape != (record["source_height"], record["source_width"], 3):
            raise _changed(self.store, number)
        return pixels


def in_order(kinds: NDArray[np.uint8]) -> Indices:
    """The places of a piece's files in the order in which they are handed over: what is encoded first."""
    return np.argsort(kinds != ENCODED, kind="stable")


def _changed(store: ImageStore, number: int, why: str = "") -> DataError:
    words = f"cannot be read any more ({why})" if why else "has changed since it was prepared"
    return DataError(f"{store.paths[number]} {words}. Prepare the pictures again with --force.")


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
        raise _changed(store, number, str(error)) from error
    height, width = int(record["height"]), int(record["width"])
    if pixels.shape[:2] != (height, width):
        raise _changed(store, number)
    out[:height, :width] = pixels


def decode_here(store: ImageStore, number: int) -> Pixels:
    """(height, width, 3), as the cache would hold it."""
    record = store.index[number]
    pixels = np.empty((int(record["height"]), int(record["width"]), 3), np.uint8)
    decode_file(store, number, pixels)
    return pixels
