"""Files read ahead in processes of their own, which hand over bytes in memory that both map from the start.

torch's DataLoader would pass a file descriptor for every piece, and map and unmap it: about a millisecond under the
interpreter's lock, which whoever trains needs. Here a piece costs two short messages. Imports no torch, so that the
processes start quickly.
"""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError, ZerofitError
from ..order import Indices
from .decode import BadPicture, Limits, Pixels, decode, find_resize
from .store import ImageStore

#: What the accepted files were checked with no longer matters when they are read again.
ANYTHING = Limits(min_side=1, max_pixels=1 << 62)

#: Seconds that a process is given to end by itself.
PATIENCE_SECONDS = 5.0

Bytes = NDArray[np.uint8]


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


def read_files_whole(store: ImageStore, numbers: Indices) -> list[Bytes]:
    """A JPEG's bytes; the pixels of anything else.

    Raises:
        DataError: a file has changed since it was prepared.
    """
    found = []
    for number, jpeg in zip(numbers.tolist(), store.index["plain_jpeg"][numbers].tolist(), strict=True):
        if not jpeg:
            found.append(decode_here(store, number).reshape(-1))
            continue
        path = store.paths[number]
        try:
            found.append(np.frombuffer(Path(path).read_bytes(), np.uint8))
        except OSError as error:
            raise DataError(f"{path} cannot be read any more ({error.strerror}).") from error
    return found


class FileBytes:
    """Reads pieces of files in turn, `ahead` of them a process.

    Args:
        workers: processes; 0 reads here.
        ahead: pieces that a process reads beforehand.
        piece_bytes: shared memory of a piece; what is larger goes through a pipe.
    """

    def __init__(self, store: ImageStore, workers: int, ahead: int, piece_bytes: int) -> None:
        self.store, self.workers, self.ahead, self.piece_bytes = store, workers, max(ahead, 1), piece_bytes
        self._started: list[tuple[Any, Connection, Bytes]] = []

    def pieces(self, parts: Iterator[Indices]) -> Iterator[tuple[Bytes, list[int]]]:
        """Of each part, in order: its files' bytes one after another, good until the next piece is asked for, and how
        many each file has.

        Raises:
            DataError: a file has changed since it was prepared.
            ZerofitError: a process died.
        """
        if not self.workers:
            for part in parts:
                found = read_files_whole(self.store, part)
                yield np.concatenate(found), [len(data) for data in found]
            return
        if not self._started:
            self._start()
        turn, waiting = 0, deque[int]()
        try:
            for part in islice(parts, self.workers * self.ahead):
                self._ask(turn, part, waiting)
                turn += 1
            while waiting:
                yield self._take(waiting.popleft())
                for part in islice(parts, 1):
                    self._ask(turn, part, waiting)
                    turn += 1
        finally:  # what was asked for and is not wanted any more would be taken for the next answers
            for asked in waiting:
                with suppress(ZerofitError):
                    self._take(asked)

    def _start(self) -> None:
        # Fresh processes: a fork would inherit this one's threads' locks and its GPU.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        for _ in range(self.workers):
            here, there = context.Pipe()
            shared = context.RawArray("B", self.ahead * self.piece_bytes)
            process = context.Process(target=_serve, args=(self.store, there, shared, self.ahead), daemon=True)
            process.start()
            there.close()
            self._started.append((process, here, np.frombuffer(shared, np.uint8)))

    def _ask(self, turn: int, part: Indices, waiting: deque[int]) -> None:
        slot = turn // self.workers % self.ahead
        try:
            self._started[turn % self.workers][1].send((slot, part))
        except OSError as error:
            raise self._died(error) from error
        waiting.append(turn)

    def _take(self, turn: int) -> tuple[Bytes, list[int]]:
        _, connection, shared = self._started[turn % self.workers]
        try:
            found = connection.recv()
            if isinstance(found, Exception):
                raise found
            if sum(found) > self.piece_bytes:
                return np.frombuffer(connection.recv_bytes(), np.uint8), found
        except (EOFError, OSError) as error:
            raise self._died(error) from error
        first = turn // self.workers % self.ahead * self.piece_bytes
        return shared[first : first + sum(found)], found

    def _died(self, error: Exception) -> ZerofitError:
        return ZerofitError(
            f"A process that reads pictures died ({error or type(error).__name__}), most likely for want of memory. "
            f"Lower data.num_workers (0 reads in the rank itself), or train from the cache."
        )

    def close(self) -> None:
        """End the processes."""
        for _, connection, _ in self._started:
            connection.close()
        for process, _, _ in self._started:
            process.join(PATIENCE_SECONDS)
            if process.is_alive():
                process.terminate()
        self._started = []


def _serve(store: ImageStore, connection: Connection, shared: Any, slots: int) -> None:
    """What a process does, until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the rank decides when these end
    warnings.simplefilter("ignore")  # Pillow's, of metadata: the files were checked
    memory = np.frombuffer(shared, np.uint8).reshape(slots, -1)
    while True:
        try:
            slot, numbers = connection.recv()
        except (EOFError, OSError):
            return
        try:
            found = read_files_whole(store, numbers)
        except Exception as error:  # raised where the piece is taken
            connection.send(error)
            continue
        lengths = [len(data) for data in found]
        if sum(lengths) > memory.shape[1]:
            connection.send(lengths)
            connection.send_bytes(np.concatenate(found).data)
            continue
        np.concatenate(found, out=memory[slot, : sum(lengths)])
        connection.send(lengths)
