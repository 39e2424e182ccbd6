"""Hashes of large files, piece by piece, so that several threads share the work."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

#: Longest piece. SHA-256 runs at 0.5 to 2 GB/s a thread, and Python releases its lock meanwhile.
PIECE_BYTES = 32 * 1024**2
#: Bytes that a check reads at a time.
_READ_BYTES = 4 * 1024**2


@dataclass(frozen=True)
class Piece:
    """``length`` bytes from `start` on, and their SHA-256 in hexadecimal."""

    start: int
    length: int
    sha256: str


def workers() -> int:
    """Threads that hash and write: as many as this process has cores, at most eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, 8))


def intervals(start: int, length: int) -> Iterator[tuple[int, int]]:
    """``[start, start + length)`` cut into pieces: (start, length)."""
    for offset in range(0, length, PIECE_BYTES):
        yield start + offset, min(PIECE_BYTES, length - offset)


def changed(tasks: Sequence[tuple[Path, Piece]]) -> str | None:
    """The first piece of a file that is not what its hash says, in words; None when all are."""
    with ThreadPoolExecutor(workers(), "zerofit-verify") as pool:
        for (path, piece), fine in zip(tasks, pool.map(lambda task: _is_whole(*task), tasks), strict=True):
            if not fine:
                pool.shutdown(cancel_futures=True)
                return f"{path.name} was changed between byte {piece.start} and {piece.start + piece.length}"
    return None


def _is_whole(path: Path, piece: Piece) -> bool:
    digest, left = hashlib.sha256(), piece.length
    buffer = memoryview(bytearray(min(_READ_BYTES, piece.length)))
    with path.open("rb", buffering=0) as file:
        file.seek(piece.start)
        while left:
            count = file.readinto(buffer[: min(left, len(buffer))])
            if not count:
                return False
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest() == piece.sha256


def hashed(path: Path) -> tuple[Piece, ...]:
    """The pieces of a file as it is now."""
    with path.open("rb") as file:
        return tuple(
            Piece(start, length, hashlib.sha256(file.read(length)).hexdigest())
            for start, length in intervals(0, path.stat().st_size)
        )
