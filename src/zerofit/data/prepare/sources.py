"""Where text comes from. A source yields pieces of text again and again, without holding all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError
from .shakespeare import shakespeare_plays

#: Characters of a text file that are held at a time.
PIECE_CHARACTERS = 1 << 22
SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Piece:
    """Some text; `ends` says that a document ends after it."""

    text: str
    ends: bool


Pieces = Callable[[], Iterator[Piece]]


def open_source(names: Sequence[str]) -> Pieces:
    """Pieces of ``shakespeare``, ``python-docs``, or of text files, folders and patterns, in a fixed order.

    Raises:
        DataError: nothing was found under a name, or a file is neither .txt nor .jsonl.
    """
    if list(names) == ["shakespeare"]:
        plays = shakespeare_plays()
        return lambda: (Piece(play, True) for play in plays)
    if list(names) == ["python-docs"]:
        return python_docs
    files = [file for name in names for file in _files(name)]
    return lambda: (piece for file in files for piece in _read(file))


def python_docs() -> Iterator[Piece]:
    """The language reference that ships with Python (``pydoc_data``, about 700 kB): text for a machine without
    network."""
    from pydoc_data.topics import topics  # type: ignore[import-untyped,unused-ignore]

    for _, text in sorted(topics.items()):
        yield Piece(text, True)


def _files(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
    else:
        found = [path] if path.is_file() else sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    if not found:
        raise DataError(
            f"{name!r}: no such text. Sources are `shakespeare`, `python-docs`, or files, folders and patterns of .txt "
            f"and .jsonl."
        )
    for file in found:
        if file.suffix not in SUFFIXES:
            raise DataError(f"{file} is neither .txt nor .jsonl. Convert it, or leave it out.")
    return found


def _read(file: Path) -> Iterator[Piece]:
    """Pieces of a file; invalid UTF-8 is refused with its place."""
    try:
        if file.suffix == ".jsonl":
            yield from _read_jsonl(file)
        else:
            yield from _read_text(file)
    except UnicodeDecodeError:
        raise DataError(_invalid_utf8(file)) from None


def _read_text(file: Path) -> Iterator[Piece]:
    with file.open(encoding="utf-8", newline="") as lines:
        current = lines.read(PIECE_CHARACTERS)
        while current:
            following = lines.read(PIECE_CHARACTERS)
            yield Piece(current, ends=not following)
            current = following


def _read_jsonl(file: Path) -> Iterator[Piece]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise DataError(
                    f'{file}, line {number}: not a JSON object with a string under "text". Each line of a .jsonl file '
                    f"is one document in that form."
                )
            if text:
                yield Piece(text, True)


def _invalid_utf8(file: Path) -> str:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"{file}, line {number}, byte {error.start + 1} of it: not valid UTF-8. Convert the file (for "
                    f"example with iconv -f latin1 -t utf-8), or leave it out."
                )
    return f"{file} is not valid UTF-8. Convert it, or leave it out."
