"""Files that a GPU decodes: processes read the bytes, nvJPEG decodes them, and one kernel lays a batch out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import tee

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.triton_use import agrees, use_triton
from ..order import Indices
from .ahead import Ahead
from .decode import MAX_ASPECT, import_pillow
from .processes import Processes
from .readers import parts
from .store import ImageStore
from .work import WholeFiles, decode_here

_log = logging.getLogger(__name__)

#: Files that a process hands over together, and bytes above which it hands over fewer.
READ_TOGETHER, READ_BYTES = 64, 4 << 20
#: Processes that keep up with a GPU's decoder when they only read; decoding what is no JPEG takes all that there are.
READING_PROCESSES = 4
#: Batches whose bytes are held: on the device, being decoded, waiting, and in the making.
BUFFERS = 4
#: Bytes of a picture from which the kernel's 32-bit distances end.
MAX_BYTES = 1 << 31

#: Encoded JPEGs -> their pixels (3, H, W) uint8 on the GPU.
GpuDecoder = Callable[[list[Tensor]], list[Tensor]]
Sizes = NDArray[np.int32]
#: A batch's numbers, its files as `GpuFilesReader._pixels_sent` gives them, and the pixels of those that are
#: JPEGs; None where the decoder refused.
Decoded = tuple[Indices, list[Tensor], list[Tensor] | None]


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

    out = io.BytesIO()
    import_pillow().new("RGB", (16, 16)).save(out, "JPEG")
    return out.getvalue()


class GpuFilesReader:
    """Decodes JPEGs on the GPU and everything else with Pillow in processes; batches come out on `device`.

    A picture with a shorter side above twice ``cache_size`` is shrunk by itself; the rest is cropped from its full size
    by the augmentation, which filters as it shrinks. So pixels differ a little from the cache's.

    Files are read in processes, not in threads: opening and reading hundreds a batch would keep the interpreter's lock
    busy, which the training needs for every kernel that it starts.

    Args:
        decoder: see `nvjpeg`.
        workers: processes; 0 reads here.
        prefetch_factor: pieces that a process reads ahead.
    """

    def __init__(
        self, store: ImageStore, device: torch.device, decoder: GpuDecoder, workers: int, prefetch_factor: int = 2
    ) -> None:
        self.store, self.device, self.decoder = store, device, decoder
        only_jpegs = bool(store.index["plain_jpeg"].all())
        readers = min(workers, READING_PROCESSES) if only_jpegs else workers
        self._files = Processes(WholeFiles(store), readers, prefetch_factor, READ_BYTES)
        self._buffers: dict[tuple[int, int], Tensor] = {}
        self.size = int(store.meta["request"]["cache_size"])
        self._told = False

    def batches(self, numbers: Iterable[Indices]) -> Iterator[tuple[Tensor, Tensor]]:
        on_gpu = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device) if on_gpu else None  # of this thread; the others join it

        def inside() -> AbstractContextManager[object]:
            return torch.cuda.stream(stream) if on_gpu else nullcontext()

        # Three threads, which mostly wait: one takes bytes, one calls the decoder, this one lays out.
        ahead = Ahead(self._decoded(Ahead(self._encoded(numbers), 1, inside)), 1, inside)
        try:
            while (batch := next(ahead, None)) is not None:
                laid_out = self._laid_out(*batch)
                del batch  # its pictures are as large as the canvases
                yield laid_out
        finally:
            ahead.close()

    def _decoded(self, batches: Ahead[tuple[Indices, list[Tensor]]]) -> Iterator[Decoded]:
        try:
            for numbers, encoded in batches:
                yield numbers, encoded, self._decode_jpegs([data for data in encoded if data.ndim == 1])
        finally:
            batches.close()

    def _encoded(self, numbers: Iterable[Indices]) -> Iterator[tuple[Indices, list[Tensor]]]:
        """Each batch and its files as `_pixels_sent` gives them, taken from the processes while the last is decoded."""
        wanted, asked = tee(numbers)
        room = READ_BYTES * 3 // 4  # files differ in size
        together = min(max(room // max(self.store.mean_file_bytes, 1), 1), READ_TOGETHER)
        pieces = self._files.pieces(part for batch in asked for part in parts(batch, together))
        for turn, batch in enumerate(wanted):
            encoded = []
            for place, part in enumerate(parts(batch, together)):
                data, lengths = next(pieces)
                encoded += self._pixels_sent(part, self._copied(data, turn % BUFFERS, place), lengths)
            yield batch, encoded

    def _copied(self, data: NDArray[np.uint8], turn: int, place: int) -> Tensor:
        """In page-locked memory of this reader, which is used again `BUFFERS` batches later, when the decoder has done
        with it."""
        buffer = self._buffers.get((turn, place))
        if buffer is None or len(buffer) < len(data):
            on_gpu = self.device.type == "cuda"
            buffer = torch.empty(len(data) * 5 // 4, dtype=torch.uint8, pin_memory=on_gpu)
            self._buffers[turn, place] = buffer
        buffer.numpy()[: len(data)] = data
        return buffer[: len(data)]

    def _pixels_sent(self, numbers: Indices, data: Tensor, lengths: list[int]) -> list[Tensor]:
        """A JPEG's bytes, (n,) uint8 on the CPU; the pixels of anything else, (3, H, W) on the device."""
        found = list(data.split(lengths))
        rows = self.store.index[numbers]
        others = np.flatnonzero(rows["plain_jpeg"] == 0).tolist()
        if others:
            there = data.to(self.device).split(lengths)
            for place in others:
                shape = int(rows["height"][place]), int(rows["width"][place]), 3
                found[place] = there[place].view(shape).permute(2, 0, 1)
        return found

    def _laid_out(
        self, numbers: Indices, encoded: list[Tensor], decoded: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Canvases and sizes on the device."""
        rows = self.store.index[numbers]
        pictures = list(encoded)
        jpegs = [place for place, data in enumerate(encoded) if data.ndim == 1]
        turns = np.ones(len(numbers), np.int64)
        if decoded is None:
            for place in jpegs:
                pixels = decode_here(self.store, int(numbers[place]))
                pictures[place] = torch.from_numpy(pixels).to(self.device).permute(2, 0, 1)
        else:
            for place, picture in zip(jpegs, decoded, strict=True):
                pictures[place] = picture
            turns[jpegs] = rows["orientation"][jpegs]
        canvas, sizes = lay_out(pictures, turns, self.size, self.device)
        as_kept = np.ones(len(numbers), bool)  # what Pillow decoded lies as in the cache
        if decoded is not None:
            as_kept[jpegs] = False
        sizes[as_kept, 2] = rows["transposed"][as_kept]
        there = torch.from_numpy(sizes).to(self.device, non_blocking=True)
        if self.device.type == "cuda":
            # The decoder writes on a stream of its own into memory that is free for this thread's stream, where the
            # kernel that still reads it would not be waited for.
            torch.cuda.current_stream(self.device).record_event().synchronize()
        return canvas.permute(0, 2, 3, 1), there

    def _decode_jpegs(self, encoded: list[Tensor]) -> list[Tensor] | None:
        """(3, H, W) each on the device; None where the decoder refuses, and Pillow is to decode in its stead."""
        try:
            return self.decoder(encoded) if encoded else []
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # it does not say which file
            if not self._told:
                _log.warning("The GPU's decoder refused a batch, and Pillow decodes such batches: %s", error)
                self._told = True
            return None

    def close(self) -> None:
        """End the processes."""
        self._files.close()


def lay_out(
    pictures: Sequence[Tensor], turns: Indices, size: int, device: torch.device
) -> tuple[Tensor, Sizes]:  # fmt: skip
    """Turn pictures upright, shrink large ones, cut panoramas, and lay each into the upper left of a canvas.

    Args:
        pictures: (3, H, W) uint8 each, on `device`, any strides.
        turns: (B,) EXIF orientation, 1 to 8.
        size: a shorter side above twice this is shrunk to it.

    Returns: canvases (B, 3, height, width) uint8, and sizes (B, 3): height and width filled, and whether rows and
    columns are exchanged, because the picture is higher than wide.
    """
    small = all(picture.nbytes < MAX_BYTES for picture in pictures)
    if small and use_triton(pictures[0]) and _kernel_agrees(device):
        return lay_out_with_triton(pictures, turns, size, device)
    return lay_out_with_torch(pictures, turns, size, device)


def lay_out_with_triton(
    pictures: Sequence[Tensor], turns: Indices, size: int, device: torch.device
) -> tuple[Tensor, Sizes]:  # fmt: skip
    """`lay_out` in one kernel, which reads the pictures where they lie; large ones by Pillow's filter."""
    from ...kernels import pictures_triton

    table, boxes, sizes = plan_layout(pictures, turns, size)
    shape = len(pictures), 3, int(sizes[:, 0].max()), int(sizes[:, 1].max())
    canvas = torch.empty(shape, dtype=torch.uint8, device=device)
    there, parts_there = (torch.from_numpy(array).to(device, non_blocking=True) for array in (table, boxes))
    canvas = pictures_triton.lay_out(there, parts_there, canvas)
    return canvas, sizes


def plan_layout(
    pictures: Sequence[Tensor], turns: Indices, size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], Sizes]:
    """(table, boxes) as `zerofit.kernels.pictures_triton.lay_out` takes them, and sizes as `lay_out` gives them."""
    known = np.array([(p.data_ptr(), *p.stride(), *p.shape[1:]) for p in pictures], np.int64)
    address, channel, row, column, height, width = known.T.copy()
    turned = turns >= 5
    row, column = np.where(turned, column, row), np.where(turned, row, column)
    height, width = np.where(turned, width, height), np.where(turned, height, width)
    # EXIF: 2, 3, 7 and 6 mirror left and right after that; 3, 4, 7 and 8 top and bottom.
    across, down = np.isin(turns, (2, 3, 6, 7)), np.isin(turns, (3, 4, 7, 8))
    address += np.where(across, (width - 1) * column, 0) + np.where(down, (height - 1) * row, 0)
    row, column = np.where(down, -row, row), np.where(across, -column, column)
    shorter = np.minimum(height, width)
    large = shorter > 2 * size
    small_height = np.where(large, size * height // shorter, height)
    small_width = np.where(large, size * width // shorter, width)
    most = (MAX_ASPECT * np.minimum(small_height, small_width)).astype(np.int64)
    cut_height, cut_width = np.minimum(small_height, most), np.minimum(small_width, most)
    ratio_y, ratio_x = height / small_height, width / small_width
    top, left = (small_height - cut_height) // 2 * ratio_y, (small_width - cut_width) // 2 * ratio_x
    box = np.stack([top, left, cut_height * ratio_y, cut_width * ratio_x], 1)
    standing = cut_height > cut_width
    table = np.stack([address, channel, row, column, height, width, cut_height, cut_width], 1)
    table[standing] = table[standing][:, [0, 1, 3, 2, 5, 4, 7, 6]]
    box[standing] = box[standing][:, [1, 0, 3, 2]]
    sizes = np.concatenate([table[:, 6:], standing[:, None]], 1).astype(np.int32)
    return table, box.astype(np.float32), sizes


def lay_out_with_torch(
    pictures: Sequence[Tensor], turns: Indices, size: int, device: torch.device
) -> tuple[Tensor, Sizes]:  # fmt: skip
    """`lay_out` picture by picture."""
    lying, sizes = [], []
    for picture, orientation in zip(pictures, turns.tolist(), strict=True):
        upright, transposed = _lying(picture, orientation, size)
        lying.append(upright)
        sizes.append((upright.shape[1], upright.shape[2], int(transposed)))
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    canvas = torch.empty((len(lying), 3, height, width), dtype=torch.uint8, device=device)
    filled = [
        whole if size[:2] == (height, width) else whole[:, : size[0], : size[1]]
        for whole, size in zip(canvas.unbind(), sizes, strict=True)
    ]
    torch._foreach_copy_(filled, lying)
    return canvas, np.array(sizes, np.int32)


def _lying(picture: Tensor, orientation: int, size: int) -> tuple[Tensor, bool]:
    """(3, H, W) turned upright, shrunk where it is large, with width >= height; and whether it was transposed."""
    if orientation >= 5:
        picture = picture.transpose(1, 2)
    flips = [axis for axis, those in ((2, (2, 3, 6, 7)), (1, (3, 4, 7, 8))) if orientation in those]
    if flips:
        picture = picture.flip(flips)
    height, width = picture.shape[1:]
    shorter = min(height, width)
    if shorter > 2 * size:
        shape = [size * side // shorter for side in (height, width)]
        small = torch.nn.functional.interpolate(picture[None].float(), shape, mode="bilinear", antialias=True)
        picture = small[0].round().to(torch.uint8)
        height, width = shape
    most = int(MAX_ASPECT * min(height, width))
    if max(height, width) > most:
        top, left = max(height - most, 0) // 2, max(width - most, 0) // 2
        picture = picture[:, top : top + min(height, most), left : left + min(width, most)]
    return (picture.transpose(1, 2), True) if height > width else (picture, False)


@cache
def _kernel_agrees(device: torch.device) -> bool:
    """Whether the kernel lays small pictures out as PyTorch's operations do; once a process and device."""
    random = torch.Generator().manual_seed(0)
    shapes = [(20, 33), (33, 20), (20, 20), (21, 64), (50, 70), (90, 70), (12, 17), (40, 9)]
    pictures = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=random).to(device) for shape in shapes]
    turns = np.arange(1, 9)

    def only_filled(found: tuple[Tensor, Sizes]) -> list[Tensor]:
        canvas, sizes = found
        return [torch.from_numpy(sizes), *(c[:, :h, :w] for c, (h, w, _) in zip(canvas, sizes.tolist(), strict=True))]

    return agrees(
        "laying out pictures",
        lambda: only_filled(lay_out_with_triton(pictures, turns, 16, device)),
        lambda: only_filled(lay_out_with_torch(pictures, turns, 16, device)),
        "PyTorch's operations take its place, several a picture",
    )
