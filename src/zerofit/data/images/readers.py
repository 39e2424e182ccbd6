"""From the numbers of pictures to a canvas of pixels: out of the cache, or out of the files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import tee
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..order import Indices
from .processes import Processes
from .room import COPIED_TOGETHER, DECODED_TOGETHER
from .store import ImageStore
from .work import Bytes, Canvases

_log = logging.getLogger(__name__)


class Reader(Protocol):
    """Reads batches in the order in which they are asked for."""

    @property
    def device(self) -> torch.device | None:
        """Where canvases come out; None: on the CPU."""

    def batches(self, numbers: Iterable[Indices]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each batch of index rows: canvases (B, H, W, 3) uint8, and sizes (B, 3) int32: the height and width that
        are filled, and whether rows and columns are exchanged. `numbers` may be walked in another thread."""

    def close(self) -> None:
        """Stop the processes."""


def parts(numbers: Indices, size: int) -> list[Indices]:
    """Pieces of `size`; the last may be shorter."""
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]


def sizes_of(store: ImageStore, numbers: Indices) -> Tensor:
    """(B, 3) int32: height, width, transposed."""
    rows = store.index[numbers]
    return torch.from_numpy(np.stack([rows["height"], rows["width"], rows["transposed"].astype(np.int32)], 1))


class CanvasReader:
    """Pictures out of the cache, or decoded from their files to the very pixels that the cache would hold.

    Args:
        work: says which.
        workers: processes; 0 reads in the calling thread.
        micro_batch: pictures of a batch, at most.
        prefetch_factor: pieces that a process reads ahead.
        device: the GPU on which canvases come out; what the processes fill is then page-locked. None: the CPU.
        pin: canvases on the CPU are page-locked.
    """

    def __init__(
        self,
        work: Canvases,
        workers: int,
        micro_batch: int,
        *,
        prefetch_factor: int,
        device: torch.device | None,
        pin: bool,
    ) -> None:
        self.store, self.device, self.pin = work.store, device, pin
        self.together = min(DECODED_TOGETHER if work.decoded else COPIED_TOGETHER, micro_batch)
        self._processes = Processes(work, workers, prefetch_factor, self.together * work.bytes_each)
        on_gpu = device is not None and device.type == "cuda"
        self._locked = [memory for memory in self._processes.memories if on_gpu and page_lock(memory)]

    def batches(self, numbers: Iterable[Indices]) -> Iterator[tuple[Tensor, Tensor]]:
        wanted, asked = tee(numbers)
        pieces = self._processes.pieces(part for batch in asked for part in parts(batch, self.together))
        for batch in wanted:
            canvas = self._empty(len(batch))
            for first in range(0, len(batch), self.together):
                target = canvas[first : first + self.together]
                data, _ = next(pieces)
                # Waits for the copy (without the interpreter's lock): the next piece may be written over this one.
                target.copy_(torch.from_numpy(data).view(target.shape))
            yield canvas, sizes_of(self.store, batch)

    def _empty(self, samples: int) -> Tensor:
        shape, pin = (samples, *self.store.canvas, 3), self.pin and self.device is None
        return torch.empty(shape, dtype=torch.uint8, device=self.device, pin_memory=pin)

    def close(self) -> None:
        while self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._locked.pop().ctypes.data)
        self._processes.close()


def page_lock(memory: Bytes) -> bool:
    """Lock memory of this process, so that the GPU copies from it at full speed; False where that is refused."""
    code = int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
    if code == 0:
        return True
    _log.warning("Memory for pictures could not be page-locked (CUDA error %d): copies to the GPU take longer.", code)
    with suppress(RuntimeError):  # the next kernel would report this call's error as its own
        torch.zeros(1, device="cuda")
    return False
