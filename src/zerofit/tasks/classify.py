"""A trained classifier on pictures from files: what ``zerofit classify`` does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.images import PICTURE_SUFFIXES, ImageDataConfig
from ..data.augment import Augment
from ..data.images.decode import BadPicture, Decoded, Limits, decode
from ..errors import DataError

#: A picture of fewer or more pixels is not looked at; the limits of preparation are of training data.
LIMITS = Limits(min_side=1, max_pixels=89_478_485)


@dataclass(frozen=True)
class Answer:
    """What a picture shows.

    Attributes:
        path: of the file.
        classes: (name, probability), most likely first; empty for a file that cannot be read.
        failure: why not.
    """

    path: Path
    classes: tuple[tuple[str, float], ...] = ()
    failure: str | None = None


def pictures_in(paths: Sequence[Path]) -> list[Path]:
    """Files as they are named, and all pictures below folders, sorted.

    Raises:
        DataError: a path does not exist, or a folder holds no picture.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
            if not inside:
                raise DataError(
                    f"{path} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}). Name a folder that does."
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path} does not exist. Name pictures, or folders of pictures.")
    return found


def classify(
    model: Callable[[Tensor], Tensor],
    facts: Mapping[str, Any],
    paths: Sequence[Path],
    *,
    top: int,
    batch: int,
    device: torch.device,
) -> Iterator[Answer]:
    """The `top` most likely classes of each file, in their order.

    Args:
        model: normalised pictures (B, 3, S, S) -> logits (B, K), in evaluation mode.
        facts: what travels with a checkpoint: ``classes``, ``image_size``, ``eval_resize``, ``cache_size``.
        batch: pictures at a time.
    """
    sizes = {"image_size": facts["image_size"], "eval_resize": facts["eval_resize"]}
    transform = Augment(ImageDataConfig(path=Path(), **sizes), train=False)
    for first in range(0, len(paths), batch):
        read = [(path, _read(path, facts["cache_size"])) for path in paths[first : first + batch]]
        decoded = [picture for _, picture in read if isinstance(picture, Decoded)]
        found = iter(_probabilities(model, transform, decoded, device) if decoded else ())
        for path, picture in read:
            if isinstance(picture, Decoded):
                yield Answer(path, _named(next(found), facts["classes"], top))
            else:
                yield Answer(path, failure=picture)


def _read(path: Path, size: int) -> Decoded | str:
    try:
        with warnings.catch_warnings():  # Pillow's, of large pictures and odd metadata
            warnings.simplefilter("ignore")
            return decode(path.read_bytes(), size, LIMITS)
    except BadPicture as error:
        return str(error)
    except OSError as error:
        return f"unreadable: {error.strerror}"


@torch.no_grad()
def _probabilities(
    model: Callable[[Tensor], Tensor], transform: Augment, pictures: Sequence[Decoded], device: torch.device
) -> Tensor:
    """(B, K) on the CPU."""
    height, width = (max(p.pixels.shape[axis] for p in pictures) for axis in (0, 1))
    canvas = torch.zeros((len(pictures), height, width, 3), dtype=torch.uint8)
    sizes = torch.zeros((len(pictures), 3), dtype=torch.int32)
    for place, picture in enumerate(pictures):
        h, w = picture.pixels.shape[:2]
        canvas[place, :h, :w] = torch.from_numpy(picture.pixels.copy())
        sizes[place] = torch.tensor([h, w, int(picture.transposed)])
    nothing = torch.zeros(len(pictures), dtype=torch.int64)
    inputs = {"images": canvas.permute(0, 3, 1, 2), "sizes": sizes, "targets": nothing, "seeds": nothing}
    images = transform({name: tensor.to(device) for name, tensor in inputs.items()})["images"]
    return model(images).float().softmax(dim=1).cpu()


def _named(probabilities: Tensor, classes: Sequence[str], top: int) -> tuple[tuple[str, float], ...]:
    values, places = probabilities.topk(min(top, len(classes)))
    return tuple((classes[place], value) for value, place in zip(values.tolist(), places.tolist(), strict=True))
