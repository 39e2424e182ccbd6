"""Token files that grow chunk by chunk, with a journal of what of them is whole: a kill costs seconds, not hours."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from ..tokens import SPLITS
from .encode import Chunk, Encoded

JOURNAL = "journal.json"
#: Seconds of work that a kill may cost.
RECORD_SECONDS = 2.0
COPY_BYTES = 1 << 24
_HASH_RANGE = 1 << 64


@dataclass(frozen=True)
class Plan:
    """How the tokens are divided.

    Attributes:
        split: ``tail``: the last tokens validate; ``documents``: documents drawn by their number.
        val_fraction: share that validates.
        dtype: of the tokens.
    """

    split: str
    val_fraction: float
    dtype: np.dtype[Any]

    def validates(self, document: int) -> bool:
        """Whether document `document` (from 0, empty ones not counted) validates; a function of its number alone."""
        drawn = int.from_bytes(hashlib.sha256(f"split:{document}".encode()).digest()[:8], "little")
        return drawn < self.val_fraction * _HASH_RANGE


class Shards:
    """``train.bin``, ``val.bin`` and the starts of their documents in a folder that is worked in.

    Args:
        folder: made when it is not there; what lies in it is kept when it was made for the same `request`.
        request: whatever the result depends on, JSON-ready.
    """

    def __init__(self, folder: Path, request: dict[str, Any], plan: Plan) -> None:
        self.folder, self.plan, self.request = folder, plan, request
        self.discarded = False
        state = self._read()
        if state is None:
            self.discarded = (folder / JOURNAL).exists()
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            counts = {"tokens": dict.fromkeys(SPLITS, 0), "starts": dict.fromkeys(SPLITS, 0)}
            state = {"chunks": 0, "crc": 0, "documents": 0, "done": False, **counts}
        self.chunks: int = state["chunks"]
        self.crc: int = state["crc"]
        self.tokens: dict[str, int] = state["tokens"]
        self.starts: dict[str, int] = state["starts"]
        self._done: bool = state["done"]
        self._documents: int = state["documents"]
        self._recorded = time.monotonic()
        self._files: dict[str, IO[bytes]] = {}

    def __enter__(self) -> Shards:
        if not self._done:
            for split in SPLITS:
                self._open(f"{split}.bin", self.tokens[split] * self.plan.dtype.itemsize)
                self._open(f"{split}_documents.bin", self.starts[split] * 8)
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # on a full disk; what the journal names is there
                file.close()
        self._files = {}

    def skip(self, source: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks that are still to do. Those that are done are read again and compared.

        Raises:
            DataError: the text is not what it was.
        """
        crc = 0
        for chunk in source:
            crc = (crc * 31 + chunk.crc) % (1 << 32)
            if chunk.number + 1 == self.chunks and crc != self.crc:
                raise DataError(
                    f"{self.folder} holds the first {self.chunks} chunks of this preparation, and their text is not "
                    f"what it was: a source has changed since. Begin anew with --force."
                )
            if chunk.number >= self.chunks:
                yield chunk

    def add(self, chunk: Chunk, encoded: Encoded) -> None:
        """Write a chunk's tokens behind those of the one before."""
        if self.plan.split == "tail":
            self._write("train", encoded.tokens)
            ends = np.cumsum(encoded.lengths)
            starts = ends - encoded.lengths + self.tokens["train"]
            self._write_starts("train", starts[[piece.starts for piece in chunk.pieces]])
            self.tokens["train"] += len(encoded.tokens)
        else:
            at = 0
            for piece, length in zip(chunk.pieces, encoded.lengths.tolist(), strict=True):
                self._add_piece(piece.starts, piece.ends, encoded.tokens[at : at + length])
                at += length
        self._documents += sum(piece.ends for piece in chunk.pieces) if self.plan.split == "tail" else 0
        self.chunks, self.crc = chunk.number + 1, (self.crc * 31 + chunk.crc) % (1 << 32)
        if time.monotonic() - self._recorded > RECORD_SECONDS:
            self.record()

    def _add_piece(self, starts: bool, ends: bool, tokens: NDArray[Any]) -> None:
        split = "val" if self.plan.validates(self._documents) else "train"
        if starts:
            self._write_starts(split, np.array([self.tokens[split]]))
        self._write(split, tokens)
        self.tokens[split] += len(tokens)
        self._documents += ends

    def record(self, done: bool = False) -> None:
        """Note that what is written is whole."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        names = {"chunks": self.chunks, "crc": self.crc, "documents": self._documents}
        state = {"request": self.request, **names, "tokens": self.tokens, "starts": self.starts, "done": done}
        work = self.folder / f"{JOURNAL}.new"
        work.write_text(json.dumps(state), encoding="utf-8")
        work.replace(self.folder / JOURNAL)
        self._recorded = time.monotonic()

    def finish(self) -> None:
        """Give the validation split its tail. After a kill it is done again, to the same end.

        Raises:
            DataError: a split came out empty.
        """
        if not self._done:
            if self.plan.split == "tail":
                self._cut_tail()
            self.record(done=True)
        self.__exit__()
        for split in SPLITS:
            os.truncate(self.folder / f"{split}.bin", self.tokens[split] * self.plan.dtype.itemsize)
            os.truncate(self.folder / f"{split}_documents.bin", self.starts[split] * 8)
        for split in SPLITS:
            if not self.tokens[split]:
                raise DataError(
                    f"The {split} split came out empty: {sum(self.tokens.values())} tokens in {self._documents} "
                    f"documents, split by {self.plan.split} with val_fraction {self.plan.val_fraction}. Prepare more "
                    f"text, or split it at the tail with another --val-fraction."
                )

    def _cut_tail(self) -> None:
        self.record()  # what is cut below must be found whole again after a kill
        total, item = self.tokens["train"], self.plan.dtype.itemsize
        kept = total - int(total * self.plan.val_fraction)
        self.__exit__()
        train, val = self.folder / "train.bin", self.folder / "val.bin"
        with train.open("rb") as source, val.open("wb") as target:
            source.seek(kept * item)
            shutil.copyfileobj(source, target, COPY_BYTES)
            target.flush()
            os.fsync(target.fileno())
        starts = np.fromfile(self.folder / "train_documents.bin", dtype=np.uint64)[: self.starts["train"]]
        later = starts[starts >= kept] - kept
        # A document that goes on across the border starts in the validation split too.
        later = later if len(later) and later[0] == 0 else np.concatenate([np.zeros(1, dtype=np.uint64), later])
        later = later[later < total - kept]
        later.astype("<u8").tofile(self.folder / "val_documents.bin")
        self.tokens = {"train": kept, "val": total - kept}
        self.starts = {"train": int((starts < kept).sum()), "val": len(later)}

    def _write(self, split: str, tokens: NDArray[Any]) -> None:
        self._files[f"{split}.bin"].write(tokens.tobytes())

    def _write_starts(self, split: str, starts: NDArray[Any]) -> None:
        self._files[f"{split}_documents.bin"].write(starts.astype("<u8").tobytes())
        self.starts[split] += len(starts)

    def _open(self, name: str, size: int) -> None:
        path = self.folder / name
        if not path.exists():
            path.touch()
        os.truncate(path, size)
        self._files[name] = path.open("ab")

    def _read(self) -> dict[str, Any] | None:
        """The journal, when it is of the same request and the files are as long as it says."""
        try:
            state: dict[str, Any] = json.loads((self.folder / JOURNAL).read_text(encoding="utf-8"))
            sizes = {f"{split}.bin": state["tokens"][split] * self.plan.dtype.itemsize for split in SPLITS}
            sizes |= {f"{split}_documents.bin": state["starts"][split] * 8 for split in SPLITS}
            whole = all((self.folder / name).stat().st_size >= size for name, size in sizes.items())
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return state if whole and state.get("request") == self.request else None
