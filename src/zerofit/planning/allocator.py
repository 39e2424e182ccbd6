"""PyTorch's CUDA caching allocator, simulated: from a sequence of allocations to the bytes that it reserves. Pure.

The rules of ``c10/cuda/CUDACachingAllocator.cpp`` (torch 2.11), with its default settings:

- sizes are rounded up to 512 bytes; up to 1 MiB comes from segments of 2 MiB, below 10 MiB from segments of 20 MiB,
  anything larger from a segment of its own, rounded up to 2 MiB;
- a free block is taken by best fit (the smallest that is large enough, of equals that with the lowest address), from
  the same pool and the same stream; segments get lower and lower addresses (seen on H200s with CUDA 13), which decides
  what splits the largest blocks;
- what is left of it becomes a free block when it is at least 512 bytes (small pool) or more than 1 MiB (large pool),
  otherwise it is part of the allocation;
- freed blocks merge with free neighbours of their segment;
- a block that another stream uses counts as freed at once, and can be taken again when that stream has passed;
- when the driver has no memory left, such streams are waited for, and whole free segments go back to it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 1024**2
ROUND_BYTES = 512
SMALL_BYTES, SMALL_SEGMENT_BYTES = MIB, 2 * MIB
MEDIUM_BYTES, MEDIUM_SEGMENT_BYTES = 10 * MIB, 20 * MIB
LARGE_ROUND_BYTES = 2 * MIB
#: In the place of an allocation's bytes: it is freed; the cache is emptied; it is freed while another stream uses it.
FREED, EMPTIED, RELEASED = -1, -2, -3
#: Lower than any address that `CachingAllocator` gives out.
_BELOW_ALL = -(1 << 62)


class OutOfMemory(Exception):
    """The driver has not enough left, even after all free segments went back to it."""


class _Block:
    """A part of a segment; neighbours in it are linked."""

    __slots__ = ("address", "after", "before", "free", "pool", "size")

    def __init__(self, address: int, size: int, pool: tuple[bool, int]) -> None:
        self.address, self.size, self.pool = address, size, pool
        self.free = False
        self.before: _Block | None = None
        self.after: _Block | None = None


@dataclass(frozen=True)
class AllocatorPeaks:
    """Highest values over the sequence, in bytes.

    Attributes:
        allocated_bytes: handed out, rounding and unsplit remainders included (``max_memory_allocated``).
        reserved_bytes: taken from the driver (``max_memory_reserved``).
    """

    allocated_bytes: int
    reserved_bytes: int


class CachingAllocator:
    """The state of one device's allocator.

    Args:
        limit_bytes: what the driver can give; None for as much as is asked.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self._free: dict[tuple[bool, int], list[tuple[int, int, _Block]]] = {}
        self._used: dict[int, _Block] = {}
        self._pending: dict[int, _Block] = {}
        self._lowest_address = 0

    def alloc(self, key: int, size_bytes: int, stream: int = 0) -> None:
        """Allocate under `key`. Zero bytes allocate nothing, but may be freed."""
        size = max(-(-size_bytes // ROUND_BYTES) * ROUND_BYTES, ROUND_BYTES)
        small = size <= SMALL_BYTES
        pool = (small, stream)
        free = self._free.setdefault(pool, [])
        index = bisect_left(free, (size, _BELOW_ALL))
        if index < len(free):
            block = free.pop(index)[2]
            block.free = False
        else:
            block = self._segment(size, pool)
        remaining = block.size - size
        if remaining >= ROUND_BYTES if small else remaining > SMALL_BYTES:
            self._split(block, size, free)
        self._used[key] = block
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes

    def release(self, key: int) -> None:
        """`key` is freed while another stream uses it: no longer allocated, and not free until `free`."""
        block = self._pending[key] = self._used.pop(key)
        self.allocated_bytes -= block.size

    def free(self, key: int) -> None:
        """Give back what `key` holds, or what was released and has not been given back by itself."""
        if key in self._used:
            self.release(key)
        block = self._pending.pop(key, None)
        if block is not None:
            self._give_back(block)

    def _give_back(self, block: _Block) -> None:
        """It merges with its free neighbours."""
        free = self._free[block.pool]
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                del free[bisect_left(free, (neighbour.size, neighbour.address))]
                self._merge(block, neighbour)
        block.free = True
        insort(free, (block.size, block.address, block))

    def _segment(self, size: int, pool: tuple[bool, int]) -> _Block:
        if size <= SMALL_BYTES:
            total = SMALL_SEGMENT_BYTES
        elif size < MEDIUM_BYTES:
            total = MEDIUM_SEGMENT_BYTES
        else:
            total = -(-size // LARGE_ROUND_BYTES) * LARGE_ROUND_BYTES
        if self.limit_bytes is not None and self.reserved_bytes + total > self.limit_bytes:
            for key in tuple(self._pending):
                self.free(key)
            self.empty_cache()
            if self.reserved_bytes + total > self.limit_bytes:
                raise OutOfMemory
        self.reserved_bytes += total
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        self._lowest_address -= total
        return _Block(self._lowest_address, total, pool)

    def empty_cache(self) -> None:
        """Whole free segments go back to the driver."""
        for pool, free in self._free.items():
            whole = [entry for entry in free if entry[2].before is None and entry[2].after is None]
            self.reserved_bytes -= sum(entry[0] for entry in whole)
            self._free[pool][:] = [entry for entry in free if entry not in whole]

    def _split(self, block: _Block, size: int, free: list[tuple[int, int, _Block]]) -> None:
        rest = _Block(block.address + size, block.size - size, block.pool)
        block.size = size
        rest.before, rest.after = block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after = rest
        rest.free = True
        insort(free, (rest.size, rest.address, rest))

    @staticmethod
    def _merge(block: _Block, neighbour: _Block) -> None:
        """`block` takes over a neighbour."""
        block.size += neighbour.size
        if neighbour is block.before:
            block.address = neighbour.address
            block.before = neighbour.before
            if block.before is not None:
                block.before.after = block
        else:
            block.after = neighbour.after
            if block.after is not None:
                block.after.before = block


def simulate_allocator(sequence: Iterable[tuple[int, int, int]], limit_bytes: int | None = None) -> AllocatorPeaks:
    """Play the sequence of a `timeline.Ledger`.

    Args:
        sequence: ``(key, bytes, stream)`` allocates, ``(key, FREED, 0)`` frees, ``(key, RELEASED, 0)`` releases,
            ``(0, EMPTIED, 0)`` empties the cache.
        limit_bytes: what the driver can give; None for as much as is asked.

    Raises:
        OutOfMemory: the limit does not suffice.
    """
    allocator = CachingAllocator(limit_bytes)
    alloc, free = allocator.alloc, allocator.free
    for key, size_bytes, stream in sequence:
        if size_bytes == FREED:
            free(key)
        elif size_bytes == RELEASED:
            allocator.release(key)
        elif size_bytes == EMPTIED:
            allocator.empty_cache()
        else:
            alloc(key, size_bytes, stream)
    return AllocatorPeaks(allocator.peak_allocated_bytes, allocator.peak_reserved_bytes)
