"""A picture's bytes to RGB pixels, through Pillow."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import MissingDependency

if TYPE_CHECKING:
    from PIL.Image import Image

#: Pillow's plug-ins that are let near the bytes; a file's suffix does not matter.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
ORIENTATION_TAG = 0x0112
#: Longest side kept, in shorter sides; what a panorama has beyond it is cut off evenly at both ends.
MAX_ASPECT = 2.0
Pixels = NDArray[np.uint8]


class BadPicture(Exception):
    """A file that is left out; the message is the reason, in a few words."""


@dataclass(frozen=True)
class Limits:
    """What is accepted: pixels of the shorter side at least, pixels of the picture at most."""

    min_side: int
    max_pixels: int


@dataclass(frozen=True)
class Decoded:
    """A picture as the cache keeps it.

    Attributes:
        pixels: (height, width, 3) uint8, width >= height.
        transposed: rows and columns are exchanged, because the picture is higher than wide.
        orientation: the file's EXIF orientation, 1 to 8; the pixels are upright already.
        plain_jpeg: a JPEG of one or three channels, which a GPU's decoder takes.
    """

    pixels: Pixels
    transposed: bool
    orientation: int
    plain_jpeg: bool
    source_height: int
    source_width: int


@cache
def import_pillow() -> Any:
    """``PIL.Image``.

    Raises:
        MissingDependency: Pillow is not installed.
    """
    try:
        import PIL.Image

        for plugin in ("Bmp", "Gif", "Jpeg", "Mpo", "Png", "WebP"):  # Pillow loads them late otherwise, and not all
            import_module(f"PIL.{plugin}ImagePlugin")
    except ImportError as error:
        raise MissingDependency("Pictures need Pillow: run `pip install 'zerofit[images]'`.") from error
    return PIL.Image


Resize = Callable[["Image", tuple[int, int]], "Image"]


def resize_with_pillow(image: Image, target: tuple[int, int]) -> Image:
    """Pillow's antialiased bilinear filter; large pictures are halved by averaging first, which hardly shows."""
    return image.resize(target, import_pillow().Resampling.BILINEAR, reducing_gap=3.0)


def resize_with_torch(image: Image, target: tuple[int, int]) -> Image:
    """The same filter in torch, three times as fast (AVX2); differs by two levels at most. Imports torch."""
    import torch

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(pixels, target[::-1], mode="bilinear", antialias=True)
    return import_pillow().fromarray(small[0].permute(1, 2, 0).numpy())  # type: ignore[no-any-return]


@cache
def _cykooz() -> tuple[Any, Any]:
    """cykooz-resizer's resizer, and its options for Pillow's bilinear filter."""
    import cykooz_resizer as cykooz

    filtered = cykooz.ResizeAlg.convolution(cykooz.FilterType.bilinear)
    return cykooz.Resizer(), cykooz.ResizeOptions(resize_alg=filtered, use_alpha=False)


def resize_with_cykooz(image: Image, target: tuple[int, int]) -> Image:
    """The same filter in Rust (SSE4.1, AVX2, Neon), nearly three times as fast; differs by two levels at most."""
    resizer, options = _cykooz()
    small: Image = import_pillow().new("RGB", target)
    resizer.resize_pil(image, small, options)
    return small


#: Name, as ``meta.json`` has it.
RESIZERS: dict[str, Resize] = {"pillow": resize_with_pillow, "torch": resize_with_torch, "cykooz": resize_with_cykooz}


def find_resize(name: str) -> Resize:
    """What shrinks pictures, by its name.

    Raises:
        MissingDependency: it is not installed.
    """
    if name == "cykooz" and find_spec("cykooz_resizer") is None:
        raise MissingDependency(
            "These pictures were shrunk by cykooz-resizer, which is not installed, and other ways give slightly other "
            "pixels: run `pip install 'zerofit[images-fast]'`, or prepare the pictures again with --force."
        )
    return RESIZERS[name]


def decode(data: bytes, size: int, limits: Limits, resize: Resize = resize_with_pillow) -> Decoded:
    """Decode, turn upright, put transparency on white, shrink the shorter side to `size` (never enlarge).

    The longer side is ``int(size * longer / shorter)``, as torchvision's Resize has it, with the same bilinear filter
    (antialiased). JPEGs of more than twice that size are decoded at a half, a quarter or an eighth (libjpeg's DCT
    scaling).

    Raises:
        BadPicture: unreadable, truncated, too small or too large.
    """
    pil = import_pillow()
    if not data:
        raise BadPicture("empty file")
    try:
        return _decode(pil, data, size, limits, resize)
    except BadPicture:
        raise
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
        raise BadPicture(f"decompression bomb: more than {limits.max_pixels:,} pixels") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and others
        if type(error).__name__ == "UnidentifiedImageError":
            raise BadPicture("not a picture") from error
        what = str(error) or repr(error)
        raise BadPicture("truncated" if "truncated" in what.lower() else f"unreadable: {what[:120]}") from error


def _decode(pil: Any, data: bytes, size: int, limits: Limits, resize: Resize) -> Decoded:
    image = pil.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > limits.max_pixels:
        raise BadPicture(f"decompression bomb: {width} x {height} pixels, above max_pixels {limits.max_pixels:,}")
    if min(width, height) < limits.min_side:
        raise BadPicture(f"tiny: {width} x {height}, below min_side {limits.min_side}")
    orientation = image.getexif().get(ORIENTATION_TAG, 1)
    orientation = orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
    jpeg = image.format in ("JPEG", "MPO")  # several pictures in a JPEG, as some cameras write; the first counts
    plain_jpeg = jpeg and image.mode in ("RGB", "L")
    target = resized(width, height, size)
    if jpeg:
        image.draft(None, target)
    image = to_rgb(pil, image)
    if image.size != target:
        image = resize(image, target)
    image = _cut_panorama(image)
    image, transposed = _landscape(pil, image, orientation)
    return Decoded(np.asarray(image), transposed, orientation, plain_jpeg, height, width)


def resized(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the shorter side at `size`; pictures that are smaller stay as they are."""
    shorter = min(width, height)
    if shorter <= size:
        return width, height
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def to_rgb(pil: Any, image: Image) -> Image:
    """Any mode to RGB: transparency on white, 16 bits to 8, CMYK, palettes and grey as Pillow converts them."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would cut it at 255
        grey = np.asarray(image).astype(np.int64)
        return pil.fromarray((grey >> 8 if grey.max() > 255 else grey).clip(0, 255).astype(np.uint8)).convert("RGB")  # type: ignore[no-any-return]
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        picture = image.convert("RGBA")
        white = pil.new("RGBA", picture.size, (255, 255, 255, 255))
        return pil.alpha_composite(white, picture).convert("RGB")  # type: ignore[no-any-return]
    return image.convert("RGB")


def _cut_panorama(image: Image) -> Image:
    width, height = image.size
    most = int(MAX_ASPECT * min(width, height))
    if max(width, height) <= most:
        return image
    left, top = max(width - most, 0) // 2, max(height - most, 0) // 2
    return image.crop((left, top, left + min(width, most), top + min(height, most)))


def _landscape(pil: Any, image: Image, orientation: int) -> tuple[Image, bool]:
    """The upright picture, lying: (image with width >= height, whether its rows and columns are exchanged)."""
    t = pil.Transpose
    upright = {
        2: t.FLIP_LEFT_RIGHT, 3: t.ROTATE_180, 4: t.FLIP_TOP_BOTTOM, 5: t.TRANSPOSE, 6: t.ROTATE_270,
        7: t.TRANSVERSE, 8: t.ROTATE_90,
    }  # fmt: skip
    if orientation in upright:
        image = image.transpose(upright[orientation])
    if image.size[0] >= image.size[1]:
        return image, False
    return image.transpose(t.TRANSPOSE), True
