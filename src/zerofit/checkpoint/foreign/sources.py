"""Tensors of foreign files that are read interval by interval: a source knows its shape and reads only what is asked.

No source maps a file into memory: an interval is read into a buffer of its own, so that the peak of a program that
goes through a checkpoint of any size is a few intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...errors import CheckpointError

#: Elements that a loop over a whole tensor reads at once: 64 MiB as fp32.
INTERVAL_ELEMENTS = 1 << 24


class Source(Protocol):
    """One logical tensor somewhere on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    def read(self, start: int, stop: int) -> Tensor:
        """Elements ``[start, stop)`` of the flattened tensor: 1-D, fp32, on the CPU."""


def intervals(elements: int, step: int = INTERVAL_ELEMENTS) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive intervals that cover `elements`."""
    for start in range(0, elements, step):
        yield start, min(start + step, elements)


def equal(one: Source, other: Source) -> bool:
    """True when both hold the same values, compared bit for bit, interval by interval."""
    if one.shape != other.shape:
        return False
    return all(
        torch.equal(one.read(start, stop).view(torch.int32), other.read(start, stop).view(torch.int32))
        for start, stop in intervals(math.prod(one.shape))
    )


def all_zero(source: Source) -> bool:
    """True when every element is 0."""
    return not any(source.read(start, stop).any() for start, stop in intervals(math.prod(source.shape)))


@dataclass(frozen=True)
class FileSource:
    """Elements that lie one after the other in a file.

    Attributes:
        offset: first byte, counted from the file's start.
        dtype: of the elements in the file; little endian.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> Tensor:
        """See `Source.read`.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        raw = torch.empty((stop - start) * self.dtype.itemsize, dtype=torch.uint8)
        if stop > start:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + start * self.dtype.itemsize)
                _fill(file, raw.numpy().data, self.path)
        return raw.view(self.dtype).to(torch.float32)


def _fill(file: object, room: memoryview, path: Path) -> None:
    """Read until `room` is full: one call returns at most 2 GiB on Linux."""
    while len(room):
        count = file.readinto(room)  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(
                f"{path} ends {len(room)} bytes before a tensor that it announces does: it is cut off. Copy it again "
                f"from where it was written, or use another checkpoint."
            )
        room = room[count:]


@dataclass(frozen=True)
class MemorySource:
    """A tensor that is in memory already: from a file in PyTorch's format of before 2020, which has no index."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, start: int, stop: int) -> Tensor:
        """See `Source.read`."""
        return self.tensor.reshape(-1)[start:stop].to(torch.float32)


@dataclass(frozen=True)
class Part:
    """Elements ``[start, stop)`` of a flattened source."""

    source: Source
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """How many."""
        return self.stop - self.start


@dataclass(frozen=True)
class Joined:
    """A tensor put together from parts of others, in order; what follows the last element needed is padding."""

    shape: tuple[int, ...]
    parts: Sequence[Part]

    def read(self, start: int, stop: int) -> Tensor:
        """See `Source.read`."""
        out = torch.empty(stop - start, dtype=torch.float32)
        begin = 0
        for part in self.parts:
            low, high = max(start, begin), min(stop, begin + part.elements)
            if low < high:
                out[low - start : high - start] = part.source.read(low - begin + part.start, high - begin + part.start)
            begin += part.elements
        return out


def join(sources: Sequence[Source]) -> Joined:
    """1-D sources one after the other."""
    parts = [Part(source, 0, math.prod(source.shape)) for source in sources]
    return Joined((sum(part.elements for part in parts),), parts)


def cut(flat: Joined, offset: int, shape: tuple[int, ...]) -> Joined:
    """The tensor of `shape` that starts at element `offset` of a flat source."""
    stop, begin = offset + math.prod(shape), 0
    parts = []
    for part in flat.parts:
        low, high = max(offset, begin), min(stop, begin + part.elements)
        if low < high:
            parts.append(Part(part.source, low - begin + part.start, high - begin + part.start))
        begin += part.elements
    return Joined(shape, parts)


@dataclass
class Transposed:
    """The transpose of a matrix. Read whole once and kept until `forget`, because its intervals are all over the file.

    Engines and exports go through one tensor after the other, so whoever holds several of these forgets the last one.
    """

    source: Source
    _whole: Tensor | None = field(default=None, init=False)

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.source.shape
        return columns, rows

    def read(self, start: int, stop: int) -> Tensor:
        """See `Source.read`."""
        if self._whole is None:
            matrix = self.source.read(0, math.prod(self.shape)).view(self.source.shape)
            self._whole = matrix.t().contiguous().view(-1)
        return self._whole[start:stop].clone()

    def forget(self) -> None:
        """Free the memory."""
        self._whole = None


@dataclass(frozen=True)
class Rows:
    """A table with another number of rows: cut at its end, or followed by zeros."""

    source: Source
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, *self.source.shape[1:]

    def read(self, start: int, stop: int) -> Tensor:
        """See `Source.read`."""
        there = math.prod(self.source.shape)
        out = torch.zeros(stop - start, dtype=torch.float32)
        if start < there:
            out[: min(stop, there) - start] = self.source.read(start, min(stop, there))
        return out
