"""Low-bit states in fp32, a piece at a time: a save must not put all of them beside the ones it decodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch import Tensor

from ..kernels.optimizer_step import DECODED_ELEMENTS, Moment

Owner = TypeVar("Owner")


def in_fp32(flat: Tensor | Moment, intervals: Iterable[tuple[Owner, int, int]]) -> Iterator[tuple[Owner, int, Tensor]]:
    """Intervals of a flat state: views of an fp32 one, else of copies of at most `DECODED_ELEMENTS`.

    A copy is made when the one before it was handed out; who lets go of each before asking for the next one but one
    has two of them in memory, and what decoding makes meanwhile: 3 x 16 MiB.

    Args:
        intervals: (owner, start, stop), ascending and disjoint.

    Yields:
        Owner, where the values begin counted from its `start`, and the values: 1-D fp32.
    """
    state = flat if isinstance(flat, Moment) else None
    values = flat.values if isinstance(flat, Moment) else flat
    if not is_coded(flat):
        for owner, start, stop in intervals:
            yield owner, 0, values[start:stop]
        return
    low = high = 0
    piece: Tensor | None = None
    for owner, start, stop in intervals:
        at = start
        while at < stop:
            if piece is None or not low <= at < high:
                piece = None
                low, high = at, min(at + DECODED_ELEMENTS, values.numel())
                piece = state.read(low, high) if state is not None else values[low:high].float()
            end = min(stop, high)
            yield owner, at - start, piece[at - low : end - low]
            at = end


def is_coded(flat: Tensor | Moment) -> bool:
    """Whether its fp32 values are copies."""
    return flat.is_coded if isinstance(flat, Moment) else flat.element_size() < 4
