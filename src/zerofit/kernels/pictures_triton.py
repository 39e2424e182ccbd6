# mypy: ignore-errors
# (Triton's decorator and its tensors have no types; the callers, which do, are checked.)
"""Triton kernels that cut, resample and lay out pictures. Imported only where Triton is installed.

The filter is Pillow's bilinear one (``Resample.c``): a triangle as wide as the shrinking, at least one pixel to each
side, whose weights are divided by their sum. Both axes are done in one pass, in fp32: a pixel of the result adds up
the pixels of its window, 4 where a picture is enlarged and ``ceil(2 s)^2`` where it is shrunk by s. A batch is one
launch where PyTorch's operations were more than a hundred, which on a slow host cost more than the arithmetic.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Pixels of the result that a program makes: rows and columns of the source's orientation.
ROWS, COLUMNS = 32, 32
#: Of a table, columns: address, strides (channel, row, column), height, width, and height and width of the result.
TABLE_COLUMNS = 8


@triton.jit
def _uniform(key, counter):
    """Number `counter` of a key's sequence, in [0, 1): splitmix64, as `zerofit.data.augment.uniforms`."""
    x = key + (counter + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return (x >> 40).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def _draw_boxes(
    seeds, sizes, boxes, flips, scale_min, scale_range, log_ratio, ratio, flip, CROP: tl.constexpr,
    FLIP: tl.constexpr, TRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    key = tl.load(seeds + b).to(tl.uint64)
    turned = tl.load(sizes + 3 * b + 2) != 0
    lying_height, lying_width = tl.load(sizes + 3 * b), tl.load(sizes + 3 * b + 1)
    height = tl.where(turned, lying_width, lying_height).to(tl.float32)
    width = tl.where(turned, lying_height, lying_width).to(tl.float32)
    t = tl.arange(0, WIDTH)
    wanted = height * width * (scale_min + _uniform(key, CROP + t) * scale_range)
    shape = tl.exp((2 * _uniform(key, CROP + TRIES + t) - 1) * log_ratio)
    across, high = tl.sqrt_rn(wanted * shape), tl.sqrt_rn(tl.div_rn(wanted, shape))
    down, right = _uniform(key, CROP + 2 * TRIES + t), _uniform(key, CROP + 3 * TRIES + t)
    first = tl.min(tl.where((t < TRIES) & (across <= width) & (high <= height), t, WIDTH), 0)
    chosen, found = t == first, first < WIDTH
    # None fits: the largest crop in the middle whose shape is allowed.
    high1 = tl.where(found, tl.sum(tl.where(chosen, high, 0.0), 0), tl.minimum(height, width * ratio))
    across1 = tl.where(found, tl.sum(tl.where(chosen, across, 0.0), 0), tl.minimum(width, height * ratio))
    down1 = tl.where(found, tl.sum(tl.where(chosen, down, 0.0), 0), 0.5)
    right1 = tl.where(found, tl.sum(tl.where(chosen, right, 0.0), 0), 0.5)
    tl.store(boxes + 4 * b, (height - high1) * down1)
    tl.store(boxes + 4 * b + 1, (width - across1) * right1)
    tl.store(boxes + 4 * b + 2, high1)
    tl.store(boxes + 4 * b + 3, across1)
    mirrored = tl.sum(tl.where(t == 0, _uniform(key, FLIP + t), 0.0), 0) < flip
    tl.store(flips + b, mirrored.to(tl.uint8))


@triton.jit
def _window(start, length, mirrored, size, place):
    """(centre, first source pixel, 1 / half width, taps) of the results `place` along an axis."""
    scale = tl.div_rn(length, size)
    half = tl.maximum(scale, 1.0)
    at = place.to(tl.float32) + 0.5
    at = tl.where(mirrored, size - at, at)
    centre = start + at * scale
    # Pixel `first` is the first whose middle lies inside, and `taps` on from there none does.
    return centre, tl.floor(centre - half + 0.5).to(tl.int32), tl.div_rn(1.0, half), tl.ceil(2 * half).to(tl.int32)


@triton.jit
def _weight(pixel, centre, inverse, limit):
    weight = tl.maximum(1.0 - tl.abs(pixel.to(tl.float32) + 0.5 - centre) * inverse, 0.0)
    return tl.where((pixel >= 0) & (pixel < limit), weight, 0.0)


@triton.jit
def _resample(
    source, channel, row, column, height, width, top, high, mirror_rows, out_height, left, wide, mirror_columns,
    out_width, v, u, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Three channels of (ROWS, COLUMNS) results at rows `v` and columns `u`, 0 .. 255 in fp32."""
    y_centre, y_first, y_inverse, y_taps = _window(top, high, mirror_rows, out_height, v)
    x_centre, x_first, x_inverse, x_taps = _window(left, wide, mirror_columns, out_width, u)
    # Each a tensor of its own: names that share one before a loop that changes them were miscompiled once.
    red = tl.zeros((ROWS, COLUMNS), tl.float32)
    green = tl.zeros((ROWS, COLUMNS), tl.float32)
    blue = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(y_taps):
        y = y_first + i
        down = _weight(y, y_centre, y_inverse, height)
        for j in range(x_taps):
            x = x_first + j
            across = _weight(x, x_centre, x_inverse, width)
            weight = down[:, None] * across[None, :]
            at = source + (y * row)[:, None] + (x * column)[None, :]
            live = weight > 0
            red += weight * tl.load(at, mask=live, other=0).to(tl.float32)
            green += weight * tl.load(at + channel, mask=live, other=0).to(tl.float32)
            blue += weight * tl.load(at + 2 * channel, mask=live, other=0).to(tl.float32)
            total += weight
    inverse = 1.0 / tl.maximum(total, 1e-20)  # nothing is added up beyond the result
    return red * inverse, green * inverse, blue * inverse


# Strides change with the largest picture of a batch: they must not be compiled in.
@triton.jit(do_not_specialize=["image_batch", "image_channel", "image_row", "image_column"])
def _crop(
    images, sizes, boxes, flips, out, image_batch, image_channel, image_row, image_column, out_batch, out_channel,
    out_row, out_column, size, scale0, scale1, scale2, offset0, offset1, offset2, HAS_FLIPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    v = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    u = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    height, width = tl.load(sizes + 3 * b), tl.load(sizes + 3 * b + 1)
    turned = tl.load(sizes + 3 * b + 2) != 0
    top, left = tl.load(boxes + 4 * b), tl.load(boxes + 4 * b + 1)
    high, wide = tl.load(boxes + 4 * b + 2), tl.load(boxes + 4 * b + 3)
    flip = tl.load(sizes + 3 * b) < 0
    if HAS_FLIPS:
        flip = tl.load(flips + b) != 0
    # The axes of the canvas are the upright picture's other ones where it lies turned.
    red, green, blue = _resample(
        images + b * image_batch, image_channel, image_row, image_column, height, width,
        tl.where(turned, left, top), tl.where(turned, wide, high), turned & flip, size * 1.0,
        tl.where(turned, top, left), tl.where(turned, high, wide), (turned == 0) & flip, size * 1.0,
        v, u, ROWS, COLUMNS,
    )  # fmt: skip
    to = out + b * out_batch + (v * tl.where(turned, out_column, out_row))[:, None]
    to += (u * tl.where(turned, out_row, out_column))[None, :]
    live = (v < size)[:, None] & (u < size)[None, :]
    kind = out.dtype.element_ty
    tl.store(to, (red * scale0 + offset0).to(kind), mask=live)
    tl.store(to + out_channel, (green * scale1 + offset1).to(kind), mask=live)
    tl.store(to + 2 * out_channel, (blue * scale2 + offset2).to(kind), mask=live)


@triton.jit(do_not_specialize=["canvas_batch", "canvas_channel", "canvas_row"])
def _lay_out(
    table, boxes, canvas, canvas_batch, canvas_channel, canvas_row, TABLE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    of = table + b * TABLE
    out_height, out_width = tl.load(of + 6).to(tl.int32), tl.load(of + 7).to(tl.int32)
    first_v, first_u = tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS
    if (first_v < out_height) & (first_u < out_width):
        v, u = first_v + tl.arange(0, ROWS), first_u + tl.arange(0, COLUMNS)
        source = tl.load(of).to(tl.pointer_type(tl.uint8))
        channel, row, column = tl.load(of + 1), tl.load(of + 2).to(tl.int32), tl.load(of + 3).to(tl.int32)
        never = out_height < 0
        red, green, blue = _resample(
            source, channel, row, column, tl.load(of + 4).to(tl.int32), tl.load(of + 5).to(tl.int32),
            tl.load(boxes + 4 * b), tl.load(boxes + 4 * b + 2), never, out_height.to(tl.float32),
            tl.load(boxes + 4 * b + 1), tl.load(boxes + 4 * b + 3), never, out_width.to(tl.float32),
            v, u, ROWS, COLUMNS,
        )  # fmt: skip
        to = canvas + b * canvas_batch + (v * canvas_row)[:, None] + u[None, :]
        live = (v < out_height)[:, None] & (u < out_width)[None, :]
        tl.store(to, (red + 0.5).to(tl.uint8), mask=live)
        tl.store(to + canvas_channel, (green + 0.5).to(tl.uint8), mask=live)
        tl.store(to + 2 * canvas_channel, (blue + 0.5).to(tl.uint8), mask=live)


def draw_boxes(
    seeds: Tensor, sizes: Tensor, *, scale: tuple[float, float], ratio: float, flip: float, counters: tuple[int, int],
    tries: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Random crops and mirrors of a batch, from the samples' keys alone.

    Args:
        seeds: (B,) int64.
        sizes: (B, 3) int32: height and width as the picture lies, and whether it lies transposed.
        scale, ratio, flip: smallest and largest share of the area, largest ratio of the sides, share mirrored.
        counters: first numbers of a key's sequence for the crop and for the mirror.
        tries: draws of area and shape before the centre is taken; 16 at most.

    Returns: boxes (B, 4) float32 (top, left, height, width in upright pixels) and mirrored (B,) bool.
    """
    batch = len(seeds)
    boxes = torch.empty((batch, 4), dtype=torch.float32, device=seeds.device)
    flips = torch.empty(batch, dtype=torch.uint8, device=seeds.device)
    crop, mirror = counters
    _draw_boxes[(batch,)](
        seeds.contiguous(), sizes.contiguous(), boxes, flips, scale[0], scale[1] - scale[0], math.log(ratio), ratio,
        flip, CROP=crop, FLIP=mirror, TRIES=tries, WIDTH=16, num_warps=1,
    )  # fmt: skip
    return boxes, flips.view(torch.bool)


def crop(
    images: Tensor, sizes: Tensor, boxes: Tensor, flips: Tensor | None, out: Tensor, scale: tuple[float, ...],
    offset: tuple[float, ...],
) -> Tensor:  # fmt: skip
    """Resample a box of every picture into `out`, times `scale` plus `offset` of each channel.

    Args:
        images: (B, 3, H, W) uint8, any strides.
        sizes: (B, 3) int32, see `draw_boxes`; pixels beyond the filled ones have no weight.
        boxes: (B, 4) float32.
        flips: (B,) bool, or None.
        out: (B, 3, S, S) of any float dtype and any strides.
        scale, offset: three numbers each.

    Returns: `out`.
    """
    batch, _, size, _ = out.shape
    mirrored = None if flips is None else flips.contiguous().view(torch.uint8)
    grid = (triton.cdiv(size, COLUMNS), triton.cdiv(size, ROWS), batch)
    _crop[grid](
        images, sizes.contiguous(), boxes.contiguous(), mirrored, out, *images.stride(), *out.stride(), size, *scale,
        *offset, HAS_FLIPS=flips is not None, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


def lay_out(table: Tensor, boxes: Tensor, canvas: Tensor) -> Tensor:
    """Pictures that lie anywhere in the device's memory, each resampled into the upper left of its canvas.

    Negative strides and exchanged ones turn a picture as it is read. A box of whole pixels in its own size is copied.

    Args:
        table: (B, 8) int64, see `TABLE_COLUMNS`. The memory must stay until the kernel has run.
        boxes: (B, 4) float32: what part, in pixels as the strides show them.
        canvas: (B, 3, H, W) uint8 whose columns lie one after another.

    Returns: `canvas`.
    """
    batch, _, height, width = canvas.shape
    grid = (triton.cdiv(width, COLUMNS), triton.cdiv(height, ROWS), batch)
    _lay_out[grid](
        table, boxes, canvas, canvas.stride(0), canvas.stride(1), canvas.stride(2), TABLE=TABLE_COLUMNS, ROWS=ROWS,
        COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return canvas
