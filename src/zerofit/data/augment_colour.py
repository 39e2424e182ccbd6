"""Colour jitter and RandAugment, by kornia's functions with a factor a picture; kornia's own random layers draw from
global generators, and choose one operation for the whole batch.

RandAugment computes every operation for the whole batch and keeps what each picture drew: a choice by index would wait
for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config.images import AugmentConfig
from ..errors import MissingDependency
from .augment import JITTER, RANDAUGMENT, uniforms


def import_kornia() -> Any:
    """The package.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import kornia
    except ImportError as error:
        raise MissingDependency(
            "Colour jitter and RandAugment need kornia: run `pip install 'zerofit[images]'`, or set data.augment's "
            "brightness, contrast, saturation, hue and randaugment_ops to 0."
        ) from error
    return kornia


def change_colours(images: Tensor, seeds: Tensor, config: AugmentConfig) -> Tensor:
    """RandAugment, then colour jitter.

    Args:
        images: (B, 3, H, W) float32 in [0, 1].
        seeds: (B,) int64.
    """
    for turn in range(config.randaugment_ops):
        draws = uniforms(seeds, 2, RANDAUGMENT + 2 * turn)
        images = randaugment_once(images, draws, config.randaugment_magnitude / 30)
    return colour_jitter(images, uniforms(seeds, 4, JITTER), config)


def colour_jitter(images: Tensor, draws: Tensor, config: AugmentConfig) -> Tensor:
    """Brightness, contrast, saturation and hue in this order, each by a factor of its own a picture.

    Args:
        draws: (B, 4) uniform.
    """
    enhance = import_kornia().enhance
    spread = 2 * draws - 1
    if config.brightness:
        images = enhance.adjust_brightness_accumulative(images, 1 + config.brightness * spread[:, 0])
    if config.contrast:
        images = enhance.adjust_contrast_with_mean_subtraction(images, 1 + config.contrast * spread[:, 1])
    if config.saturation:
        images = enhance.adjust_saturation_with_gray_subtraction(images, 1 + config.saturation * spread[:, 2])
    if config.hue:
        images = enhance.adjust_hue(images, 2 * math.pi * config.hue * spread[:, 3])
    return images


#: torchvision's RandAugment, in its order and with its ranges at magnitude 30.
OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "colour", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
MOST_SHEAR, MOST_TRANSLATION, MOST_DEGREES, MOST_FACTOR, MOST_BITS_LOST = 0.3, 150 / 331, 30.0, 0.9, 4


def randaugment_once(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    """One random operation a picture.

    Args:
        draws: (B, 2) uniform: which operation, and its sign.
        strength: magnitude, 0 to 1.
    """
    choice = (draws[:, 0] * len(OPERATIONS)).long()
    signed = strength * torch.where(draws[:, 1] < 0.5, -1.0, 1.0)
    out = _warped(images, choice, signed)
    factor = 1 + MOST_FACTOR * signed
    for name, operation in _colour_operations(factor, strength).items():
        chosen = (choice == OPERATIONS.index(name))[:, None, None, None]
        out = torch.where(chosen, operation(images), out)
    return out


def _colour_operations(factor: Tensor, strength: float) -> dict[str, Callable[[Tensor], Tensor]]:
    enhance = import_kornia().enhance
    bits = 8 - round(MOST_BITS_LOST * strength)
    return {
        "brightness": lambda x: enhance.adjust_brightness_accumulative(x, factor),
        "colour": lambda x: enhance.adjust_saturation_with_gray_subtraction(x, factor),
        "contrast": lambda x: enhance.adjust_contrast_with_mean_subtraction(x, factor),
        "sharpness": lambda x: enhance.sharpness(x, factor).clamp(0, 1),
        "posterize": lambda x: enhance.posterize(x, bits),
        "solarize": lambda x: torch.where(x >= 1 - strength, 1 - x, x),
        "autocontrast": _autocontrast,
        "equalize": enhance.equalize,
    }


def _autocontrast(images: Tensor) -> Tensor:
    """Each channel stretched to [0, 1]; a flat one stays."""
    least, most = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    span = most - least
    return torch.where(span > 0, (images - least) / span.clamp(min=1e-6), images)


def _warped(images: Tensor, choice: Tensor, signed: Tensor) -> Tensor:
    """Shear, translation or rotation about the centre, whichever each picture drew; black outside."""

    def of(name: str, most: float) -> Tensor:
        return torch.where(choice == OPERATIONS.index(name), most * signed, 0.0)

    geometry = import_kornia().geometry
    height, width = images.shape[2:]
    angle = of("rotate", math.radians(MOST_DEGREES))
    cos, sin = angle.cos(), angle.sin()
    shear_x, shear_y = of("shear_x", MOST_SHEAR), of("shear_y", MOST_SHEAR)
    linear = torch.stack([torch.stack([cos, shear_x - sin], 1), torch.stack([shear_y + sin, cos], 1)], 1)
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2]).to(images.device, non_blocking=True)
    move = torch.stack([of("translate_x", MOST_TRANSLATION * width), of("translate_y", MOST_TRANSLATION * height)], 1)
    shift = centre - linear @ centre + move
    warped: Tensor = geometry.transform.warp_affine(
        images, torch.cat([linear, shift[:, :, None]], 2), (height, width), mode="nearest"
    )
    return warped
