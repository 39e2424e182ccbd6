"""Where text comes from. A corpus yields pieces of documents again and again, without holding all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...config.images import PICTURE_SUFFIXES
from ...errors import DataError
from .files import ARCHIVES, COMPRESSIONS, SUFFIXES, File, file_of, read_documents
from .pieces import Piece, Tally, cut
from .shakespeare import shakespeare_plays

BUILT_IN = ("shakespeare", "python-docs", "openwebtext")


@dataclass(frozen=True)
class Subset:
    """A part of a corpus: the first `documents`, or an evenly spread `share` of them."""

    documents: int | None = None
    share: float = 1.0

    @staticmethod
    def of_text(text: str | None) -> Subset:
        """``1%`` or ``20000``.

        Raises:
            DataError: neither a percentage nor a number of documents.
        """
        if text is None:
            return Subset()
        try:
            if text.strip().endswith("%"):
                share = float(text.strip().removesuffix("%")) / 100
                if 0 < share <= 1:
                    return Subset(share=share)
            elif int(text) > 0:
                return Subset(documents=int(text))
        except ValueError:
            pass
        raise DataError(
            f"subset {text!r} is no part of a corpus: give a share above 0% and up to 100%, as 1%, or a number of "
            f"documents, as 20000."
        )

    def takes(self, number: int) -> bool:
        """Whether document `number` (from 0) belongs to it; an n-th of them lies in every run of n documents."""
        if self.documents is not None:
            return number < self.documents
        return self.share == 1.0 or int((number + 1) * self.share) > int(number * self.share)


@dataclass(frozen=True)
class Reading:
    """How text is read.

    Attributes:
        text_key: member of JSON lines and column of Parquet files that holds the text.
        errors: ``strict`` refuses invalid UTF-8, ``replace`` puts U+FFFD in its place.
        subset: which documents.
        workers: processes that a download may use.
    """

    text_key: str = "text"
    errors: str = "strict"
    subset: Subset = field(default_factory=Subset)
    workers: int = 1


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order.

    Attributes:
        read: yields them from the first one on, counting in the tally; may be called again.
        identity: what they are read from, with sizes and times: another identity may be other text.
        total_bytes: of all files as they lie on the disk; None where it is not known.
    """

    read: Callable[[Tally], Iterator[Piece]]
    identity: tuple[tuple[str, int, int], ...] = ()
    total_bytes: int | None = None


def open_source(names: Sequence[str], reading: Reading | None = None) -> Corpus:
    """The documents of ``shakespeare``, ``python-docs``, ``openwebtext``, or of text files, folders and patterns.

    Raises:
        DataError: nothing was found under a name, or a file is of another kind.
    """
    reading = reading or Reading()
    known = [name for name in names if name in BUILT_IN and not Path(name).exists()]
    if known and len(names) > 1:
        raise DataError(
            f"{', '.join(names)}: {known[0]} is a corpus of its own and cannot be joined with others in one folder. "
            f"Prepare each into its own folder and mix them with data.sources."
        )
    if known:
        # OpenWebText's own reader takes a part of it without fetching the rest.
        subset = Subset() if known[0] == "openwebtext" else reading.subset
        return _subset(_built_in(known[0], reading), subset)
    files = [file for name in names for file in _files(name)]
    stats = [file.path.stat() for file in files]
    return _subset(
        Corpus(
            lambda tally: read_documents(files, reading.text_key, reading.errors, tally),
            tuple(
                (str(file.path), status.st_size, status.st_mtime_ns) for file, status in zip(files, stats, strict=True)
            ),
            sum(status.st_size for status in stats),
        ),
        reading.subset,
    )


def _built_in(name: str, reading: Reading) -> Corpus:
    if name == "shakespeare":
        plays = shakespeare_plays()
        return Corpus(lambda tally: (piece for play in plays for piece in cut(play, tally)))
    if name == "python-docs":
        return Corpus(lambda tally: (piece for text in python_docs() for piece in cut(text, tally)))
    from .openwebtext import openwebtext

    texts = openwebtext(reading.subset.documents, reading.subset.share, reading.workers)
    return Corpus(lambda tally: (piece for text in texts() for piece in cut(text, tally)))


def _subset(corpus: Corpus, subset: Subset) -> Corpus:
    """The corpus without empty documents, and of the rest the subset. `Tally.documents` counts what is left."""

    def read(tally: Tally) -> Iterator[Piece]:
        number = -1
        for piece in corpus.read(tally):
            if piece.starts and piece.ends and not piece.text:
                tally.empty += 1
                continue
            number += piece.starts
            if subset.documents is not None and number >= subset.documents:
                return
            if subset.takes(number):
                tally.documents += piece.ends
                tally.characters += len(piece.text)
                yield piece

    return Corpus(read, corpus.identity, corpus.total_bytes)


def python_docs() -> Iterator[str]:
    """The language reference that ships with Python (``pydoc_data``, about 700 kB): text for a machine without
    network."""
    from pydoc_data.topics import topics  # type: ignore[import-untyped,unused-ignore]

    for _, text in sorted(topics.items()):
        yield text


def _files(name: str) -> list[File]:
    path = Path(name)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and file_of(p) is not None)
    else:
        found = [path] if path.is_file() else sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        found = [p for p in found if p.is_file()]
    if not found:
        if path.is_dir() and any(p.suffix.lower() in PICTURE_SUFFIXES for p in path.rglob("*")):
            raise DataError(
                f"{name!r} holds pictures and no text. Pictures in folders of classes are prepared with `zerofit data "
                f"prepare images {name}`, and trained on with an image classifier (`zerofit train --preset animals90`)."
            )
        raise DataError(
            f"{name!r}: no such text. Sources are {', '.join(BUILT_IN)}, or files, folders and patterns of "
            f"{', '.join(SUFFIXES)} and {ARCHIVES[0]}."
        )
    return [_known(file) for file in found]


def _known(path: Path) -> File:
    file = file_of(path)
    if file is None:
        raise DataError(
            f"{path} is none of {', '.join(SUFFIXES)} (each also with {', '.join(COMPRESSIONS)}) and {ARCHIVES[0]}, so "
            f"how to read it is not known. Convert it, rename it, or leave it out."
        )
    return file
