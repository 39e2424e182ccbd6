"""Chunks of text to tokens in many processes, in order. What a chunk holds depends on the text alone."""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import TrainingFailed
from ..child_processes import end_with_parent, without_main
from ..metadata import dtype_for
from ..tokenizers import Tokenizer
from .pieces import Piece

#: Characters after which a chunk is full.
CHUNK_CHARACTERS = 1 << 20
#: Chunks below which starting processes takes longer than it saves.
FEW_CHUNKS = 4


@dataclass(frozen=True)
class Chunk:
    """Pieces that are tokenised together. `crc` tells other text when a preparation goes on."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def crc(self) -> int:
        """CRC-32 of the text."""
        value = 0
        for piece in self.pieces:
            value = zlib.crc32(piece.text.encode("utf-8", "surrogatepass"), value)
        return value


@dataclass(frozen=True)
class Encoded:
    """A chunk's tokens and how many of them each of its pieces has, the end-of-text token included."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]


def chunks(pieces: Iterable[Piece]) -> Iterator[Chunk]:
    """Pieces gathered until a chunk is full."""
    number, gathered, size = 0, list[Piece](), 0
    for piece in pieces:
        gathered.append(piece)
        size += len(piece.text)
        if size >= CHUNK_CHARACTERS:
            yield Chunk(number, tuple(gathered))
            number, gathered, size = number + 1, [], 0
    if gathered:
        yield Chunk(number, tuple(gathered))


def encode(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> Encoded:
    """Tokens of the pieces, with the end-of-text token after each document where the tokenizer has one."""
    dtype = dtype_for(tokenizer.vocab_size)
    end = [] if tokenizer.end_of_text is None else [np.array([tokenizer.end_of_text], dtype=dtype)]
    parts: list[NDArray[Any]] = []
    lengths = []
    for piece in pieces:
        ids = tokenizer.encode(piece.text).astype(dtype)
        parts += [ids, *(end if piece.ends else [])]
        lengths.append(len(ids) + (len(end) if piece.ends else 0))
    return Encoded(np.concatenate(parts), np.array(lengths, dtype=np.int64))


def encode_all(tokenizer: Tokenizer, source: Iterable[Chunk], workers: int) -> Iterator[tuple[Chunk, Encoded]]:
    """The chunks with their tokens, in order. At most a few chunks a worker are held.

    Raises:
        TrainingFailed: a worker was killed.
    """
    source = iter(source)
    first = list(islice(source, FEW_CHUNKS))
    if workers == 1 or len(first) < FEW_CHUNKS:
        for part in (first, source):
            for chunk in part:
                yield chunk, encode(tokenizer, chunk.pieces)
        return
    waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
    with _pool(tokenizer, workers) as pool:
        try:
            for part in (first, source):
                for chunk in part:
                    with without_main():
                        waiting.append((chunk, pool.submit(_encode_in_worker, chunk.pieces)))
                    if len(waiting) > 2 * workers:
                        done, future = waiting.popleft()
                        yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            raise TrainingFailed(
                "A process that tokenises was killed, most likely for want of memory. What is finished is kept: run "
                "the same command again, with fewer --workers."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pool(tokenizer: Tokenizer, workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker, (tokenizer,))


_worker_tokenizer: Tokenizer | None = None


def _begin_worker(tokenizer: Tokenizer) -> None:
    """Ctrl-C is for the main process, which ends its workers; the library's own threads would be too many."""
    import signal

    end_with_parent()
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = tokenizer


def _encode_in_worker(pieces: Sequence[Piece]) -> Encoded:
    assert _worker_tokenizer is not None
    return encode(_worker_tokenizer, pieces)
