"""Which pictures a folder holds, and of which class."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...config.images import PICTURE_SUFFIXES
from ...errors import DataError

#: Names of the folder of validation pictures beside ``train``.
VALIDATION_NAMES = ("val", "valid", "validation")
#: Names of a message's list.
NAMES_SHOWN = 10


@dataclass(frozen=True)
class Picture:
    """A file before it is opened.

    Attributes:
        path: as found under the folder that was named.
        class_name: of the folder.
        split: ``train`` or ``val``; None where zerofit splits.
    """

    path: str
    class_name: str
    split: str | None
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Found:
    """All pictures, sorted by split, class and path, and what else was there."""

    pictures: list[Picture]
    classes: tuple[str, ...]
    """Sorted: a class's number is its place."""
    given_split: bool
    """Whether the folders say which pictures validate."""
    others: dict[str, int]
    """Suffix -> files that are no pictures."""
    notices: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over every picture's path, size and time of change: tells a folder that has changed."""
        rows = (f"{p.split}\0{p.path}\0{p.bytes}\0{p.mtime_ns}\n" for p in self.pictures)
        return hashlib.sha256("".join(rows).encode("utf-8", "surrogateescape")).hexdigest()


def discover(sources: Sequence[str]) -> Found:
    """Find the pictures of one folder (``train/CLASS`` and ``val/CLASS``, or ``CLASS``), or of two (train, val).

    Everything below a class's folder belongs to it. Hidden files and folders are passed over, links are followed, and
    a folder that links lead to twice is walked once.

    Raises:
        DataError: no folder, no pictures, an empty class, a single class, or a class that only validates.
    """
    roots = _roots(sources)
    others: Counter[str] = Counter()
    pictures: list[Picture] = []
    folders: dict[str | None, set[str]] = {}
    for split, root in roots:
        classes = _class_folders(root)
        folders[split] = set(classes)
        for name in classes:
            pictures += _pictures(root / name, name, split, others)
    _refuse_nothing(roots, pictures, others)
    _refuse_empty(folders, pictures)
    given = len(roots) == 2
    trained = folders.get("train" if given else None, set())
    notices = (*_check_classes(folders, given), *_beside(sources, roots))
    return Found(pictures, tuple(sorted(trained)), given, dict(others), notices)


def _roots(sources: Sequence[str]) -> list[tuple[str | None, Path]]:
    """The folders that hold the classes, each with its split."""
    if len(sources) not in (1, 2):
        raise DataError(
            f"{len(sources)} sources of pictures: name one folder (with train and val in it, or with the classes), or "
            f"two, for training and for validation."
        )
    paths = [Path(source) for source in sources]
    for path in paths:
        if not path.is_dir():
            raise DataError(f"{path}: no such folder. Pictures lie in a folder a class, FOLDER/CLASS/*.jpg.")
    if len(paths) == 2:
        return [("train", paths[0]), ("val", paths[1])]
    train = paths[0] / "train"
    validation = next((paths[0] / name for name in VALIDATION_NAMES if (paths[0] / name).is_dir()), None)
    if train.is_dir() and validation is not None:
        return [("train", train), ("val", validation)]
    return [(None, train if train.is_dir() and len(_class_folders(paths[0])) == 1 else paths[0])]


def _beside(sources: Sequence[str], roots: Sequence[tuple[str | None, Path]]) -> Iterator[str]:
    """What lies beside ``train`` and ``val``, which might have been meant."""
    if len(sources) == 1 and len(roots) == 2:
        more = [name for name in _class_folders(Path(sources[0])) if name not in {root.name for _, root in roots}]
        if more:
            yield f"folders beside train and val are not read: {shown(more)}"


def _class_folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _hidden(entry.name))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _pictures(folder: Path, class_name: str, split: str | None, others: Counter[str]) -> Iterator[Picture]:
    seen: set[tuple[int, int]] = set()
    for path, stat in _walk(str(folder), seen):
        suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122 - a million paths: strings are faster
        if suffix in PICTURE_SUFFIXES:
            yield Picture(path, class_name, split, stat.st_size, stat.st_mtime_ns)
        else:
            others[suffix or "no suffix"] += 1


def _walk(folder: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, os.stat_result]]:
    """Files below a folder, in order; `seen` holds device and inode of the folders walked, so that loops end."""
    stat = os.stat(folder)  # noqa: PTH116
    if (stat.st_dev, stat.st_ino) in seen:
        return
    seen.add((stat.st_dev, stat.st_ino))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if _hidden(entry.name):
            continue
        try:
            if entry.is_dir():
                yield from _walk(entry.path, seen)
            elif entry.is_file():
                yield entry.path, entry.stat()
        except OSError as error:  # a link in a circle, or a folder that may not be read
            raise DataError(f"{entry.path} cannot be read ({error.strerror}). Mend or remove it.") from error


def _refuse_nothing(roots: Sequence[tuple[str | None, Path]], pictures: list[Picture], others: Counter[str]) -> None:
    if pictures:
        return
    root = roots[0][1]
    loose = sum(Path(entry.name).suffix.lower() in PICTURE_SUFFIXES for entry in os.scandir(root))
    if loose:
        raise DataError(
            f"{root} holds {loose} pictures and no folders of classes. A picture's class is the name of its folder: "
            f"move them into {root}/CLASS/."
        )
    there = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5)) or "nothing"
    raise DataError(
        f"{' and '.join(str(path) for _, path in roots)}: no pictures in folders of classes; found {there}. Pictures "
        f"are {', '.join(sorted(PICTURE_SUFFIXES))}, in FOLDER/CLASS/ or FOLDER/train/CLASS/ and FOLDER/val/CLASS/."
    )


def _refuse_empty(folders: dict[str | None, set[str]], pictures: list[Picture]) -> None:
    filled = {(picture.split, picture.class_name) for picture in pictures}
    empty = [
        f"{split or ''}{'/' if split else ''}{name}"
        for split, names in folders.items()
        for name in sorted(names)
        if (split, name) not in filled
    ]
    if empty:
        raise DataError(
            f"{'Class folders' if len(empty) > 1 else 'A class folder'} without pictures: {shown(empty)}. Every folder "
            f"is a class and needs pictures: fill them, or remove them."
        )


def _check_classes(folders: dict[str | None, set[str]], given: bool) -> tuple[str, ...]:
    """Notices about classes; refuses those that cannot be trained."""
    trained = folders["train" if given else None]
    unknown = sorted(folders.get("val", set()) - trained)
    if unknown:
        raise DataError(
            f"val holds classes that train lacks: {shown(unknown)}. What validates must have been trained: add them to "
            f"train, or remove them from val."
        )
    if len(trained) < 2:
        raise DataError(
            f"Only one class, {next(iter(trained))!r}: telling classes apart needs two. Is the folder named the one "
            f"that holds the class folders?"
        )
    missing = sorted(trained - folders["val"]) if given else []
    return (f"val lacks classes that train has: {shown(missing)}",) if missing else ()


def shown(names: Sequence[str]) -> str:
    """The first names of a list, printable, and how many more there are."""
    listed = ", ".join(name.encode("utf-8", "replace").decode() for name in names[:NAMES_SHOWN])
    return listed + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")
