"""Processes that read ahead, and hand over bytes in memory that both map from the start.

Threads would not do: whatever they do in Python keeps the interpreter's lock, which whoever trains needs for every
kernel that it starts. torch's DataLoader would pass a file descriptor for every piece, and map and unmap it: about a
millisecond under that lock. Here a piece costs two short messages. Imports no torch, so that the processes start
quickly.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

from ...errors import ZerofitError
from ..child_processes import without_main
from ..order import Indices
from .work import Bytes, Filled

#: Seconds that the processes are given to end by themselves.
PATIENCE_SECONDS = 5.0

#: Bytes before the numbers of a message, which so stay aligned: the slot, or zeros before what was filled. No pickle
#: begins with a zero.
HEAD = 8

#: Puts some pictures into memory; runs in a process, so it must be picklable.
Work = Callable[[Indices, Bytes], Filled]


class Processes:
    """Do pieces of work in turn, `ahead` of them a process.

    Args:
        workers: processes; 0 works here.
        ahead: pieces that a process does beforehand.
        piece_bytes: shared memory of a piece; what is larger goes through a pipe.

    Attributes:
        memories: into which work is done: one a process, or one for working here.
    """

    def __init__(self, work: Work, workers: int, ahead: int, piece_bytes: int) -> None:
        self.work, self.workers, self.ahead, self.piece_bytes = work, workers, max(ahead, 1), piece_bytes
        self._started: list[tuple[Any, Connection]] = []
        self.memories = [np.empty(piece_bytes, np.uint8)] if not workers else []
        if workers:
            self._start(pickle.dumps(work))

    def _start(self, work: bytes) -> None:
        # Fresh processes: a fork would inherit this one's threads' locks and its GPU.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        size = self.ahead * self.piece_bytes
        for _ in range(self.workers):
            here, there = context.Pipe()
            shared = _Shared(size) if hasattr(os, "memfd_create") else context.RawArray("B", size)
            process = context.Process(target=_serve, args=(work, there, shared, self.ahead), daemon=True)
            with without_main():
                process.start()
            there.close()
            self._started.append((process, here))
            self.memories.append(_mapped(shared))

    def pieces(self, parts: Iterator[Indices]) -> Iterator[tuple[Bytes, list[int]]]:
        """Of each part, in order: its bytes, good until the next piece is asked for, and `Filled.lengths`.

        Raises:
            DataError: a file has changed since it was prepared.
            ZerofitError: a process died.
        """
        if not self.workers:
            for part in parts:
                yield _found(self.work(part, self.memories[0]), self.memories[0])
            return
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

    def _ask(self, turn: int, part: Indices, waiting: deque[int]) -> None:
        slot = turn // self.workers % self.ahead
        try:
            message = slot.to_bytes(HEAD, "little") + np.asarray(part, np.int64).tobytes()
            self._started[turn % self.workers][1].send_bytes(message)
        except OSError as error:
            raise self._died(error) from error
        waiting.append(turn)

    def _take(self, turn: int) -> tuple[Bytes, list[int]]:
        try:
            answer = _answer(self._started[turn % self.workers][1].recv_bytes())
        except (EOFError, OSError) as error:
            raise self._died(error) from error
        if isinstance(answer, Exception):
            raise answer
        first = turn // self.workers % self.ahead * self.piece_bytes
        return _found(answer, self.memories[turn % self.workers][first : first + self.piece_bytes])

    def _died(self, error: Exception) -> ZerofitError:
        return ZerofitError(
            f"A process that reads pictures died ({error or type(error).__name__}), most likely for want of memory. "
            f"Lower data.num_workers (0 reads in the rank itself)."
        )

    def close(self) -> None:
        """End the processes."""
        for _, connection in self._started:
            connection.close()
        until = time.monotonic() + PATIENCE_SECONDS
        for process, _ in self._started:
            process.join(max(until - time.monotonic(), 0))
            if process.is_alive():
                process.terminate()
        self._started, self.memories = [], []


class _Shared:
    """Memory without a name that a new process maps too. Unlike multiprocessing's own it is not taken from /dev/shm,
    of which containers often have 64 MiB; beyond that multiprocessing would take a file on a disk."""

    def __init__(self, size: int, fd: int | None = None) -> None:
        self._fd = os.memfd_create("zerofit-pictures") if fd is None else fd
        os.ftruncate(self._fd, size)
        self.map = mmap.mmap(self._fd, size)

    def __reduce__(self) -> tuple[Any, ...]:  # only while a process is being started
        return _reopened, (len(self.map), DupFd(self._fd))

    def __del__(self) -> None:
        os.close(self._fd)


def _reopened(size: int, fd: Any) -> _Shared:
    return _Shared(size, fd.detach())


def _mapped(shared: Any) -> Bytes:
    return np.frombuffer(shared.map if isinstance(shared, _Shared) else shared, np.uint8)


def _found(filled: Filled, memory: Bytes) -> tuple[Bytes, list[int]]:
    there = memory[: sum(filled.lengths)] if filled.elsewhere is None else filled.elsewhere
    return there, filled.lengths


def _serve(pickled: bytes, connection: Connection, shared: Any, slots: int) -> None:
    """What a process does, until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the rank decides when these end
    warnings.simplefilter("ignore")  # Pillow's, of metadata: the files were checked
    memory = _mapped(shared).reshape(slots, -1)
    work = _loaded(pickled)
    while True:
        try:
            asked = connection.recv_bytes()
        except (EOFError, OSError):
            return
        slot, numbers = int.from_bytes(asked[:HEAD], "little"), np.frombuffer(asked, np.int64, offset=HEAD)
        answer: Filled | Exception
        try:
            answer = work if isinstance(work, Exception) else work(numbers, memory[slot])
        except Exception as error:  # raised where the piece is taken
            answer = error
        try:
            _send(connection, answer)
        except OSError:  # nobody wants it any more
            return


def _send(connection: Connection, answer: Filled | Exception) -> None:
    """What `_answer` reads. Lengths alone, which is nearly always: pickling them would take the rank longer."""
    if isinstance(answer, Filled) and answer.elsewhere is None:
        connection.send_bytes(bytes(HEAD) + np.array(answer.lengths, np.int64).tobytes())
    else:
        connection.send(answer)


def _answer(message: bytes) -> Filled | Exception:
    if not message.startswith(bytes(1)):
        answer: Filled | Exception = pickle.loads(message)
        return answer
    return Filled(np.frombuffer(message, np.int64, offset=HEAD).tolist())


def _loaded(pickled: bytes) -> Work | Exception:
    """The work, or why there is none: its files may be gone by now."""
    try:
        work: Work = pickle.loads(pickled)
    except Exception as error:
        return error
    return work
