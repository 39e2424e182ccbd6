"""Small pictures for tests: drawn, or taken from a package."""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def draw(width: int, height: int, number: int) -> Image.Image:
    """A smooth picture with some noise, another for each number."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    phases = random.uniform(0, 6, 3)
    waves = np.stack([np.sin(7 * x + p) + np.cos(5 * y - p) for p in phases], -1)
    pixels = 127 + 50 * waves + random.normal(0, 4, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_folder(
    root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 6, size: tuple[int, int] = (40, 30)
) -> Path:
    """``root/CLASS/N.jpg``, every picture another."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            draw(*size, 1000 * label + number).save(root / name / f"{number}.jpg", quality=90)
    return root


def write_animals(scratch: Path, root: Path, each: int) -> Path:
    """animal-mnist as ``root/CLASS/N.jpg``, `each` of a class; skips the test where the package cannot be fetched."""
    made = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "images_data.py"))
    try:
        wheel = made["fetch"](made["ANIMALS"], scratch)
    except (OSError, subprocess.SubprocessError, StopIteration) as error:
        pytest.skip(f"animal-mnist cannot be fetched: {error}")
    made["write_animals"](wheel, root, each)
    return root
