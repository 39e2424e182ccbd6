"""Text files of every kind that is read: plain, JSON lines and Parquet, compressed or not. Nothing is held whole."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ...errors import DataError, MissingDependency
from . import pieces
from .pieces import Piece, Tally, cut, cut_position

SUFFIXES = (".txt", ".jsonl")
ARCHIVES = (".parquet",)
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
#: Longest line of a .jsonl file; a document is one line.
LINE_LIMIT_BYTES = 1 << 28
PARQUET_ROWS = 1000
_DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class File:
    """A file, what it holds (a suffix of `SUFFIXES` or `ARCHIVES`) and how it is compressed (empty: not)."""

    path: Path
    kind: str
    compression: str = ""


def file_of(path: Path) -> File | None:
    """What a file is by its name; None when that is not known."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes else ""
    if kind in SUFFIXES or (kind in ARCHIVES and not compression):
        return File(path, kind, compression)
    return None


def read_documents(files: Sequence[File], text_key: str, errors: str, tally: Tally) -> Iterator[Piece]:
    """Pieces of all documents of the files, one file after the other.

    Raises:
        DataError: invalid UTF-8 or JSON with its place, a file that is damaged or holds no such member.
    """
    for file in files:
        before = tally.read_bytes
        try:
            with file.path.open("rb") as raw:
                for piece in _pieces(file, raw, text_key, errors, tally):
                    tally.read_bytes = before + raw.tell()
                    if errors == "replace":
                        tally.replaced += piece.text.count("\ufffd")
                    yield piece
        except UnicodeDecodeError:
            raise DataError(_invalid_utf8(file)) from None
        except _DAMAGED as error:
            what = f"is cut off or no {file.compression} file" if file.compression else "cannot be read"
            raise DataError(
                f"{file.path} {what} ({error}). Copy it again from where it came, or leave it out."
            ) from error
        tally.read_bytes = before + file.path.stat().st_size


def _pieces(file: File, raw: IO[bytes], text_key: str, errors: str, tally: Tally) -> Iterator[Piece]:
    if file.kind == ".parquet":
        yield from _read_parquet(file.path, raw, text_key, tally)
        return
    with _decompressed(file, raw) as stream:
        if file.kind == ".jsonl":
            yield from _read_jsonl(file.path, stream, text_key, errors, tally)
        else:
            with io.TextIOWrapper(stream, encoding="utf-8-sig", errors=errors, newline="") as lines:
                yield from _read_text(lines, tally)


def _decompressed(file: File, raw: IO[bytes]) -> IO[bytes]:
    """The file's bytes; one after the other, whatever lies on the disk."""
    stream: Any
    match file.compression:
        case "":
            return raw
        case ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        case ".bz2":
            stream = bz2.BZ2File(raw)
        case ".xz":
            stream = lzma.LZMAFile(raw)  # noqa: SIM115 (the caller closes it)
        case ".zst":
            stream = _Zstandard(_zstandard(file.path), raw)
    return io.BufferedReader(stream, 1 << 20)


class _Zstandard(io.RawIOBase):
    """The content of a .zst file, frame after frame. Unlike the library's reader it tells a file that is cut off."""

    def __init__(self, library: Any, raw: IO[bytes]) -> None:
        self.library, self.raw = library, raw
        self.frame: Any = None
        self.waiting = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.waiting:
            data = (self.frame.unused_data if self.frame and self.frame.eof else b"") or self.raw.read(1 << 17)
            if not data:
                if self.frame is not None and not self.frame.eof:
                    raise EOFError("the last frame has no end")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.library.ZstdDecompressor().decompressobj()
            try:
                self.waiting = self.frame.decompress(data)
            except self.library.ZstdError as error:
                raise OSError(str(error)) from error
        size = min(len(buffer), len(self.waiting))
        buffer[:size], self.waiting = self.waiting[:size], self.waiting[size:]
        return size


def _zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependency(
            f"{path} is compressed with zstd, which needs a package: run `pip install 'zerofit[data]'`, or decompress "
            f"it (`zstd -d`)."
        ) from error
    return zstandard


def _read_text(lines: IO[str], tally: Tally) -> Iterator[Piece]:
    """One document; held is what one piece needs."""
    text, starts = "", True
    while block := lines.read(pieces.PIECE_CHARACTERS):
        text += block
        while len(text) > pieces.PIECE_CHARACTERS:
            at = cut_position(text, tally)
            yield Piece(text[:at], starts, False)
            tally.long += starts
            text, starts = text[at:], False
    yield Piece(text, starts, True)


def _read_jsonl(path: Path, lines: IO[bytes], text_key: str, errors: str, tally: Tally) -> Iterator[Piece]:
    number = 0
    while line := lines.readline(LINE_LIMIT_BYTES + 1):
        number += 1
        if len(line) > LINE_LIMIT_BYTES:
            raise DataError(
                f"{path}, line {number} is longer than {LINE_LIMIT_BYTES >> 20} MiB. A line of a .jsonl file is one "
                f"document and is read whole; split it, or give the text as .txt."
            )
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield from cut(_text_of(path, number, line, text_key, errors), tally)


def _text_of(path: Path, number: int, line: bytes, text_key: str, errors: str) -> str:
    found: Any = None
    try:
        found = json.loads(line.decode("utf-8", errors))
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(f"{path}, line {number}, byte {error.start + 1} of it")) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not JSON ({error}). Each line of a .jsonl file is one document, an object with a "
            f'string under "{text_key}".'
        ) from None
    text = found.get(text_key) if isinstance(found, dict) else None
    if text is None and isinstance(found, dict) and text_key in found:
        return ""  # null is a document without text
    if not isinstance(text, str):
        members = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise DataError(
            f'{path}, line {number}: no JSON object with a string under "{text_key}"; it holds {members[:200]}. Name '
            f"the member that holds the text with --text-key."
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if errors == "strict":
            raise DataError(
                f"{path}, line {number}: an unpaired surrogate (\\ud800 to \\udfff) at character {error.start + 1} of "
                f"its text, which UTF-8 cannot hold. Mend it, or read with --errors replace."
            ) from None
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_parquet(path: Path, raw: IO[bytes], text_key: str, tally: Tally) -> Iterator[Piece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency(f"{path} needs pyarrow: run `pip install 'zerofit[data]'`.") from error
    try:
        table = pyarrow.parquet.ParquetFile(raw)
        columns = table.schema_arrow.names
        if text_key not in columns:
            raise DataError(
                f"{path} has no column {text_key!r}; it has {', '.join(columns)[:200]}. Name the one that holds the "
                f"text with --text-key."
            )
        row = 0
        for batch in table.iter_batches(PARQUET_ROWS, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                row += 1
                if text is not None and not isinstance(text, str):
                    raise DataError(f"{path}, row {row}: column {text_key!r} holds {type(text).__name__}, not text.")
                yield from cut(text or "", tally)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as a Parquet file ({str(error)[:200]}). Copy it again.") from error


def _not_utf8(place: str) -> str:
    return (
        f"{place}: not valid UTF-8. Convert the file (for example with iconv -f latin1 -t utf-8), leave it out, or "
        f"read it with --errors replace."
    )


def _invalid_utf8(file: File) -> str:
    """Where a text file stops being UTF-8. Read again from the start, since a decoder does not count lines."""
    line, in_line, carry = 1, 0, b""
    with file.path.open("rb") as raw, _decompressed(file, raw) as stream:
        while block := stream.read(1 << 20):
            data = carry + block
            try:
                data.decode("utf-8")
                good, carry = data, b""
            except UnicodeDecodeError as error:
                good, carry = data[: error.start], data[error.start :]
                # A character at the end may go on in the next block.
                if error.reason != "unexpected end of data" or len(carry) >= 4:
                    line, in_line = _advance(good, line, in_line)
                    return _not_utf8(f"{file.path}, line {line}, byte {in_line + 1} of it")
            line, in_line = _advance(good, line, in_line)
    return _not_utf8(f"{file.path}, line {line}, byte {in_line + 1} of it")


def _advance(data: bytes, line: int, in_line: int) -> tuple[int, int]:
    """The line and the byte within it after `data`."""
    newlines = data.count(b"\n")
    return line + newlines, in_line + len(data) if not newlines else len(data) - data.rfind(b"\n") - 1
