"""A prepared folder of pictures: ``meta.json``, ``files.jsonl``, ``index.npy`` and the pixel cache ``pixels-*.bin``.

Pixels lie as (height, width, 3) uint8, one picture after another, each in its own size: the shorter side has
``cache_size`` pixels, the longer one as many as the picture's shape asks. So a random resized crop is drawn from the
whole picture in its true shape, as from the file; a square cache would have cut the sides off, or squeezed them.
Pictures that are higher than wide lie transposed, so that all of a batch fit one canvas without waste.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...config.images import ImageDataConfig
from ...errors import DataError
from .decode import Pixels
from .discover import discover, shown
from .shards import shard_name

META, FILES, INDEX = "meta.json", "files.jsonl", "index.npy"
FORMAT = 1
SPLITS = ("train", "val")

#: A row of ``index.npy``; rows stand in the order of ``files.jsonl``.
RECORD = np.dtype([
    ("label", "<i4"),
    ("split", "u1"),  # place in SPLITS
    ("transposed", "u1"),
    ("orientation", "u1"),  # EXIF
    ("plain_jpeg", "u1"),
    ("height", "<i4"),  # as kept: of the transposed picture
    ("width", "<i4"),
    ("source_height", "<i4"),
    ("source_width", "<i4"),
    ("shard", "<i4"),
    ("offset", "<i8"),  # bytes
])  # fmt: skip


def is_prepared_images(folder: Path) -> bool:
    """True when the folder holds prepared pictures."""
    return (folder / META).exists() and (folder / INDEX).exists()


def read_images_meta(folder: Path) -> dict[str, Any]:
    """``meta.json``.

    Raises:
        DataError: there is none, it is of tokens, or of another version.
    """
    path = folder / META
    if not path.exists():
        raise DataError(
            f"No {path}: {folder} holds no prepared pictures. Make them with `zerofit data prepare images PICTURES "
            f"--out {folder}`, or set data.path."
        )
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error}). Prepare the pictures again with --force.") from error
    if meta.get("kind") != "images":
        raise DataError(f"{folder} holds tokens, not pictures. Set data.path to a folder of prepared pictures.")
    if meta.get("format") != FORMAT:
        raise DataError(
            f"{path}: format {meta.get('format')}; this version reads {FORMAT}. Prepare again with --force."
        )
    return meta


class ImageStore:
    """A prepared folder, opened for reading. Cheap to send to another process: it opens the files again.

    Args:
        same_as: hash of the ``meta.json`` of the store that was sent.

    Attributes:
        index: (files,) of `RECORD`.

    Raises:
        DataError: it is damaged, or was prepared anew after it was opened first.
    """

    def __init__(self, folder: Path, same_as: str | None = None) -> None:
        self.folder = folder
        self.meta = read_images_meta(folder)
        self._hash = hashlib.sha256(json.dumps(self.meta).encode()).hexdigest()
        if same_as not in (None, self._hash):
            raise DataError(
                f"{folder} was prepared anew while this run reads it, so that a picture's number means another picture "
                f"now. Resume the run, which then checks the new pictures; prepare into another folder next time."
            )
        self.index = _read_index(folder)
        if self.index.dtype != RECORD or len(self.index) != self.meta["files"]:
            raise DataError(f"{folder / INDEX} does not belong to its {META}. Prepare the pictures again with --force.")

    def __reduce__(self) -> tuple[type[ImageStore], tuple[Path, str]]:
        return ImageStore, (self.folder, self._hash)

    @property
    def classes(self) -> list[str]:
        """Names; a label is a place in this list."""
        return list(self.meta["classes"])

    @property
    def has_pixels(self) -> bool:
        """False when it was prepared for reading the files themselves."""
        return bool(self.meta["shards"])

    @cached_property
    def canvas(self) -> tuple[int, int]:
        """(height, width) into which every kept picture fits."""
        return int(self.index["height"].max()), int(self.index["width"].max())

    @cached_property
    def paths(self) -> list[str]:
        """Every file, in the order of the index."""
        return [row["path"] for row in read_files(self.folder)]

    @cached_property
    def mean_file_bytes(self) -> int:
        """Of the first files: what it roughly takes to hold one as it is."""
        sizes: list[int] = [row["bytes"] for row in islice(read_files(self.folder), 1000)]
        return sum(sizes) // len(sizes)

    @cached_property
    def shards(self) -> list[Pixels]:
        """The pixels as they lie, one (bytes,) uint8 map a shard; a picture's place is in the index.

        Raises:
            DataError: the cache is damaged.
        """
        found = []
        for number, size in enumerate(self.meta["shards"]):
            path = self.folder / shard_name(number)
            if not path.exists() or path.stat().st_size != size:
                raise DataError(
                    f"{path} is {'missing' if not path.exists() else 'not as long as it was written'}: the cache is "
                    f"damaged. Prepare the pictures again with --force."
                )
            found.append(np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8))
        # A plain view of the map: slicing a np.memmap costs several microseconds more.
        return [np.asarray(shard) for shard in found]

    def open_pixels(self) -> None:
        """Map the cache.

        Raises:
            DataError: it is damaged, or there is none.
        """
        if not self.has_pixels:
            raise DataError(
                f"{self.folder} was prepared without a pixel cache, and data.read is cache. Prepare it again (--force "
                f"without --no-cache), or set data.read files."
            )
        _ = self.shards

    def pixels(self, number: int) -> Pixels:
        """(height, width, 3) uint8 of a picture, a view of the map."""
        record = self.index[number]
        return self._slice(int(record["shard"]), int(record["offset"]), int(record["height"]), int(record["width"]))

    def _slice(self, shard: int, offset: int, height: int, width: int) -> Pixels:
        size = height * width * 3
        return self.shards[shard][offset : offset + size].reshape(height, width, 3)


def _read_index(folder: Path) -> NDArray[np.void]:
    try:
        index: NDArray[np.void] = np.load(folder / INDEX)
    except (OSError, ValueError, EOFError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or "it is no array"
        raise DataError(f"{folder / INDEX} cannot be read ({why}). Prepare the pictures again with --force.") from error
    return index


def read_files(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of ``files.jsonl``: path, split, class, bytes, mtime_ns, sha256."""
    with (folder / FILES).open(encoding="ascii") as lines:
        for line in lines:
            yield json.loads(line)


def check_images(config: ImageDataConfig) -> ImageStore:
    """Check a prepared folder against its files and the configuration, before anything starts.

    Where the pictures are not there any more, the cache alone is enough.

    Raises:
        DataError: not prepared, damaged, made for other settings, or its files have changed.
    """
    store = ImageStore(config.path)
    request = store.meta["request"]
    if config.prepare and [str(Path(s).absolute()) for s in config.prepare] != request["sources"]:
        raise DataError(
            f"{config.path} was prepared from {shown(request['sources'])}, and data.prepare names "
            f"{shown(list(config.prepare))}. Prepare into another folder, or again with --force."
        )
    if request["cache_size"] != config.cache_size and "cache_size" in config.model_fields_set:
        raise DataError(
            f"{config.path} holds pictures of {request['cache_size']} pixels, and data.cache_size is "
            f"{config.cache_size}. Prepare it again with --force, or leave data.cache_size out."
        )
    if config.read == "cache":
        store.open_pixels()
    if all(Path(source).is_dir() for source in request["sources"]):
        refuse_changed_files(config.path, store.meta)
    elif config.read == "files":
        raise DataError(
            f"data.read is files, and {shown(request['sources'])} is not there any more. Bring the pictures back, or "
            f"set data.read cache."
        )
    return store


def refuse_changed_files(folder: Path, meta: dict[str, Any]) -> None:
    """Compare the pictures' paths, sizes and times with those that were prepared; their bytes are not read.

    Raises:
        DataError: a file is new, gone, or changed; the first are named.
    """
    found = discover(meta["request"]["sources"])
    if found.digest == meta["files_digest"]:
        return
    before = {row["path"]: (row["bytes"], row["mtime_ns"]) for row in (*read_files(folder), *meta["skipped"])}
    now = {picture.path: (picture.bytes, picture.mtime_ns) for picture in found.pictures}
    parts = {
        "changed": [path for path in before if path in now and now[path] != before[path]],
        "new": [path for path in now if path not in before],
        "gone": [path for path in before if path not in now],
    }
    words = "; ".join(f"{len(paths)} {what} ({shown(paths[:3])})" for what, paths in parts.items() if paths)
    raise DataError(
        f"{folder} no longer matches its pictures: {words or 'their order has changed'}. Prepare them again with "
        f"`zerofit data prepare images {' '.join(meta['request']['sources'])} --out {folder} --force`, or bring the "
        f"files back."
    )


def images_fingerprint(folder: Path) -> dict[str, dict[str, Any]]:
    """Split -> number of pictures and a SHA-256 over their contents and classes: tells other data on a resume."""
    splits: dict[str, dict[str, Any]] = read_images_meta(folder)["splits"]
    return {split: {"samples": splits[split]["samples"], "sha256": splits[split]["sha256"]} for split in SPLITS}
