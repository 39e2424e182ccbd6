"""From the numbers of pictures to a canvas of pixels: out of the cache, or out of the files."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import tee
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError, ZerofitError
from ..order import Indices
from .file_bytes import decode_file
from .store import ImageStore

T = TypeVar("T")

#: Pictures that a thread copies at least, and that a process decodes.
COPIED_TOGETHER, DECODED_TOGETHER = 16, 32


class Reader(Protocol):
    """Reads batches in the order in which they are asked for."""

    def batches(self, numbers: Iterable[Indices]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each batch of index rows: canvases (B, H, W, 3) uint8, and sizes (B, 3) int32: the height and width that
        are filled, and whether rows and columns are exchanged."""

    def close(self) -> None:
        """Stop threads and processes."""


def empty_canvas(samples: int, height: int, width: int, *, pin: bool) -> Tensor:
    """(samples, height, width, 3) uint8, not filled."""
    return torch.empty((samples, height, width, 3), dtype=torch.uint8, pin_memory=pin)


def parts(numbers: Indices, size: int) -> list[Indices]:
    """Pieces of `size`; the last may be shorter."""
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]


def sizes_of(store: ImageStore, numbers: Indices) -> Tensor:
    """(B, 3) int32: height, width, transposed."""
    rows = store.index[numbers]
    return torch.from_numpy(np.stack([rows["height"], rows["width"], rows["transposed"].astype(np.int32)], 1))


class CacheReader:
    """Copies pictures out of the memory map, in threads. A thread lets go of the interpreter's lock once for all of its
    pictures, not once a picture: whoever trains would wait for the lock as often.

    Args:
        workers: threads.
        pin: into page-locked memory.
    """

    def __init__(self, store: ImageStore, workers: int, *, pin: bool) -> None:
        store.open_pixels()
        self.store, self.pin, self.workers = store, pin, max(workers, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of maps that must not be written to
            self._shards = [torch.from_numpy(shard) for shard in store.shards]
        self._pool = _single_threads(self.workers)

    def batches(self, numbers: Iterable[Indices]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in numbers:
            yield self.read(batch), sizes_of(self.store, batch)

    def read(self, numbers: Indices) -> Tensor:
        """(B, H, W, 3) uint8."""
        canvas = empty_canvas(len(numbers), *self.store.canvas, pin=self.pin)
        together = max(-(-len(numbers) // self.workers), COPIED_TOGETHER)
        waiting: list[Future[None]] = [
            self._pool.submit(self._copy, numbers[first : first + together], canvas[first : first + together])
            for first in range(0, len(numbers), together)
        ]
        for future in waiting:
            future.result()
        return canvas

    def _copy(self, numbers: Indices, canvas: Tensor) -> None:
        """Pictures into the upper left of their canvases; the rest is left as is."""
        records = self.store.index[numbers]
        places = zip(*(records[name].tolist() for name in ("shard", "offset", "height", "width")), strict=True)
        full_height, full_width = canvas.shape[1:3]
        whole, sources, targets = canvas.flatten(1).unbind(), [], []
        for place, (shard, offset, height, width) in enumerate(places):
            size = height * width * 3
            pixels = self._shards[shard][offset : offset + size]
            if width == full_width:  # one piece; every view costs a microsecond under the lock
                sources.append(pixels)
                targets.append(whole[place] if height == full_height else whole[place][:size])
            else:
                sources.append(pixels.view(height, -1))
                targets.append(whole[place].view(full_height, -1)[:height, : width * 3])
        torch._foreach_copy_(targets, sources)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _single_threads(count: int) -> ThreadPoolExecutor:
    """Threads in which torch's operations start no further ones; elsewhere torch's setting stays as it is."""
    before, ready = torch.get_num_threads(), threading.Barrier(count)

    def alone() -> None:
        torch.get_num_threads()  # a thread takes the common setting over at its first question, and must not later
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="zerofit-gather")
    for started in [pool.submit(alone) for _ in range(count)]:
        started.result()
    torch.set_num_threads(before)
    return pool


class FilesReader:
    """Decodes files in processes (torch's DataLoader), to the very pixels that the cache would hold.

    Args:
        workers: processes; 0 decodes here.
        prefetch_factor: pieces of `DECODED_TOGETHER` pictures that a process reads ahead; they lie in shared memory.
    """

    def __init__(self, store: ImageStore, workers: int, *, prefetch_factor: int, pin: bool) -> None:
        self.store, self.workers, self.prefetch_factor, self.pin = store, workers, prefetch_factor, pin

    def batches(self, numbers: Iterable[Indices]) -> Iterator[tuple[Tensor, Tensor]]:
        wanted, asked = tee(numbers)
        parts_of_all = (part for batch in asked for part in parts(batch, DECODED_TOGETHER))
        pieces = in_processes(_Files(self.store), parts_of_all, self.workers, self.prefetch_factor)
        for batch in wanted:
            canvas = empty_canvas(len(batch), *self.store.canvas, pin=self.pin)
            for part in parts(np.arange(len(batch)), DECODED_TOGETHER):
                canvas[part[0] : part[-1] + 1] = next(pieces)
            yield canvas, sizes_of(self.store, batch)

    def close(self) -> None:
        """Processes end with their iterator."""


def in_processes(
    dataset: torch.utils.data.Dataset[T], parts: Iterator[Indices], workers: int, prefetch_factor: int
) -> Iterator[T]:
    """What `dataset` makes of each part, in order; `workers` processes work ahead, 0 makes it here.

    Raises:
        DataError: a file has changed since it was prepared.
        ZerofitError: a process died.
    """
    more: dict[str, Any] = {}
    if workers:
        # Fresh processes: a fork would inherit this one's threads' locks and its GPU.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        more = {"multiprocessing_context": context, "prefetch_factor": prefetch_factor}
    chosen: Any = _Batches(parts)
    loader: Any = torch.utils.data.DataLoader(
        dataset, batch_sampler=chosen, num_workers=workers, collate_fn=_as_is, worker_init_fn=_start_worker, **more
    )
    try:
        yield from loader
    except DataError as error:  # a worker's comes with its traceback as text
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
    except RuntimeError as error:
        raise ZerofitError(
            f"A process that decodes pictures died ({error}). If shared memory ran out, give the machine or the "
            f"container a larger /dev/shm; else lower data.num_workers (0 decodes in the rank itself), or train "
            f"from the cache."
        ) from error


class _Batches(torch.utils.data.Sampler[Indices]):
    """Parts as they are given; DataLoader hands each to a worker whole."""

    def __init__(self, batches: Iterable[Indices]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Indices]:
        return iter(self._batches)


class _Files(torch.utils.data.Dataset[Tensor]):
    """What a worker does: some files, to canvases."""

    def __init__(self, store: ImageStore) -> None:
        self.store = store

    def __getitems__(self, numbers: Indices) -> Tensor:
        canvas = empty_canvas(len(numbers), *self.store.canvas, pin=False)
        for number, pixels in zip(numbers.tolist(), canvas.numpy(), strict=True):
            decode_file(self.store, number, pixels)
        return canvas


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; the rank decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, of metadata: the files were checked
    torch.set_num_threads(1)
