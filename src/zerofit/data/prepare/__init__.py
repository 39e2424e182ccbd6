"""From text to ``train.bin``, ``val.bin``, ``meta.json`` (and nanoGPT's ``meta.pkl``)."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...config.schema import DataConfig
from ...errors import DataError
from ..tokenizers import CharTokenizer, Tokenizer, make_tokenizer
from ..tokens import META, SPLITS, dtype_for, read_meta
from .sources import Piece, Pieces, open_source


@dataclass(frozen=True)
class Prepared:
    """What a folder of tokens holds."""

    folder: Path
    tokens: dict[str, int]
    """Split -> tokens."""
    vocab_size: int
    tokenizer: str
    made_now: bool
    """False when the folder held the same already."""

    def describe(self) -> str:
        """One line for people."""
        counts = ", ".join(f"{self.tokens[split]:,} {split} tokens" for split in SPLITS)
        return f"{self.folder}: {counts}, vocabulary {self.vocab_size:,} ({self.tokenizer})"


def is_prepared(folder: Path) -> bool:
    """True when both splits are there."""
    return all((folder / f"{split}.bin").exists() for split in SPLITS)


def prepare(config: DataConfig, *, force: bool = False) -> Prepared:
    """Tokenise ``config.prepare`` into ``config.path``; the last ``val_fraction`` of the text validates.

    Idempotent: the same request on a folder that holds its result changes nothing. Files appear under their names
    only when all are complete.

    Raises:
        DataError: no text, unreadable text, or a folder that holds something else (unless `force`).
    """
    request = {"sources": list(config.prepare), "tokenizer": config.tokenizer, "val_fraction": config.val_fraction}
    if not config.prepare:
        raise DataError("Nothing to prepare: name `shakespeare`, `python-docs`, or .txt and .jsonl files.")
    if is_prepared(config.path) and not force:
        return _already_there(config.path, request)
    pieces = open_source(config.prepare)
    characters, alphabet = _survey(pieces)
    if characters == 0:
        raise DataError(f"{', '.join(config.prepare)}: the text is empty. Nothing was written.")
    tokenizer = make_tokenizer(config.tokenizer, alphabet)
    work = config.path.with_name(config.path.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tokens = _write_splits(work, pieces, tokenizer, characters - int(characters * config.val_fraction))
    meta = {
        "format": 1,
        "dtype": dtype_for(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "tokens": tokens,
        **tokenizer.describe(),
        "request": request,
    }
    _write_meta(work, meta, tokenizer)
    _publish(work, config.path)
    return Prepared(config.path, tokens, tokenizer.vocab_size, tokenizer.name, made_now=True)


def _already_there(folder: Path, request: dict[str, Any]) -> Prepared:
    meta = read_meta(folder)
    if meta.get("request") != request:
        raise DataError(
            f"{folder} holds tokens made from {meta.get('request', 'something else')}, and {request} was asked for. "
            f"Prepare into another folder (--out), or write over it with --force."
        )
    return Prepared(folder, meta["tokens"], meta["vocab_size"], meta["tokenizer"], made_now=False)


def _survey(pieces: Pieces) -> tuple[int, set[str]]:
    """Characters in all pieces, and which ones: the split and a character vocabulary need both beforehand."""
    count, alphabet = 0, set[str]()
    for piece in pieces():
        count += len(piece.text)
        alphabet.update(piece.text)
    return count, alphabet


def _write_splits(folder: Path, pieces: Pieces, tokenizer: Tokenizer, train_characters: int) -> dict[str, int]:
    dtype = dtype_for(tokenizer.vocab_size)
    tokens = dict.fromkeys(SPLITS, 0)
    with (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
        files: dict[str, IO[bytes]] = {"train": train, "val": val}
        for split, piece in _split(pieces(), train_characters):
            ids = tokenizer.encode(piece.text).astype(dtype)
            if piece.ends and tokenizer.end_of_text is not None:
                ids = np.append(ids, dtype.type(tokenizer.end_of_text))
            files[split].write(ids.tobytes())
            tokens[split] += len(ids)
    return tokens


def _split(pieces: Iterator[Piece], train_characters: int) -> Iterator[tuple[str, Piece]]:
    """The pieces with the split that each belongs to; the one across the border is cut."""
    seen = 0
    for piece in pieces:
        room = min(max(train_characters - seen, 0), len(piece.text))
        if room == len(piece.text):
            yield "train", piece
        else:
            if room:
                yield "train", Piece(piece.text[:room], ends=True)
            yield "val", Piece(piece.text[room:], piece.ends)
        seen += len(piece.text)


def _write_meta(folder: Path, meta: dict[str, Any], tokenizer: Tokenizer) -> None:
    (folder / META).write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
    if isinstance(tokenizer, CharTokenizer):
        # nanoGPT's sample.py reads this; zerofit itself never unpickles it.
        numbered = dict(enumerate(tokenizer.characters))
        old = {"vocab_size": tokenizer.vocab_size, "itos": numbered, "stoi": {c: i for i, c in numbered.items()}}
        (folder / "meta.pkl").write_bytes(pickle.dumps(old))


def _publish(work: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in work.iterdir():
        file.replace(folder / file.name)
    work.rmdir()
