"""What a folder of tokens says about itself: ``meta.json``, nanoGPT's ``meta.pkl``, or only its bytes."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

META = "meta.json"
NANOGPT_META = "meta.pkl"
#: Largest ids that were found, with the size and time of the files they are of, so that a start reads no whole file.
SCAN = "scan.json"
#: Tokens looked at together when the largest id is searched.
SCAN_TOKENS = 1 << 24
#: A vocabulary in a pickle is far smaller; a larger file is something else.
PICKLE_LIMIT_BYTES = 1 << 26
#: Words of 4 bytes that tell the width of tokens: blocks spread over the file, so that few pages are read.
SAMPLE_BLOCKS, SAMPLE_WORDS = 64, 1024
#: Upper halves of 4-byte tokens stay below this: vocabularies of a million.
LARGEST_UPPER_HALF = 16


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """uint16, or uint32 for a vocabulary that it cannot count."""
    return np.dtype(np.uint16 if vocab_size <= 65_535 else np.uint32)


def read_meta(folder: Path) -> dict[str, Any]:
    """``meta.json`` of a prepared folder, else what nanoGPT's ``meta.pkl`` tells in the same words, else nothing.

    Raises:
        DataError: unreadable, or a pickle that names code.
    """
    path = folder / META
    if not path.exists():
        return _from_nanogpt(folder / NANOGPT_META)
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON ({error}). Prepare the data again with `zerofit data prepare`.") from error
    if not isinstance(meta, dict) or meta.get("dtype") not in ("uint16", "uint32"):
        found = meta.get("dtype") if isinstance(meta, dict) else meta
        if isinstance(meta, dict) and "classes" in meta:
            raise DataError(
                f"{folder} holds prepared pictures, and tokens are wanted. Name a folder of `zerofit data prepare`, or "
                f"train a classifier of pictures on it (`zerofit train --preset animals90 --data.path {folder}`)."
            )
        raise DataError(f"{path}: dtype {found!r}; tokens are uint16 or uint32. Prepare the data again.")
    return meta


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, text, lists and dictionaries; whatever else a pickle names is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        raise DataError(
            f"names {module}.{name}, which reading it would import and run. A vocabulary is dictionaries, text and "
            f"numbers only"
        )


def read_plain_pickle(path: Path) -> Any:
    """The value of a pickle that holds builtin values only.

    Raises:
        DataError: it names code, is torn, or is far too large; nothing in it was run.
    """
    try:
        if path.stat().st_size > PICKLE_LIMIT_BYTES:
            raise DataError(f"has {path.stat().st_size} bytes, and a vocabulary has fewer than {PICKLE_LIMIT_BYTES}")
        return _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except DataError as error:
        raise DataError(
            f"{path} {error}; it was not loaded. Remove the file (the vocabulary is then taken from the tokens), or "
            f"prepare the data again."
        ) from None
    except Exception as error:  # a torn pickle raises nearly anything
        raise DataError(
            f"{path} cannot be read as a pickle ({type(error).__name__}: {error}). Remove it, or prepare the data "
            f"again."
        ) from error


def _from_nanogpt(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = read_plain_pickle(path)
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}; nanoGPT's holds vocab_size, itos and stoi.")
    size, itos = found.get("vocab_size"), found.get("itos")
    meta: dict[str, Any] = {"vocab_size": size} if isinstance(size, int) and size > 0 else {}
    if isinstance(itos, list):
        itos = dict(enumerate(itos))
    if isinstance(itos, dict) and itos and _is_alphabet(itos):
        characters = [itos[i] for i in range(len(itos))]
        meta |= {"tokenizer": "char", "characters": "".join(characters), "vocab_size": size or len(characters)}
    return meta


def _is_alphabet(itos: Mapping[Any, Any]) -> bool:
    """Ids from 0 without a gap, each one character."""
    return itos.keys() == set(range(len(itos))) and all(isinstance(c, str) and len(c) == 1 for c in itos.values())


@dataclass(frozen=True)
class Width:
    """Bytes of a token in a folder's files.

    Attributes:
        dtype: uint16 or uint32.
        reason: how it was inferred; None where ``meta.json`` says it.
    """

    dtype: np.dtype[Any]
    reason: str | None = None


def token_width(folder: Path, path: Path) -> Width:
    """The type of the tokens in `path`, one of the folder's splits: as ``meta.json`` says, else told by the bytes.

    One type for the folder: its training split is looked at, where it is there.
    """
    known = read_meta(folder).get("dtype")
    if known:
        return Width(np.dtype(known))
    train = folder / "train.bin"
    return infer_width(train if train.exists() and train.stat().st_size else path)


def infer_width(path: Path) -> Width:
    """Tell uint16 from uint32 by a sample of the file.

    Read as 4-byte numbers, real uint32 tokens have upper halves that are nearly always the same few small numbers (0
    for ids below 65,536). In a file of uint16 the upper half is another token and varies as much as the lower one.
    """
    size = path.stat().st_size
    narrow, wide = np.dtype(np.uint16), np.dtype(np.uint32)
    if size % 4 or size == 0:
        return Width(narrow, "its size is no multiple of 4 bytes")
    words: NDArray[np.uint32] = np.memmap(path, dtype=wide, mode="r")
    step = max((len(words) - SAMPLE_WORDS) // SAMPLE_BLOCKS, 1)
    blocks = [words[i : i + SAMPLE_WORDS] for i in range(0, max(len(words) - SAMPLE_WORDS, 1), step)]
    sample = np.concatenate(blocks)
    upper, lower = sample >> 16, sample & 0xFFFF
    if not upper.any() and lower.any():
        return Width(wide, "every other 2 bytes are 0")
    few, many = len(np.unique(upper)), len(np.unique(lower))
    if upper.max() < LARGEST_UPPER_HALF and many > 8 * few and lower.max() > 1000:
        return Width(wide, f"every other 2 bytes are below {LARGEST_UPPER_HALF}, the others not")
    return Width(narrow, "its odd and even pairs of bytes look alike")


def largest_token(path: Path, dtype: np.dtype[Any]) -> int:
    """Largest id in a file, read in pieces; not mapped, so that nothing counts as this process's memory."""
    largest = 0
    with path.open("rb") as file:
        while len(tokens := np.fromfile(file, dtype, SCAN_TOKENS)):
            largest = max(largest, int(tokens.max()))
    return largest


def known_largest(path: Path, dtype: np.dtype[Any]) -> int:
    """Largest id of a split. A file of the same size and time is read once; what was found stands in `SCAN` beside it.

    Where the folder cannot be written to, it is read each time.
    """
    status = path.stat()
    key = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "dtype": dtype.name}
    scan = path.with_name(SCAN)
    known = _read_scan(scan)
    entry = known.get(path.name)
    if isinstance(entry, dict) and {k: entry.get(k) for k in key} == key and isinstance(entry.get("largest"), int):
        return int(entry["largest"])
    largest = largest_token(path, dtype)
    try:
        work = scan.with_name(f".{SCAN}.partial")
        work.write_text(json.dumps(known | {path.name: {**key, "largest": largest}}), encoding="utf-8")
        work.replace(scan)
    except OSError:
        pass
    return largest


def _read_scan(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
