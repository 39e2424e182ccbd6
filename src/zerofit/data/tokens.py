"""Tokens on disk: ``train.bin`` and ``val.bin`` as nanoGPT writes them, and ``meta.json`` that says what they are."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.models import LanguageModelShape
from ..errors import DataError
from .metadata import known_largest, read_meta, token_width
from .order import Indices, epoch_shift, permute

SPLITS = ("train", "val")


def open_tokens(folder: Path, split: str) -> NDArray[Any]:
    """Memory-map a split's tokens. Without ``meta.json`` their width is told by the bytes (`metadata.infer_width`).

    Raises:
        DataError: the file is missing, empty, or no whole number of tokens.
    """
    path = folder / f"{split}.bin"
    if not path.exists():
        raise DataError(
            f"No {path}: a folder of tokens holds train.bin and val.bin. Make it with `zerofit data prepare TEXT "
            f"--out {folder}`, or set data.path."
        )
    dtype = token_width(folder, path).dtype
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise DataError(
            f"{path} has {size} bytes, which is {'empty' if size == 0 else f'no whole number of {dtype} tokens'}. "
            f"Prepare the data again."
        )
    return np.memmap(path, dtype=dtype, mode="r")


def vocabulary_size(folder: Path) -> int:
    """Tokens in the vocabulary: from ``meta.json``, else from the largest id in the files."""
    meta = read_meta(folder)
    if "vocab_size" in meta:
        return int(meta["vocab_size"])
    return 1 + max(largest_of(folder, split) for split in SPLITS)


def largest_of(folder: Path, split: str) -> int:
    """Largest id in a split; a file that has not changed is not read again."""
    return known_largest(folder / f"{split}.bin", open_tokens(folder, split).dtype)


def describe_inferred(folder: Path) -> str | None:
    """What was inferred about a folder without ``meta.json``, in a sentence; None for a folder that says it."""
    width = token_width(folder, folder / "train.bin")
    if width.reason is None:
        return None
    largest = max(largest_of(folder, split) for split in SPLITS)
    told = "meta.pkl tells the vocabulary" if read_meta(folder) else "nothing tells the vocabulary"
    return (
        f"{folder} has no meta.json: its tokens are taken as {width.dtype.name} ({width.reason}), the largest id is "
        f"{largest}, and {told}: {vocabulary_size(folder)}."
    )


def check_data(folder: Path, model: LanguageModelShape) -> None:
    """Check both splits against the model before anything starts.

    Raises:
        DataError: a split is missing, shorter than one block, or holds ids beyond the vocabulary.
    """
    vocab_size = model.vocab_size
    assert vocab_size is not None
    for split in SPLITS:
        tokens = open_tokens(folder, split)
        if len(tokens) <= model.sequence_length:
            raise DataError(
                f"{folder / split}.bin has {len(tokens)} tokens, and one sample needs "
                f"{model.sequence_length} and a target. Use a shorter sequence (model.block_size, "
                f"model.max_seq_length), or more text."
            )
        largest = largest_of(folder, split)
        if largest >= vocab_size:
            raise DataError(
                f"{folder / split}.bin holds the token {largest}, beyond model.vocab_size {vocab_size}. The data was "
                f"made with another tokenizer: set model.vocab_size {largest + 1} or more, or prepare it again."
            )


def fingerprint(folder: Path) -> dict[str, dict[str, Any]]:
    """Split -> number of tokens and SHA-256 of its first and last MiB: tells other data without reading all of it."""
    found = {}
    for split in SPLITS:
        tokens = open_tokens(folder, split)
        per_mib = (1 << 20) // tokens.itemsize
        ends = hashlib.sha256(tokens[:per_mib].tobytes() + tokens[-per_mib:].tobytes())
        found[split] = {"tokens": len(tokens), "ends_sha256": ends.hexdigest()}
    return found


class TokenDataset:
    """One split, cut into blocks.

    An epoch is a permutation of the non-overlapping blocks; where the first block starts changes with the epoch.
    """

    def __init__(self, tokens: NDArray[Any], block_size: int, seed: int) -> None:
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        #: Samples of an epoch. One block less than fits, so that the shift never runs over the end.
        self.samples = max((len(tokens) - 1) // block_size - 1, 1)
        self.places = len(tokens)
        #: Whole blocks in the split.
        self.blocks = (len(tokens) - 1) // block_size
        self._largest_shift = min(block_size, len(tokens) - self.samples * block_size)

    def starts(self, first: int, count: int) -> Indices:
        """First token of the training samples `first` .. `first + count` of the endless sequence of epochs."""
        return self.starts_of(np.arange(first, first + count, dtype=np.int64))

    def starts_of(self, numbers: Indices) -> Indices:
        """First token of each of the training samples `numbers`."""
        epochs, indices = numbers // self.samples, numbers % self.samples
        out = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            blocks = permute(indices[inside], self.samples, self.seed, epoch)
            out[inside] = blocks * self.block_size + epoch_shift(self.seed, epoch, self._largest_shift)
        return out

    def spread_starts(self, count: int) -> Indices:
        """First tokens of at most `count` blocks spread evenly over the split: the same in every evaluation."""
        count = min(count, self.blocks)
        return np.arange(count, dtype=np.int64) * self.blocks // count * self.block_size

    def window(self, starts: Indices) -> Indices:
        """(len(starts), block_size + 1) int64: inputs are all but the last column, targets all but the first."""
        out: Indices = self.tokens[starts[:, None] + np.arange(self.block_size + 1)].astype(np.int64)
        return out


def open_split(folder: Path, split: str, model: LanguageModelShape, seed: int) -> TokenDataset:
    """A split as samples of the model's block size."""
    return TokenDataset(open_tokens(folder, split), model.sequence_length, seed)
