"""From text to ``train.bin``, ``val.bin``, ``meta.json`` (and nanoGPT's ``meta.pkl``).

::

    train.bin  val.bin                        tokens, uint16 or uint32, as nanoGPT writes them
    train_documents.bin  val_documents.bin    uint64: the token with which each document starts
    meta.json                                 type, vocabulary, tokenizer, counts, and the request
    meta.pkl                                  vocab_size, and of characters stoi and itos, for nanoGPT's scripts
    tokenizer.json                            of a Hugging Face tokenizer: its own file

One process reads, many tokenise, and the files grow in the order of the text, so that the result depends on neither the
number of processes nor on interruptions. What was finished before a kill is kept in ``NAME.partial``.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...config.schema import DataConfig
from ...errors import DataError
from ..metadata import META, NANOGPT_META, SCAN, dtype_for, read_meta
from ..tokenizers import (
    TOKENIZER_FILE,
    CharTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    find_tokenizer,
)
from ..tokens import SPLITS, largest_of
from .encode import available_cores, chunks, encode_all
from .lock import only_one
from .pieces import Tally
from .progress import Meter, meter
from .shards import JOURNAL, Plan, Shards
from .sources import Corpus, Reading, Subset, open_source

#: Settings that older folders do not name, with what they then were.
_FORMER_DEFAULTS = {"split": "tail", "text_key": "text", "subset": None, "errors": "strict"}


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
    documents: dict[str, int] | None = None
    """Split -> documents in it, one across the border in both; None in folders of an older version."""
    document_count: int | None = None
    notes: tuple[str, ...] = ()
    """What people should hear: skipped documents, cuts."""

    def describe(self) -> str:
        """One line for people, and one for each note."""
        counts = ", ".join(f"{self.tokens[split]:,} {split} tokens" for split in SPLITS)
        documents = f", {self.document_count:,} documents" if self.document_count else ""
        line = f"{self.folder}: {counts}{documents}, vocabulary {self.vocab_size:,} ({self.tokenizer})"
        return "\n".join((line, *self.notes))


def is_prepared(folder: Path) -> bool:
    """True when both splits are there."""
    return all((folder / f"{split}.bin").exists() for split in SPLITS)


def prepare(
    config: DataConfig, *, force: bool = False, workers: int | None = None, console: Console | None = None
) -> Prepared:
    """Tokenise ``config.prepare`` into ``config.path``.

    Idempotent: the same request on a folder that holds its result changes nothing, and after a kill it goes on. Files
    appear under their names only when all are complete.

    Args:
        config: sources, tokenizer and split.
        force: write over a folder that holds something else, and begin anew.
        workers: processes that tokenise; None: one a core. The result does not depend on it.
        console: where a progress bar goes.

    Raises:
        DataError: no text, unreadable text, or a folder that holds something else (unless `force`).
        MissingDependency: an optional package is needed.
    """
    request = _request(config)
    if not config.prepare:
        raise DataError("Nothing to prepare: name `shakespeare`, `openwebtext`, or .txt, .jsonl and .parquet files.")
    if is_prepared(config.path) and not force:
        return _already_there(config.path, request)
    tokenizer = find_tokenizer(config.tokenizer)
    workers = workers or available_cores()
    reading = Reading(config.text_key, config.errors, Subset.of_text(config.subset), workers)
    corpus = open_source(config.prepare, reading)
    work = config.path.with_name(config.path.name + ".partial")
    if not force and not work.exists():  # with it, what lies there are files that a kill left half published
        _refuse_others_files(config.path)
    with only_one(config.path), meter(console, corpus.total_bytes) as bar:
        if force:
            shutil.rmtree(work, ignore_errors=True)
        if tokenizer is None:
            tokenizer = CharTokenizer.of_text(_alphabet(corpus, bar))
        try:
            prepared = _tokenise(config, request, corpus, tokenizer, work, workers, bar)
        except OSError as error:
            raise DataError(
                f"{work} could not be written ({error}). Make room, or prepare into another folder (--out). What is "
                f"finished is kept: the same command goes on where it stopped."
            ) from error
    return prepared


def _refuse_others_files(folder: Path) -> None:
    """Refuse a folder with files of the names that are written, which are somebody's: prepared pictures, a tokenizer.

    Raises:
        DataError: it holds some.
    """
    names = (META, NANOGPT_META, TOKENIZER_FILE, *(f"{split}.bin" for split in SPLITS))
    there = [name for name in names if (folder / name).exists()]
    if there:
        raise DataError(
            f"{folder} holds {', '.join(there)} and no complete pair of train.bin and val.bin, so it is of something "
            f"else, and tokens prepared into it would take the place of these files. Prepare into another folder "
            f"(--out, or data.path), or write over them with `zerofit data prepare … --force`."
        )


def _request(config: DataConfig) -> dict[str, Any]:
    """What the result depends on. Settings at their former defaults are left out, as older folders do."""
    request: dict[str, Any] = {
        "sources": list(config.prepare), "tokenizer": config.tokenizer, "val_fraction": config.val_fraction,
    }  # fmt: skip
    return request | {
        key: getattr(config, key) for key, former in _FORMER_DEFAULTS.items() if getattr(config, key) != former
    }


def _already_there(folder: Path, request: dict[str, Any]) -> Prepared:
    meta = read_meta(folder)
    if meta.get("request") != request:
        raise DataError(
            f"{folder} holds tokens made from {meta.get('request', 'something else')}, and {request} was asked for. "
            f"Prepare into another folder (--out), or write over it with --force."
        )
    documents, count = meta.get("documents"), meta.get("document_count")
    return Prepared(folder, meta["tokens"], meta["vocab_size"], meta["tokenizer"], False, documents, count)


def _alphabet(corpus: Corpus, bar: Meter) -> Iterator[str]:
    """The characters of all text: a character vocabulary needs them before the first token."""
    bar.phase("Reading characters")
    tally, seen = Tally(), np.zeros(0x110000, dtype=bool)
    for piece in corpus.read(tally):
        seen[np.frombuffer(piece.text.encode("utf-32-le"), dtype=np.uint32)] = True
        bar.show(tally, 0)
    return map(chr, np.flatnonzero(seen).tolist())


def _tokenise(
    config: DataConfig,
    request: dict[str, Any],
    corpus: Corpus,
    tokenizer: Tokenizer,
    work: Path,
    workers: int,
    bar: Meter,
) -> Prepared:
    bar.phase("Tokenising")
    tally, dtype = Tally(), dtype_for(tokenizer.vocab_size)
    identity = {"request": request, "files": [list(file) for file in corpus.identity], **tokenizer.describe()}
    with Shards(work, identity, Plan(config.split, config.val_fraction, dtype)) as shards:
        begun = shards.chunks
        source = shards.skip(chunks(corpus.read(tally)))
        for number, (chunk, encoded) in enumerate(encode_all(tokenizer, source, workers)):
            if begun and number == 0:
                bar.count_from(tally.characters)
            shards.add(chunk, encoded)
            bar.show(tally, sum(shards.tokens.values()))
        if tally.characters == 0:
            shutil.rmtree(work)
            empty = f" ({tally.empty:,} empty documents)" if tally.empty else ""
            raise DataError(f"{', '.join(config.prepare)}: the text is empty{empty}. Nothing was written.")
        shards.finish()
        tokens, documents = dict(shards.tokens), dict(shards.starts)
    notes = tally.notes()
    if begun:
        notes.insert(0, f"An earlier preparation was interrupted; {begun:,} of its chunks were kept.")
    elif shards.discarded:
        notes.insert(0, f"An interrupted preparation of other text or with other settings in {work} was discarded.")
    meta = {
        "format": 2,
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokens": tokens,
        "documents": documents,
        "document_count": tally.documents,
        "empty_documents": tally.empty,
        "characters": tally.characters,
        "end_of_text_token": tokenizer.end_of_text,
        **tokenizer.describe(),
        "request": request,
    }
    _write_meta(work, meta, tokenizer)
    (work / JOURNAL).unlink()
    _publish(work, config.path)
    for split in SPLITS:
        largest_of(config.path, split)  # so that no start has to read the files
    return Prepared(
        config.path, tokens, tokenizer.vocab_size, tokenizer.name, True, documents, tally.documents, tuple(notes)
    )


def _write_meta(folder: Path, meta: dict[str, Any], tokenizer: Tokenizer) -> None:
    (folder / META).write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
    if isinstance(tokenizer, HuggingFaceTokenizer):
        (folder / TOKENIZER_FILE).write_text(tokenizer.definition, encoding="utf-8")
    if tokenizer.name == "gpt2":
        return  # nanoGPT takes a folder without it for GPT-2's encoding
    old: dict[str, Any] = {"vocab_size": tokenizer.vocab_size}
    if isinstance(tokenizer, CharTokenizer):
        numbered = dict(enumerate(tokenizer.characters))
        old |= {"itos": numbered, "stoi": {c: i for i, c in numbered.items()}}
    (folder / NANOGPT_META).write_bytes(pickle.dumps(old))


def _publish(work: Path, folder: Path) -> None:
    """Move the files to their folder; ``meta.json`` last, and nothing of what lay there before stays beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted((file.name for file in work.iterdir()), key=lambda name: name == META)
    for old in (META, NANOGPT_META, TOKENIZER_FILE, SCAN):
        (folder / old).unlink(missing_ok=True)
    for name in names:
        (work / name).replace(folder / name)
    work.rmdir()
