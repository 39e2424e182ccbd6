"""Augmentation and the evaluation transform, in batches on whatever device the batch is on.

Every random number comes from a sample's key (`zerofit.data.order.sample_keys`), so it is a function of (seed, epoch,
index): the number of ranks, the micro-batch and a resume change nothing. No generator is used, and nothing waits for
the device.

The crop is resampled with Pillow's triangle filter: as it shrinks it averages, like torchvision's Resize on Pillow
images, and unlike a grid sample. On a GPU with Triton that is one kernel from uint8 to the normalised batch, and
another draws the crops (`zerofit.kernels.pictures_triton`); elsewhere two small matrix products a picture, one for rows
and one for columns, 0.2 GFLOP from 256 x 341 to 224 x 224.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..config.images import AugmentConfig, ImageDataConfig
from ..errors import ConfigError
from ..kernels.triton_use import agrees, use_triton

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: Of 0 .. 255: normalised is pixel * SCALE + OFFSET, a channel each.
SCALE = tuple(1 / (255 * std) for std in IMAGENET_STD)
OFFSET = tuple(-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
#: Draws of a crop's area and shape before the centre is taken, as in torchvision's RandomResizedCrop.
CROP_TRIES = 10

#: Use -> first counter of its random numbers; the uses of a sample must not overlap.
CROP, FLIP, MIX, JITTER, RANDAUGMENT = 0, 100, 200, 300, 400


def uniforms(seeds: Tensor, count: int, first: int) -> Tensor:
    """(B, count) float32 in [0, 1): numbers `first` and following of each sample's sequence.

    splitmix64 (Steele et al. 2014) by counter, in int64 that wraps around.

    Args:
        seeds: (B,) int64.
    """
    counters = torch.arange(first + 1, first + count + 1, device=seeds.device)
    x = seeds[:, None] + counters * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shift(x, 31)
    return _shift(x, 40).float() * 2.0**-24


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def check_augment(config: ImageDataConfig, micro_batch: int) -> None:
    """Check what needs more than the configuration of the data.

    Raises:
        ConfigError: pictures are mixed in pairs, and the micro-batch is odd.
        MissingDependency: colours change, and kornia is not installed.
    """
    if config.augment.mixes and micro_batch % 2:
        raise ConfigError(
            f"mixup_alpha or cutmix_alpha with micro_batch {micro_batch}: pictures are mixed in pairs that do not "
            f"depend on the number of ranks, so a micro-batch must be even. Use {micro_batch + 1}, or turn both off."
        )
    if config.augment.changes_colour:
        from .augment_colour import import_kornia

        import_kornia()


class Augment:
    """uint8 pictures to what the model takes. Called with the inputs of a batch (`zerofit.data.images.loader`).

    Args:
        config: sizes and augmentation.
        train: random crops and what else is asked for; else resize and centre crop.
        num_classes: for MixUp and CutMix, whose targets are probabilities.
        dtype: of the result.
        channels_last: memory format of the result.
        compile: compile the filter's arithmetic where Triton's kernel is not used: a dozen passes over memory.
    """

    def __init__(
        self,
        config: ImageDataConfig,
        *,
        train: bool,
        num_classes: int = 0,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        self.config, self.augment, self.train, self.num_classes = config, config.augment, train, num_classes
        self.dtype = dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._triangle = torch.compile(triangle) if compile else triangle
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}
        if train and self.augment.mixes and num_classes < 2:
            raise ValueError("MixUp and CutMix need num_classes")

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``images`` (B, 3, image_size, image_size), normalised; ``targets`` (B,) int64, or (B, num_classes) float32
        where pictures are mixed (rows of padding are 0)."""
        seeds, targets, images, lying = (inputs[name] for name in ("seeds", "targets", "images", "sizes"))
        fused = len(images) > 0 and use_triton(images) and _kernels_agree(images.device)
        if fused:
            images = self._crop_with_triton(images, lying, *self._boxes_with_triton(seeds, lying))
        else:
            transposed, box, flip = self._boxes(seeds, lying)
            images = self.crop(images, lying, transposed, box, flip)
        if self.train and self.augment.changes_colour:
            from .augment_colour import change_colours

            images = change_colours(images.float().div_(255).clamp_(0, 1), seeds, self.augment).mul_(255)
            images = self._normalised(images)
        elif not fused:
            images = self._normalised(images)
        if self.train and self.augment.mixes:
            return mix(images, targets, seeds, self.augment, self.num_classes)
        return {"images": images, "targets": targets}

    def _boxes(self, seeds: Tensor, lying: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(transposed, boxes, mirrored) as `crop` takes them."""
        transposed = lying[:, 2].bool()
        height = torch.where(transposed, lying[:, 1], lying[:, 0]).float()
        width = torch.where(transposed, lying[:, 0], lying[:, 1]).float()
        if not self.train:
            return transposed, centre_boxes(height, width, self.config.image_size, self.config.eval_resize), None
        box = random_boxes(uniforms(seeds, 4 * CROP_TRIES, CROP), height, width, self.augment)
        return transposed, box, uniforms(seeds, 1, FLIP)[:, 0] < self.augment.flip

    def _boxes_with_triton(self, seeds: Tensor, lying: Tensor) -> tuple[Tensor, Tensor | None]:
        return draw_with_triton(seeds, lying, self.augment) if self.train else self._boxes(seeds, lying)[1:]

    def _crop_with_triton(self, images: Tensor, lying: Tensor, box: Tensor, flip: Tensor | None) -> Tensor:
        """`crop` and `_normalised` in one kernel; 0 .. 255 in float32 where colours are still to be changed."""
        from ..kernels import pictures_triton

        shape, device = (len(images), 3, self.config.image_size, self.config.image_size), images.device
        if self.train and self.augment.changes_colour:
            return pictures_triton.crop(
                images, lying, box, flip, torch.empty(shape, device=device), (1.0,) * 3, (0.0,) * 3
            )
        out = torch.empty(shape, dtype=self.dtype, device=device, memory_format=self.memory_format)
        return pictures_triton.crop(images, lying, box, flip, out, SCALE, OFFSET)

    def crop(self, images: Tensor, lying: Tensor, transposed: Tensor, box: Tensor, flip: Tensor | None) -> Tensor:
        """(B, 3, S, S) of 0 .. 255, float16 on a GPU and float32 on a CPU.

        Args:
            images: (B, 3, H, W) uint8.
            lying: (B, 2 or more): height and width that are filled.
            transposed: (B,) bool: the picture's rows lie as columns.
            box: (B, 4) top, left, height, width in upright pixels.
            flip: (B,) bool: mirror left and right.
        """
        size = self.config.image_size
        working = torch.float16 if images.is_cuda else torch.float32
        pixels = images.to(working, memory_format=torch.contiguous_format)
        batch, _, height, width = pixels.shape
        rows = (box[:, 0], box[:, 2], None)
        columns = (box[:, 1], box[:, 3], flip)
        vertical = self._triangle(*_where(transposed, columns, rows), lying[:, 0], height, size, working)
        horizontal = self._triangle(*_where(transposed, rows, columns), lying[:, 1], width, size, working)
        narrow = torch.bmm(pixels.view(batch, 3 * height, width), horizontal.mT).view(batch, 3, height, size)
        out = torch.matmul(vertical[:, None], narrow)
        return torch.where(transposed[:, None, None, None], out.mT, out)

    def _normalised(self, images: Tensor) -> Tensor:
        if images.device not in self._constants:
            offset, scale = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (OFFSET, SCALE))
            self._constants[images.device] = (offset, scale)
        offset, scale = self._constants[images.device]
        out = torch.empty(images.shape, dtype=self.dtype, device=images.device, memory_format=self.memory_format)
        return torch.addcmul(offset, images, scale, out=out)  # in float32, cast and laid out as it is written


def draw_with_triton(seeds: Tensor, lying: Tensor, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """(boxes, mirrored) as `random_boxes` and `uniforms` give them, in one kernel.

    Args:
        seeds: (B,) int64.
        lying: (B, 3) int32: height, width, transposed.
    """
    from ..kernels import pictures_triton

    return pictures_triton.draw_boxes(
        seeds, lying, scale=(config.crop_scale_min, config.crop_scale_max), ratio=config.crop_ratio_max,
        flip=config.flip, counters=(CROP, FLIP), tries=CROP_TRIES,
    )  # fmt: skip


@cache
def _kernels_agree(device: torch.device) -> bool:
    """Whether the kernels make of a few small pictures what PyTorch's operations do; once a process and device."""
    config = ImageDataConfig(kind="images", path=Path(), image_size=40, eval_resize=48)
    transform = Augment(config, train=True)
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 48, 90, 3), dtype=torch.uint8, generator=random).to(device).permute(0, 3, 1, 2)
    sizes = [[48, 90, 0], [48, 50, 1], [30, 90, 1], [48, 48, 0], [20, 33, 0], [41, 90, 0]]
    lying = torch.tensor(sizes, dtype=torch.int32, device=device)
    seeds = torch.arange(-3, 3, device=device) * 0x1F123BB5159A55E5  # spread over 64 bits
    transposed, box, flip = transform._boxes(seeds, lying)

    def kernels() -> list[Tensor]:
        boxes, flips = draw_with_triton(seeds, lying, config.augment)
        return [boxes, flips, transform._crop_with_triton(images, lying, box, flip)]

    def operations() -> list[Tensor]:
        assert flip is not None
        return [box, flip, transform._normalised(transform.crop(images, lying, transposed, box, flip))]

    return agrees("crops", kernels, operations, "PyTorch's operations take its place, more than a hundred a batch")


Axis = tuple[Tensor, Tensor, "Tensor | None"]


def _where(transposed: Tensor, if_so: Axis, else_: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """(start, length, mirrored) of an axis of the canvas, which is an upright picture's other one where transposed."""
    never = torch.zeros_like(transposed)
    first = (*if_so[:2], never if if_so[2] is None else if_so[2])
    second = (*else_[:2], never if else_[2] is None else else_[2])
    start, length, mirrored = (torch.where(transposed, a, b) for a, b in zip(first, second, strict=True))
    return start, length, mirrored


def triangle(
    start: Tensor, length: Tensor, mirrored: Tensor, limit: Tensor, pixels: int, size: int, dtype: torch.dtype
) -> Tensor:
    """(B, size, pixels): weights of each source pixel in each pixel of the result; rows add up to 1.

    Pillow's bilinear filter (``Resample.c``): a triangle as wide as the shrinking, at least one pixel to each side.

    Args:
        start, length: (B,) of the crop, in source pixels.
        mirrored: (B,) bool.
        limit: (B,) source pixels that are filled; what lies beyond has no weight.
        pixels: of the canvas.
        size: of the result.
        dtype: of the weights; they are computed in float32.
    """
    scale = length / size
    place = torch.arange(size, device=start.device) + 0.5
    place = torch.where(mirrored[:, None], size - place, place)
    inverse = 1 / scale.clamp(min=1)
    centres = (start[:, None] + place * scale[:, None]) * -inverse[:, None]
    source = torch.arange(pixels, device=start.device) + 0.5
    source = torch.where(source < limit[:, None], source, 1e9)  # too far from everything
    # Of the size of a batch of pictures: as few passes over memory as it takes.
    distance = torch.addcmul(centres[:, :, None], source[:, None, :], inverse[:, None, None]).abs_()
    weights = torch.sub(1, distance, out=distance).clamp_(min=0)
    out = torch.empty(weights.shape, dtype=dtype, device=weights.device)
    return torch.div(weights, weights.sum(-1, keepdim=True), out=out)


def random_boxes(draws: Tensor, height: Tensor, width: Tensor, config: AugmentConfig) -> Tensor:
    """(B, 4) top, left, height, width: torchvision's RandomResizedCrop, its tries drawn at once.

    Args:
        draws: (B, 4 * `CROP_TRIES`) uniform.
        height, width: (B,) of the pictures, float.
    """
    area, shape, down, right = draws.view(len(draws), 4, CROP_TRIES).unbind(1)
    share = config.crop_scale_min + area * (config.crop_scale_max - config.crop_scale_min)
    wanted = (height * width)[:, None] * share
    log_ratio = (2 * shape - 1) * math.log(config.crop_ratio_max)
    across, high = (wanted * log_ratio.exp()).sqrt(), (wanted / log_ratio.exp()).sqrt()
    fits = (across <= width[:, None]) & (high <= height[:, None])
    first = fits.to(torch.int8).argmax(1, keepdim=True)
    any_fits = fits.any(1)
    found = torch.stack([x.gather(1, first)[:, 0] for x in (high, across, down, right)])
    # None fits: the largest crop in the middle whose shape is allowed.
    high0 = torch.minimum(height, width * config.crop_ratio_max)
    across0 = torch.minimum(width, height * config.crop_ratio_max)
    half = torch.full_like(height, 0.5)
    high1, across1, down1, right1 = torch.where(any_fits, found, torch.stack([high0, across0, half, half]))
    return torch.stack([(height - high1) * down1, (width - across1) * right1, high1, across1], 1)


def centre_boxes(height: Tensor, width: Tensor, size: int, resize: int) -> Tensor:
    """(B, 4): the shorter side resized to `resize`, then `size` from the centre, as one crop of the picture.

    Where the shorter side has `resize` pixels already, the box lies on whole pixels and the result is a copy.
    """
    scale = torch.minimum(height, width) / resize
    tall, wide = (height / scale).floor(), (width / scale).floor()
    top, left = ((tall - size) / 2).round(), ((wide - size) / 2).round()
    side = size * scale
    return torch.stack([top * height / tall, left * width / wide, side, side], 1)


def mix(images: Tensor, targets: Tensor, seeds: Tensor, config: AugmentConfig, num_classes: int) -> dict[str, Tensor]:
    """MixUp or CutMix of the samples 2i and 2i + 1, both ways; the draws are those of the first.

    Pairs are of neighbours in the sample order, so they do not depend on how it is cut into micro-batches.
    """
    batch, _, height, width = images.shape
    draws = uniforms(seeds.view(-1, 2)[:, :1].expand(-1, 2).reshape(-1), 4, MIX)
    cuts = draws[:, 0] < (0.5 if config.mixup_alpha and config.cutmix_alpha else float(config.cutmix_alpha > 0))
    keep = torch.where(cuts, _beta(draws[:, 1], config.cutmix_alpha or 1), _beta(draws[:, 1], config.mixup_alpha or 1))
    top, bottom = _cut(draws[:, 2], keep, height)
    left, right = _cut(draws[:, 3], keep, width)
    cut_share = (bottom - top) * (right - left) / (height * width)
    share = torch.where(cuts, 1 - cut_share, keep)
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    down = (y >= top[:, None]) & (y < bottom[:, None])
    across = (x >= left[:, None]) & (x < right[:, None])
    outside = ~(down[:, :, None] & across[:, None, :])
    weight = torch.where(cuts[:, None, None], outside.float(), keep[:, None, None])[:, None].to(images.dtype)
    partners = images.view(-1, 2, *images.shape[1:]).flip(1).view(images.shape)
    mixed = torch.lerp(partners, images, weight.expand_as(images))
    known = (targets >= 0)[:, None]
    single = functional.one_hot(targets.clamp(min=0), num_classes).float() * known
    pairs = single.view(-1, 2, num_classes).flip(1).reshape(batch, num_classes)
    return {"images": mixed, "targets": torch.lerp(pairs, single, share[:, None])}


def _cut(centre: Tensor, keep: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """First and end of CutMix's cut along an axis: (1 - keep) of the area around a random centre, clipped."""
    half = (side * (1 - keep).sqrt() / 2).floor()
    middle = (centre * side).floor()
    return (middle - half).clamp(min=0), (middle + half).clamp(max=side)


def _beta(draws: Tensor, alpha: float) -> Tensor:
    """Beta(alpha, alpha) by its quantiles, from uniform draws."""
    table = torch.from_numpy(_beta_quantiles(alpha)).to(draws.device, non_blocking=True)
    place = draws * (len(table) - 1)
    low = place.long()
    return torch.lerp(table[low], table[(low + 1).clamp(max=len(table) - 1)], place - low)


@cache
def _beta_quantiles(alpha: float, points: int = 4097) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Quantiles of Beta(alpha, alpha) at even steps.

    Up to the median with x = t^(1/alpha) / 2, which takes the density's pole at 0 away; the rest is its mirror.
    """
    t = np.linspace(0, 1, 20_001)
    x = t ** (1 / alpha) / 2
    density = (1 - x) ** (alpha - 1)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    lower = np.interp(np.linspace(0, 1, points // 2 + 1), mass / mass[-1], x)
    out: np.ndarray[tuple[int], np.dtype[np.float32]] = np.concatenate([lower, 1 - lower[-2::-1]]).astype(np.float32)
    return out
