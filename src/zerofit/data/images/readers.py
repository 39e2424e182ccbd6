"""From the numbers of pictures to a canvas of pixels: out of the cache, or out of the files."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import tee
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError, ZerofitError
from ..order import Indices
from .decode import MAX_ASPECT, RESIZERS, BadPicture, Limits, decode
from .store import ImageStore

_log = logging.getLogger(__name__)

#: Pictures that a thread copies at a time, and that a process decodes.
COPIED_TOGETHER, DECODED_TOGETHER = 16, 32

#: What the accepted files were checked with no longer matters when they are read again.
ANYTHING = Limits(min_side=1, max_pixels=1 << 62)


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


def _parts(numbers: Indices, size: int) -> list[Indices]:
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]


def sizes_of(store: ImageStore, numbers: Indices) -> Tensor:
    """(B, 3) int32: height, width, transposed."""
    rows = store.index[numbers]
    return torch.from_numpy(np.stack([rows["height"], rows["width"], rows["transposed"].astype(np.int32)], 1))


class CacheReader:
    """Copies pictures out of the memory map, in threads: numpy lets go of the interpreter while it copies.

    Args:
        workers: threads.
        pin: into page-locked memory.
    """

    def __init__(self, store: ImageStore, workers: int, *, pin: bool) -> None:
        store.open_pixels()
        self.store, self.pin = store, pin
        self._pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="zerofit-gather")

    def batches(self, numbers: Iterable[Indices]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in numbers:
            yield self.read(batch), sizes_of(self.store, batch)

    def read(self, numbers: Indices) -> Tensor:
        """(B, H, W, 3) uint8."""
        canvas = empty_canvas(len(numbers), *self.store.canvas, pin=self.pin)
        out = canvas.numpy()
        waiting: list[Future[None]] = [
            self._pool.submit(self.store.gather, numbers[first : first + COPIED_TOGETHER], out[first:])
            for first in range(0, len(numbers), COPIED_TOGETHER)
        ]
        for future in waiting:
            future.result()
        return canvas

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


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
        pieces = self._pieces(part for batch in asked for part in _parts(batch, DECODED_TOGETHER))
        for batch in wanted:
            canvas = empty_canvas(len(batch), *self.store.canvas, pin=self.pin)
            for part in _parts(np.arange(len(batch)), DECODED_TOGETHER):
                canvas[part[0] : part[-1] + 1] = next(pieces)
            yield canvas, sizes_of(self.store, batch)

    def _pieces(self, parts: Iterator[Indices]) -> Iterator[Tensor]:
        """Canvases of a few pictures each, in order.

        Raises:
            DataError: a file has changed since it was prepared.
            ZerofitError: a process died.
        """
        more: dict[str, Any] = {}
        if self.workers:
            # Fresh processes: a fork would inherit this one's threads' locks and its GPU.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            more = {"multiprocessing_context": context, "prefetch_factor": self.prefetch_factor}
        chosen: Any = _Batches(parts)
        loader: Any = torch.utils.data.DataLoader(
            _Files(self.store),
            batch_sampler=chosen,
            num_workers=self.workers,
            collate_fn=_as_is,
            worker_init_fn=_start_worker,
            **more,
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

    def close(self) -> None:
        """Processes end with their iterator."""


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


def decode_file(store: ImageStore, number: int, out: np.ndarray[Any, Any]) -> None:
    """Decode a file into the upper left of `out` (H, W, 3), as the cache would hold it.

    Raises:
        DataError: the file has changed since it was prepared.
    """
    path, record = store.paths[number], store.index[number]
    try:
        size, resize = store.meta["request"]["cache_size"], RESIZERS[store.meta["resize"]]
        pixels = decode(Path(path).read_bytes(), size, ANYTHING, resize).pixels
    except (OSError, BadPicture) as error:
        raise DataError(
            f"{path} cannot be read any more ({error}). Prepare the pictures again with --force."
        ) from error
    height, width = int(record["height"]), int(record["width"])
    if pixels.shape[:2] != (height, width):
        raise DataError(f"{path} has changed since it was prepared. Prepare the pictures again with --force.")
    out[:height, :width] = pixels


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; the rank decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, of metadata: the files were checked
    torch.set_num_threads(1)


#: Encoded JPEGs -> their pixels (3, H, W) uint8 on the GPU.
GpuDecoder = Callable[[list[Tensor]], list[Tensor]]


def nvjpeg(device: torch.device) -> GpuDecoder | None:
    """torchvision's decoder on `device`, or None where torchvision is missing or does not work."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        probe = torch.frombuffer(bytearray(_small_jpeg()), dtype=torch.uint8)
        decode_jpeg([probe], mode=ImageReadMode.RGB, device=device)
    except (
        ImportError,
        RuntimeError,
        AttributeError,
        TypeError,
        OSError,
    ):  # what a torchvision of another torch raises
        return None

    def decoder(encoded: list[Tensor]) -> list[Tensor]:
        found: list[Tensor] = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
        return found

    return decoder


def _small_jpeg() -> bytes:
    import io

    from .decode import import_pillow

    out = io.BytesIO()
    import_pillow().new("RGB", (16, 16)).save(out, "JPEG")
    return out.getvalue()


class GpuFilesReader:
    """Decodes JPEGs on the GPU and everything else in threads; batches come out on `device`.

    A picture with a shorter side above twice ``cache_size`` is shrunk by itself; the rest is cropped from its full size
    by the augmentation, which filters as it shrinks. So pixels differ a little from the cache's.

    Args:
        decoder: see `nvjpeg`.
        workers: threads that read files.
    """

    def __init__(self, store: ImageStore, device: torch.device, decoder: GpuDecoder, workers: int) -> None:
        self.store, self.device, self.decoder = store, device, decoder
        self.size = int(store.meta["request"]["cache_size"])
        self._pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="zerofit-files")
        self._told = False

    def batches(self, numbers: Iterable[Indices]) -> Iterator[tuple[Tensor, Tensor]]:
        source = iter(numbers)
        ahead = self._submit(next(source, None))
        while ahead is not None:
            current, loading = ahead
            ahead = self._submit(next(source, None))
            yield self._decode(current, [data for part in loading for data in part.result()])

    def _submit(self, numbers: Indices | None) -> tuple[Indices, list[Future[list[Tensor]]]] | None:
        if numbers is None:
            return None
        return numbers, [self._pool.submit(self._load, part) for part in _parts(numbers, COPIED_TOGETHER)]

    def _load(self, numbers: Indices) -> list[Tensor]:
        """A JPEG's bytes, (n,) uint8; the pixels of anything else, (H, W, 3) as the cache would hold them."""
        found = []
        for number in numbers.tolist():
            record = self.store.index[number]
            if record["plain_jpeg"]:
                try:
                    found.append(torch.from_numpy(np.fromfile(self.store.paths[number], np.uint8)))
                except OSError as error:
                    raise DataError(
                        f"{self.store.paths[number]} cannot be read any more ({error.strerror})."
                    ) from error
            else:
                found.append(self._decode_here(number))
        return found

    def _decode_here(self, number: int) -> Tensor:
        record = self.store.index[number]
        pixels = np.empty((int(record["height"]), int(record["width"]), 3), np.uint8)
        decode_file(self.store, number, pixels)
        return torch.from_numpy(pixels)

    def _decode(self, numbers: Indices, encoded: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Canvases and sizes on the device."""
        pixels = self._decode_jpegs(numbers, encoded)
        rows = self.store.index[numbers]
        lying, sizes = [], []
        turns = zip(rows["orientation"].tolist(), rows["transposed"].tolist(), strict=True)
        for place, (orientation, transposed) in enumerate(turns):
            if place in pixels:
                picture, transposed = self._lying(pixels[place], orientation)
            else:
                picture = encoded[place].to(self.device, non_blocking=True).permute(2, 0, 1)
            lying.append(picture)
            sizes.append((picture.shape[1], picture.shape[2], int(transposed)))
        height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
        canvas = torch.empty((len(lying), 3, height, width), dtype=torch.uint8, device=self.device)
        filled = [
            whole if size[:2] == (height, width) else whole[:, : size[0], : size[1]]
            for whole, size in zip(canvas.unbind(), sizes, strict=True)
        ]
        torch._foreach_copy_(filled, lying)
        return canvas.permute(0, 2, 3, 1), torch.tensor(sizes, dtype=torch.int32).to(self.device, non_blocking=True)

    def _decode_jpegs(self, numbers: Indices, encoded: list[Tensor]) -> dict[int, Tensor]:
        """Place -> (3, H, W) on the device, of what is a JPEG. Where the decoder refuses, Pillow decodes in its stead,
        and what it made takes the place of the bytes in `encoded`."""
        jpegs = [place for place, data in enumerate(encoded) if data.ndim == 1]
        try:
            return dict(zip(jpegs, self.decoder([encoded[place] for place in jpegs]) if jpegs else [], strict=True))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # it does not say which file
            if not self._told:
                _log.warning("The GPU's decoder refused a batch, and Pillow decodes such batches: %s", error)
                self._told = True
            for place in jpegs:
                encoded[place] = self._decode_here(int(numbers[place]))
            return {}

    def _lying(self, picture: Tensor, orientation: int) -> tuple[Tensor, bool]:
        """(3, H, W) turned upright, shrunk where it is large, with width >= height; and whether it was transposed."""
        if orientation >= 5:
            picture = picture.transpose(1, 2)
        # EXIF: 2, 3, 7 and 6 mirror left and right after that; 3, 4, 7 and 8 top and bottom.
        flips = [axis for axis, those in ((2, (2, 3, 6, 7)), (1, (3, 4, 7, 8))) if orientation in those]
        if flips:
            picture = picture.flip(flips)
        height, width = picture.shape[1:]
        shorter = min(height, width)
        if shorter > 2 * self.size:
            shape = [int(self.size * side / shorter) for side in (height, width)]
            small = torch.nn.functional.interpolate(picture[None].float(), shape, mode="bilinear", antialias=True)
            picture = small[0].round().to(torch.uint8)
            height, width = shape
        most = int(MAX_ASPECT * min(height, width))
        if max(height, width) > most:
            top, left = max(height - most, 0) // 2, max(width - most, 0) // 2
            picture = picture[:, top : top + min(height, most), left : left + min(width, most)]
        return (picture.transpose(1, 2), True) if height > width else (picture, False)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
