"""What a run on pictures says about its data and about augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .models import Section

#: Names of files that are taken for pictures end so.
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif"})
#: Pixels of a picture above which Pillow itself refuses to decode.
PILLOW_MAX_PIXELS = 178_956_970

Fraction = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class AugmentConfig(Section):
    """Random changes of training pictures, made on the training device in batches."""

    crop_scale_min: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Random resized crop (Szegedy et al. 2015): smallest share of the picture's area."""
    crop_scale_max: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Largest share of the picture's area."""
    crop_ratio_max: Annotated[float, Field(ge=1)] = 4 / 3
    """Largest width to height of a crop; the smallest is its inverse."""
    flip: Fraction = 0.5
    """Probability of mirroring left and right."""
    brightness: Fraction = 0.0
    """Colour jitter: the factor is drawn from 1 - x to 1 + x. Needs kornia, as do the next four."""
    contrast: Fraction = 0.0
    """Colour jitter: range of the contrast factor."""
    saturation: Fraction = 0.0
    """Colour jitter: range of the saturation factor."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Colour jitter: largest turn of the hue, in turns."""
    randaugment_ops: Count = 0
    """RandAugment (Cubuk et al. 2019): operations a picture; 0 turns it off, 2 is usual."""
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """RandAugment's strength, of 30."""
    mixup_alpha: NotNegative = 0.0
    """MixUp (Zhang et al. 2017): Beta(alpha, alpha) of the mixture; 0 turns it off, 0.2 is usual."""
    cutmix_alpha: NotNegative = 0.0
    """CutMix (Yun et al. 2019): Beta(alpha, alpha) of the area; 0 turns it off, 1 is usual. With MixUp too, each pair
    of pictures takes one of the two."""

    @property
    def mixes(self) -> bool:
        """Whether pictures are mixed in pairs: targets become probabilities, micro-batches must be even."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    @property
    def changes_colour(self) -> bool:
        """Whether kornia is needed."""
        return bool(self.brightness or self.contrast or self.saturation or self.hue or self.randaugment_ops)

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        if self.crop_scale_min > self.crop_scale_max:
            raise ValueError(
                f"crop_scale_min {self.crop_scale_min} is above crop_scale_max {self.crop_scale_max}; the crop's area "
                f"is drawn between the two"
            )
        return self


class ImageDataConfig(Section):
    """Pictures in a folder a class, and the cache that training reads."""

    kind: Literal["images"] = "images"
    path: Path
    """Prepared folder: ``meta.json``, ``files.jsonl``, ``index.npy`` and the pixel cache."""
    prepare: tuple[str, ...] = ()
    """Pictures to prepare when ``path`` is not there: one folder (with ``train`` and ``val``, or with the classes), or
    two, for training and for validation."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """For ``prepare`` of one folder of classes: share of each class that validates."""
    split_seed: int = 1337
    """For ``prepare`` of one folder of classes: decides which pictures validate."""
    cache_size: Annotated[int, Field(ge=8, le=2048)] = 256
    """Pixels of the shorter side in the cache; smaller pictures are kept as they are."""
    min_side: Annotated[int, Field(ge=1)] = 8
    """A picture with a shorter side than this is left out."""
    max_pixels: Annotated[int, Field(ge=1, le=PILLOW_MAX_PIXELS)] = 89_478_485
    """A picture with more pixels is taken for a decompression bomb and left out."""
    max_bad_fraction: Fraction = 0.05
    """Share of unreadable, tiny or oversized files up to which they are left out by name; above it nothing starts."""
    read: Literal["cache", "files"] = "cache"
    """Train from the pixel cache, or decode the files in every epoch."""
    balanced: bool = False
    """Draw every class equally often; small classes repeat."""
    image_size: Annotated[int, Field(ge=8)] = 224
    """Height and width that the model sees."""
    eval_resize: Annotated[int, Field(ge=8)] = 256
    """Evaluation: the shorter side is resized to this, then ``image_size`` is cut from the centre."""
    num_workers: Count | None = None
    """Processes that read for a rank, 0: the rank itself; unset: its share of the cores, of the cache at most 4, and
    none on a CPU."""
    prefetch_factor: Annotated[int, Field(ge=1)] = 2
    """Optimizer steps that are read ahead, and pieces that each process reads ahead."""
    pin_memory: bool | None = None
    """Page-locked batches, which copy to a GPU faster; unset: when there is a GPU."""
    augment: AugmentConfig = AugmentConfig()

    @property
    def sources(self) -> dict[str, Path]:
        """Pictures are not mixed."""
        return {}

    def folders(self) -> dict[str, Path]:
        """Name of a source -> its folder, as for tokens: one, without a name."""
        return {"": self.path}

    @model_validator(mode="after")
    def _crop_inside(self) -> ImageDataConfig:
        if self.eval_resize < self.image_size:
            raise ValueError(
                f"eval_resize {self.eval_resize} is below image_size {self.image_size}; the centre is cut from the "
                f"resized picture, so it must be at least as large"
            )
        return self
