"""From an engine's fragments to files: copies in host memory, in blocks, each of which becomes one file.

A block is a fixed piece of page-locked memory (torch rounds larger ones up to a power of two). Fragments are copied
into it one behind the other and cut where it ends; adjacent fragments of one flat tensor travel as one copy. On a GPU
the copies run on a stream of their own while training goes on; on the CPU the writer's thread makes them.

Low-bit states come decoded, in temporary fragments. These are copied as soon as the next ones arrive, and let go. On a
GPU they are also decoded on the stream of the copies (`BlockPool.fill`), where the allocator gives their memory to the
next ones in the order of the stream, so that nobody waits and the memory in flight is bounded: `engines.decoding`.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..types import Fragment
from .manifest import StoredFile, make_durable
from .pieces import Piece, intervals

#: 256 MiB of fp32.
BLOCK_ELEMENTS = 64 * 1024**2
#: (role, name, shape, start, length) of what lies in a block, in its order.
Entry = tuple[str, str, tuple[int, ...], int, int]


@dataclass
class _Run:
    """`length` elements of one storage from the start of `first` on; they go to `offset` of a block."""

    first: Tensor
    offset: int
    length: int
    temporary: bool

    def is_followed_by(self, other: Tensor) -> bool:
        """Whether `other`, whose address fits, lies in the same storage."""
        return self.first.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@dataclass
class Block:
    """Some fragments in host memory.

    Attributes:
        buffer: 1-D fp32, page-locked where a GPU copies into it.
        stream: the GPU's stream for the copies; None on the CPU.
        entries: what lies in it, without gaps.
        used: elements.
    """

    buffer: Tensor
    stream: torch.cuda.Stream | None
    entries: list[Entry] = field(default_factory=list)
    used: int = 0
    _runs: list[_Run] = field(default_factory=list)
    _end: int = 0
    """Address behind the last run."""
    _copied: torch.cuda.Event | None = None

    @property
    def room(self) -> int:
        """Elements that still fit."""
        return self.buffer.numel() - self.used

    def add(self, fragment: Fragment, first: int, length: int) -> None:
        """Take `length` elements of a fragment, from its element `first` on."""
        entry = (fragment.role, fragment.name, tuple(fragment.shape), fragment.start + first, length)
        self.entries.append(entry)
        whole = length == fragment.data.numel()
        source = fragment.data if whole else fragment.data[first : first + length]
        start = source.data_ptr()
        # One flat tensor comes in hundreds of pieces; put together again, they are one copy.
        if self._runs and start == self._end and self._runs[-1].is_followed_by(source):
            self._runs[-1].length += length
        else:
            self._let_go()
            self._runs.append(_Run(source, self.used, length, fragment.temporary))
        self._end = start + 4 * length
        self.used += length

    def start(self) -> None:
        """Let the GPU begin to copy what it has not yet; on the CPU `complete` copies."""
        self._let_go()
        if self.stream is not None:
            self._copy()
            self._copied = self.stream.record_event()

    def complete(self) -> None:
        """Return when all of it is in host memory."""
        if self._copied is None:
            self._copy()
        else:
            self._copied.synchronize()
            self._copied = None

    def _let_go(self) -> None:
        """Copy the last run now where it is temporary."""
        if self._runs and self._runs[-1].temporary:
            self._copy_run(self._runs.pop())

    def _copy(self) -> None:
        for run in self._runs:
            self._copy_run(run)
        self._runs.clear()

    def _copy_run(self, run: _Run) -> None:
        source = run.first.detach().as_strided((run.length,), (1,))
        if self.stream is not None and source.is_cuda:  # states may be offloaded
            source.record_stream(self.stream)
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            self.buffer[run.offset : run.offset + run.length].copy_(source, non_blocking=True)


class BlockPool:
    """Buffers that are used again for every checkpoint, because locking pages is slow (about 4 GB/s)."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self._buffers: list[Tensor] = []

    def fill(self, fragments: Iterable[Fragment], stream: torch.cuda.Stream | None, reuse: bool) -> Iterator[Block]:
        """Blocks with the fragments, as soon as each is full.

        Args:
            fragments: 1-D fp32. Read inside ``torch.cuda.stream(stream)``, which has waited for the training's stream.
            stream: the GPU's stream for the copies; None on the CPU.
            reuse: every block lies in the same buffer: the caller is done with one before it asks for the next.
        """
        block = Block(self._buffer(0), stream)
        count = 1
        for fragment in fragments:
            first, length = 0, fragment.data.numel()
            while first < length:
                if not block.room:
                    block.start()
                    yield block
                    block = Block(self._buffer(0 if reuse else count), stream)
                    count += 1
                taken = min(length - first, block.room)
                block.add(fragment, first, taken)
                first += taken
        block.start()
        yield block

    def _buffer(self, index: int) -> Tensor:
        if index == len(self._buffers):
            self._buffers.append(torch.empty(BLOCK_ELEMENTS, dtype=torch.float32, pin_memory=self.pinned))
        return self._buffers[index]


class BlockWriter:
    """Writes blocks as safetensors files, several pieces at a time, and remembers what it wrote.

    Args:
        folder: where to.
        rank: becomes part of the files' names.
        pool: threads that hash and write.
        cancelled: once set, the next piece raises `Cancelled`.
    """

    def __init__(self, folder: Path, rank: int, pool: Executor, cancelled: threading.Event) -> None:
        self.folder, self.rank, self.pool, self.cancelled = folder, rank, pool, cancelled
        self.files: dict[str, StoredFile] = {}
        self.parts: list[dict[str, Any]] = []

    def write(self, block: Block) -> None:
        """Write a complete block to a file of its own, and bring it to the disk."""
        name = f"rank-{self.rank:05d}-{len(self.files):04d}.safetensors"
        header = _header(block.entries)
        data = memoryview(block.buffer.numpy().data).cast("B")[: 4 * block.used]
        path = self.folder / name
        path.touch()
        tasks: list[tuple[int, bytes | memoryview]] = [(0, header)]
        tasks += [(len(header) + start, data[start : start + length]) for start, length in intervals(0, len(data))]
        pieces = list(self.pool.map(lambda task: self._write_piece(path, *task), tasks))
        make_durable(path)
        self.files[name] = StoredFile(len(header) + len(data), tuple(pieces))
        self.parts.append({"file": name, "entries": block.entries})

    def _write_piece(self, path: Path, start: int, data: bytes | memoryview) -> Piece:
        if self.cancelled.is_set():
            raise Cancelled
        with path.open("r+b", buffering=0) as file:
            file.seek(start)
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
        return Piece(start, len(data), hashlib.sha256(data).hexdigest())


class Cancelled(Exception):
    """Another rank could not write its part."""


def _header(entries: Iterable[Entry]) -> bytes:
    """Length and JSON header of a safetensors file whose tensors lie one behind the other."""
    table, offset = {}, 0
    for role, name, _, start, length in entries:
        end = offset + 4 * length
        table[f"{role}/{name}/{start}"] = {"dtype": "F32", "shape": [length], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
