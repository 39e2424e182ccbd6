"""From pictures to the accumulation windows of one rank; whatever a batch needs is done ahead, in other threads.

A batch's inputs, of B pictures:

    images   (B, 3, H, W) uint8, channels-last in memory: each picture in the upper left of its canvas, lying
    sizes    (B, 3) int32: height and width that are filled, and 1 where rows and columns are exchanged
    targets  (B,) int64, `IGNORE` for padding
    seeds    (B,) int64: what is random about a sample is made from this (`zerofit.data.augment`)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from ...types import Batch
from ..loader import IGNORE, Share
from ..order import Indices
from .ahead import Ahead
from .dataset import ImageDataset
from .gpu_files import GpuFilesReader, nvjpeg
from .readers import CanvasReader, Reader
from .room import MAX_CACHE_PROCESSES, stays_on_host, windows_ahead
from .shards import usable_cores
from .work import Canvases

#: Samples whose pictures and keys are computed at a time.
PLANNED_SAMPLES = 8192


@dataclass(frozen=True)
class ReadPlan:
    """How a rank reads.

    Attributes:
        read: from the ``cache`` or the ``files``.
        device: batches are brought there ahead, on a stream of their own; None leaves them on the CPU. On a GPU,
            files that are JPEGs are decoded there where torchvision works.
        num_workers: processes; None chooses.
        prefetch_factor: windows that are made ahead.
        pin_memory: page-locked batches.
    """

    read: Literal["cache", "files"] = "cache"
    device: torch.device | None = None
    num_workers: int | None = None
    prefetch_factor: int = 2
    pin_memory: bool = False

    def workers(self, share: Share) -> int:
        """Processes that read: as set, else the rank's share of the cores; a cache for a CPU is read without, since
        whoever trains there hardly needs the interpreter's lock."""
        if self.num_workers is not None:
            return self.num_workers
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", share.world_size))
        cores = max(usable_cores() // ranks_here, 1)
        if self.read == "files":
            return cores
        return min(cores, MAX_CACHE_PROCESSES) if self.device is not None else 0

    def open(self, dataset: ImageDataset, share: Share, *, training: bool, stays: bool = False) -> Reader:
        """The reader. Evaluation decodes as Pillow does, so that its pixels do not depend on the machine.

        Args:
            stays: canvases stay on the CPU, unless the GPU decodes them.

        Raises:
            DataError: the cache is damaged, or there is none.
        """
        store, workers = dataset.store, self.workers(share)
        if self.read == "cache":
            store.open_pixels()
        elif training and self.device is not None and self.device.type == "cuda":
            decoder = nvjpeg(self.device)
            if decoder is not None:
                return GpuFilesReader(store, self.device, decoder, workers, self.prefetch_factor)
        return CanvasReader(
            Canvases(store, decoded=self.read == "files"),
            workers,
            share.micro_batch,
            prefetch_factor=self.prefetch_factor,
            device=None if stays else self.device,
            pin=self.pin_memory,
        )


@cache
def _stream_of(device: torch.device) -> Any:
    """One for all readers of a process: what one lets go of, another takes, which PyTorch keeps apart by stream.

    Preferred: a few short kernels and copies a batch, which would else queue behind the training's.
    """
    return torch.cuda.Stream(device, priority=-1)


class _Device:
    """Brings batches to a GPU on the readers' stream, and makes the stream that uses them wait."""

    def __init__(self, device: torch.device | None, *, pin: bool) -> None:
        self.device, self.pin = device, pin
        self._stream = _stream_of(device) if device is not None and device.type == "cuda" else None

    def inside(self) -> AbstractContextManager[object]:
        """What the thread that makes batches enters."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def send(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Start the copies."""
        if self.device is None:
            return {name: tensor.pin_memory() for name, tensor in inputs.items()} if self.pin else inputs
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}

    def mark(self) -> Any:
        """An event after all that was started so far; None without a GPU."""
        return None if self._stream is None else self._stream.record_event()

    def receive(self, batches: Sequence[Batch], ready: Any) -> None:
        """Let the current stream use the batches."""
        if ready is None:
            return
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ready)
        for batch in batches:
            for tensor in batch.inputs.values():
                tensor.record_stream(current)


class ImageLoader:
    """A rank's windows by step, `prefetch_factor` of them made ahead.

    The data cursor is the step: step s takes the samples ``s * global_batch`` to ``(s + 1) * global_batch``.
    """

    def __init__(self, dataset: ImageDataset, share: Share, plan: ReadPlan | None = None) -> None:
        self.dataset, self.share, self.plan = dataset, share, plan or ReadPlan()
        stays = stays_on_host(self.window_bytes, self.plan.prefetch_factor)
        self._reader = self.plan.open(dataset, share, training=True, stays=stays)
        self._device = _Device(self._reader.device, pin=self.plan.pin_memory)
        self._ahead: Ahead[tuple[list[Batch], Any]] | None = None
        self._next_step = -1

    @property
    def window_bytes(self) -> int:
        """Of a window's canvases. Those of files that a GPU decodes may take more: their canvas is that of the largest
        picture of the batch."""
        height, width = self.dataset.store.canvas
        return self.share.micro_batch * self.share.accumulation_steps * height * width * 3

    @property
    def bytes_ahead(self) -> int:
        """Of the windows that are there at once, on the device or, where they stay there, on the CPU."""
        return self.window_bytes * windows_ahead(self.plan.prefetch_factor)

    def window(self, step: int) -> list[Batch]:
        """The accumulation window of `step`: ``accumulation_steps`` batches of ``micro_batch`` samples.

        Raises:
            DataError: a file is not what it was when it was prepared.
        """
        if self._ahead is None or step != self._next_step:
            self._restart(step)
        assert self._ahead is not None
        self._next_step = step + 1
        batches, ready = next(self._ahead)
        self._device.receive(batches, ready)
        return batches

    def epoch_of_step(self, step: int) -> int:
        """Epoch of the first sample of `step`."""
        return step * self.share.global_batch // self.dataset.samples

    def close(self) -> None:
        """Stop what reads ahead."""
        if self._ahead is not None:
            self._ahead.close()
        self._reader.close()

    def _restart(self, step: int) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = Ahead(self._windows(step), self.plan.prefetch_factor, self._device.inside)

    def _firsts(self, step: int) -> Iterator[int]:
        """First sample of each micro-batch from `step` on."""
        while True:
            yield from (step * self.share.global_batch + offset for offset in self.share.offsets())
            step += 1

    def _planned(self, step: int) -> Iterator[tuple[Indices, Indices]]:
        """(places, keys) of each micro-batch from `step` on; thousands of samples at a time, because the arithmetic
        of one micro-batch takes as long and holds the interpreter's lock."""
        firsts, size = self._firsts(step), self.share.micro_batch
        together = max(PLANNED_SAMPLES // size, 1)
        while True:
            some = np.array(list(islice(firsts, together)), np.int64)
            sequence = (some[:, None] + np.arange(size)).ravel()
            places, keys = self.dataset.indices_of(sequence), self.dataset.keys_of(sequence)
            yield from zip(places.reshape(-1, size), keys.reshape(-1, size), strict=True)

    def _windows(self, step: int) -> Iterator[tuple[list[Batch], Any]]:
        dataset, size = self.dataset, self.share.micro_batch
        # The reader may walk its plan in another thread, so it has one of its own.
        read = self._reader.batches(dataset.numbers[places] for places, _ in self._planned(step))
        window = list[Batch]()
        for places, keys in self._planned(step):
            canvas, sizes = next(read)
            inputs = {
                "sizes": sizes,
                "targets": torch.from_numpy(dataset.labels[places]),
                "seeds": torch.from_numpy(keys),
                "images": canvas.permute(0, 3, 1, 2),  # last: what is small and not page-locked does not wait for it
            }
            window.append(Batch(self._device.send(inputs), size))
            if len(window) == self.share.accumulation_steps:
                yield window, self._device.mark()
                window = []


class ImageEvaluation(Sequence[Batch]):
    """This rank's part of a split, or of `batches` global batches spread evenly over it.

    The samples do not depend on the number of ranks; where they do not divide evenly the rest is padding of weight 0,
    so that every sample counts once and every rank brings equally many batches. Each pass reads again, ahead.

    Args:
        batches: None evaluates the whole split.
    """

    def __init__(
        self, dataset: ImageDataset, share: Share, plan: ReadPlan | None = None, batches: int | None = None
    ) -> None:
        self.dataset, self.share, self.plan = dataset, share, plan or ReadPlan()
        self.places = dataset.spread_indices(
            len(dataset.numbers) if batches is None else batches * share.micro_batch * share.world_size
        )
        self._device = _Device(self.plan.device, pin=self.plan.pin_memory)

    def __len__(self) -> int:
        return -(-len(self.places) // (self.share.micro_batch * self.share.world_size))

    def __iter__(self) -> Iterator[Batch]:
        return self._read(range(len(self)))

    @overload
    def __getitem__(self, place: int) -> Batch: ...

    @overload
    def __getitem__(self, place: slice) -> list[Batch]: ...

    def __getitem__(self, place: int | slice) -> Batch | list[Batch]:
        chosen = range(len(self))[place]
        return next(self._read([chosen])) if isinstance(chosen, int) else list(self._read(chosen))

    def _mine(self, number: int) -> Indices:
        first = (number * self.share.world_size + self.share.rank) * self.share.micro_batch
        return self.places[first : first + self.share.micro_batch]

    def _read(self, numbers: Sequence[int]) -> Iterator[Batch]:
        reader = self.plan.open(self.dataset, self.share, training=False)
        ahead = Ahead(self._batches(reader, numbers), self.plan.prefetch_factor, self._device.inside)
        try:
            for batch, ready in ahead:
                self._device.receive([batch], ready)
                yield batch
        finally:
            ahead.close()
            reader.close()

    def _batches(self, reader: Reader, numbers: Sequence[int]) -> Iterator[tuple[Batch, Any]]:
        mine = [self._mine(number) for number in numbers]
        filled = [self.dataset.numbers[places] for places in mine if len(places)]
        read = reader.batches(filled)
        for places in mine:
            canvas, sizes = next(read) if len(places) else self._nothing()
            inputs = _padded(canvas, sizes, self.dataset.labels[places], self.share.micro_batch)
            yield Batch(self._device.send(inputs), len(places)), self._device.mark()

    def _nothing(self) -> tuple[Tensor, Tensor]:
        height, width = self.dataset.store.canvas
        return torch.zeros((0, height, width, 3), dtype=torch.uint8), torch.zeros((0, 3), dtype=torch.int32)


def _padded(canvas: Tensor, sizes: Tensor, labels: Indices, size: int) -> dict[str, Tensor]:
    """Inputs of `size` samples; those beyond the labels are black and count for nothing. Seeds are not used here."""
    missing = size - len(canvas)
    height, width = canvas.shape[1:3]
    if missing:
        canvas = torch.cat([canvas, canvas.new_zeros((missing, height, width, 3))])
        whole = torch.tensor([[height, width, 0]], dtype=torch.int32).expand(missing, 3)
        sizes = torch.cat([sizes.cpu(), whole])
    targets = np.concatenate([labels, np.full(missing, IGNORE, np.int64)])
    return {
        "images": canvas.permute(0, 3, 1, 2),
        "sizes": sizes,
        "targets": torch.from_numpy(targets),
        "seeds": torch.zeros(size, dtype=torch.int64),
    }
