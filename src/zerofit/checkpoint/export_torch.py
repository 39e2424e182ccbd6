"""PyTorch's ``.pt`` files written interval by interval.

``torch.save`` wants every tensor in memory. Here it writes the file's skeleton, from fake tensors and without their
bytes (`torch.serialization.skip_data`), and the bytes are put into their places afterwards. The checksums that the
skeleton lacks are entered last, so that the outcome is an ordinary zip file for other readers too.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .outgoing import Outgoing

#: Sizes of a local header and of a central directory entry before their names (PKWARE's APPNOTE, 4.3.7 and 4.3.12).
LOCAL_BYTES, CENTRAL_BYTES = 30, 46
CRC_IN_CENTRAL = 16
#: Signature of the data descriptor that follows an entry's data, and of a central directory entry.
DESCRIPTOR, CENTRAL = b"PK\x07\x08", b"PK\x01\x02"


class TorchWriter:
    """Collects the tensors of one file, then writes it."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode()
        self._contents: dict[int, Sequence[Outgoing]] = {}
        self._kept: list[Tensor] = []  # so that no id is used twice

    def place(self, tensor: Outgoing) -> Tensor:
        """A stand-in for `tensor`, to be put into the object that `write` saves; twice in it is a tied tensor."""
        return self._place(tensor.source.shape, [tensor])

    def place_joined(self, tensors: Sequence[Outgoing]) -> Tensor:
        """A stand-in for one vector of several tensors of one type, one after the other."""
        return self._place((sum(tensor.elements for tensor in tensors),), tensors)

    def _place(self, shape: tuple[int, ...], contents: Sequence[Outgoing]) -> Tensor:
        with self._mode:
            stand_in = torch.empty(shape, dtype=contents[0].dtype)
        self._kept.append(stand_in)
        self._contents[id(stand_in)] = contents
        return stand_in

    def write(self, path: Path, content: Any) -> None:
        """Save `content` (dictionaries, lists, tuples, numbers, text and stand-ins) and make it durable."""
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(content, path)
        # Loaded to "meta", tensors tell where in the file their bytes belong.
        skeleton = torch.load(path, map_location="meta", weights_only=True)
        places: dict[int, Sequence[Outgoing]] = {}
        for stand_in, found in zip(_tensors(content), _tensors(skeleton), strict=True):
            offset = found.untyped_storage()._checkpoint_offset
            assert offset is not None, "torch.load to the meta device tells the offset of every storage"
            places[offset] = self._contents[id(stand_in)]
        with path.open("r+b") as file:
            checksums = {offset: _fill(file, offset, tensors) for offset, tensors in places.items()}
            _enter_checksums(path, file, checksums)
            file.flush()
            os.fsync(file.fileno())


def _tensors(content: Any) -> Iterator[Tensor]:
    """All tensors, in an order that loading does not change."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, list | tuple) and not isinstance(content, torch.Size):
        for value in content:
            yield from _tensors(value)


def _fill(file: IO[bytes], offset: int, tensors: Sequence[Outgoing]) -> tuple[int, int]:
    """Write the tensors from `offset` on; returns their size in bytes and their CRC-32."""
    file.seek(offset)
    size = checksum = 0
    for tensor in tensors:
        for chunk in tensor.chunks():
            file.write(chunk)
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return size, checksum


def _enter_checksums(path: Path, file: IO[bytes], checksums: Mapping[int, tuple[int, int]]) -> None:
    """Put CRC-32 values into the data descriptors and into the central directory, whose entries have one order."""
    with zipfile.ZipFile(path) as archive:
        entries, position = archive.infolist(), archive.start_dir
    for entry in entries:
        data = entry.header_offset + LOCAL_BYTES + sum(_lengths(file, entry.header_offset + 26, 2))
        lengths = _lengths(file, position + 28, 3)
        if data in checksums:
            size, checksum = checksums[data]
            _patch(file, data + size, DESCRIPTOR, 4, checksum)
            _patch(file, position, CENTRAL, CRC_IN_CENTRAL, checksum)
        position += CENTRAL_BYTES + sum(lengths)


def _lengths(file: IO[bytes], position: int, count: int) -> tuple[int, ...]:
    file.seek(position)
    return struct.unpack(f"<{count}H", file.read(2 * count))


def _patch(file: IO[bytes], position: int, signature: bytes, distance: int, checksum: int) -> None:
    file.seek(position)
    if file.read(4) == signature:
        file.seek(position + distance)
        file.write(struct.pack("<I", checksum))
