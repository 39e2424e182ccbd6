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

#: Names of the folder of training pictures, and of the one of validation pictures beside it, in lower case.
TRAINING_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation")
#: Names that say which pictures train, validate and test; a folder of nothing else holds no classes.
SPLIT_NAMES = (*TRAINING_NAMES, *VALIDATION_NAMES, "test", "testing")
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
        _refuse_names(classes)
        folders[split] = set(classes)
        for name in classes:
            pictures += _pictures(root / name, name, split, others)
    _refuse_nothing(roots, pictures, others)
    _refuse_empty(folders, pictures)
    given = len(roots) == 2
    trained = folders.get("train" if given else None, set())
    notices = (*_check_classes(folders, given), *_beside(sources, roots), *_loose(roots))
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
    return _split_folders(paths[0])


def _split_folders(folder: Path) -> list[tuple[str | None, Path]]:
    """``train`` and ``val`` in a folder, ``train`` where it is alone, or the folder itself, which holds the classes.

    Raises:
        DataError: all of its folders are named as parts of a split, and one of the two is missing.
    """
    names = _class_folders(folder)
    train, validation = (
        next((name for wanted in known for name in names if name.lower() == wanted), None)
        for known in (TRAINING_NAMES, VALIDATION_NAMES)
    )
    if train is not None and validation is not None:
        return [("train", folder / train), ("val", folder / validation)]
    if train is not None and len(names) == 1:
        return [(None, folder / train)]
    if names and all(name.lower() in SPLIT_NAMES for name in names):
        missing, of = ("val", "validation") if train is not None else ("train", "training")
        raise DataError(
            f"{folder} holds {shown(names)} and no {missing}: a folder with train and val in it, or with the classes, "
            f"is needed. Rename the folder of the pictures for {of} to {missing}, name two folders (for training and "
            f"for validation), or name the one folder whose folders are classes, which zerofit then splits."
        )
    return [(None, folder)]


def _beside(sources: Sequence[str], roots: Sequence[tuple[str | None, Path]]) -> Iterator[str]:
    """What lies beside ``train`` and ``val``, which might have been meant."""
    if len(sources) == 1 and len(roots) == 2:
        more = [name for name in _class_folders(Path(sources[0])) if name not in {root.name for _, root in roots}]
        if more:
            yield f"folders beside train and val are not read: {shown(more)}"


def _loose(roots: Sequence[tuple[str | None, Path]]) -> Iterator[str]:
    """Pictures that lie beside the classes' folders, so in no class."""
    for _, root in roots:
        if loose := _loose_pictures(root):
            yield f"{loose:,} pictures in {root} lie in no class's folder and are not read"


def _loose_pictures(root: Path) -> int:
    return sum(Path(entry.name).suffix.lower() in PICTURE_SUFFIXES and entry.is_file() for entry in _entries(root))


def _class_folders(root: Path) -> list[str]:
    found = []
    for entry in _entries(root):
        if _leads_nowhere(entry) and Path(entry.name).suffix.lower() not in PICTURE_SUFFIXES:
            raise DataError(f"{shown([entry.path])} is a link that leads nowhere. Mend or remove it.")
        if entry.is_dir() and not _hidden(entry.name):
            found.append(entry.name)
    return found


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted by name.

    Raises:
        DataError: it may not be read.
    """
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(path: str | Path, error: OSError) -> DataError:
    return DataError(f"{shown([str(path)])} cannot be read ({error.strerror}). Mend or remove it.")


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
    """Files below a folder, in order; `seen` holds device and inode of the folders walked, so that loops end. A link
    that leads nowhere counts as a file, which is found unreadable later."""
    stat = os.stat(folder)  # noqa: PTH116
    if (stat.st_dev, stat.st_ino) in seen:
        return
    seen.add((stat.st_dev, stat.st_ino))
    for entry in _entries(folder):
        if _hidden(entry.name):
            continue
        if _leads_nowhere(entry):
            yield entry.path, entry.stat(follow_symlinks=False)
        elif entry.is_dir():
            yield from _walk(entry.path, seen)
        elif entry.is_file():
            yield entry.path, entry.stat()


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    if not entry.is_symlink():
        return False
    try:
        entry.stat()
    except OSError:
        return True
    return False


def _refuse_nothing(roots: Sequence[tuple[str | None, Path]], pictures: list[Picture], others: Counter[str]) -> None:
    if pictures:
        return
    root = roots[0][1]
    if loose := _loose_pictures(root):
        raise DataError(
            f"{root} holds {loose} pictures and no folders of classes. A picture's class is the name of its folder: "
            f"move them into {root}/CLASS/."
        )
    there = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5)) or "nothing"
    raise DataError(
        f"{' and '.join(str(path) for _, path in roots)}: no pictures in folders of classes; found {there}. Pictures "
        f"are {', '.join(sorted(PICTURE_SUFFIXES))}, in FOLDER/CLASS/ or FOLDER/train/CLASS/ and FOLDER/val/CLASS/."
    )


def _refuse_names(classes: Sequence[str]) -> None:
    """Names travel in JSON, so they must be text."""
    for name in classes:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"The class folder {shown([name])} has a name that is not UTF-8 ({os.fsencode(name)!r}). A class is "
                f"named after its folder, in files that others read: rename it, for instance with convmv."
            ) from error


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
