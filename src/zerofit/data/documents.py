"""Where documents start in prepared tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Documents:
    """Starts of a split's documents: from the index that ``data prepare`` writes, else behind end-of-text tokens.

    Args:
        folder: of the split's ``.bin`` file.
        split: ``train`` or ``val``.
        tokens: the split.
        end_of_text: the token that ends a document; None where the tokenizer has none.
    """

    def __init__(self, folder: Path, split: str, tokens: NDArray[Any], end_of_text: int | None) -> None:
        self.tokens, self.end_of_text = tokens, end_of_text
        path = folder / f"{split}_documents.bin"
        there = path.exists() and 0 < path.stat().st_size <= 8 * len(tokens)
        self.index: NDArray[np.uint64] | None = np.memmap(path, dtype="<u8", mode="r") if there else None

    def starts_in(self, first: int, stop: int) -> dict[int, int | None]:
        """Token in ``[first, stop)`` with which a document starts -> the document's number, None where not known."""
        if self.index is not None:
            low, high = np.searchsorted(self.index, [first, stop])
            return {int(self.index[number]): int(number) for number in range(low, high)}
        if self.end_of_text is None:
            return {}
        begin = max(first - 1, 0)
        ends = np.flatnonzero(self.tokens[begin : stop - 1] == self.end_of_text) + begin + 1
        return {int(place): None for place in ends.tolist()}
