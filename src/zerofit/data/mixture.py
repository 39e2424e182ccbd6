"""Several sources, and several stages, as one sequence of samples. Sample k is a pure function of (seed, k)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .order import Indices

#: Longest period of a mixture. Weights that it cannot hold exactly are rounded to multiples of 1/10,000.
PERIOD = 10_000


class Samples(Protocol):
    """What a loader reads: blocks of tokens by the number of the sample. Places are counted over all sources."""

    samples: int
    """Of an epoch."""
    blocks: int
    """Whole blocks."""
    places: int
    """Tokens: starts are below it."""

    def starts_of(self, numbers: Indices) -> Indices:
        """First token of the training samples `numbers` of the endless sequence."""

    def starts(self, first: int, count: int) -> Indices:
        """The same for `first` .. `first + count`."""

    def spread_starts(self, count: int) -> Indices:
        """First tokens of at most `count` blocks spread evenly: the same in every evaluation."""

    def window(self, starts: Indices) -> Indices:
        """(len(starts), block_size + 1) int64."""


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers with the smallest sum that is exact; else with the sum `PERIOD` (largest remainders).

    Args:
        weights: none negative, not all 0. What is written in decimals is taken as such: 0.3 is 3/10.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= PERIOD:
        return [int(share * period) for share in shares]
    floors = [int(share * PERIOD) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (floors[i] - shares[i] * PERIOD, i))
    for i in order[: PERIOD - sum(floors)]:
        floors[i] += 1
    return floors


def interleave(weights: Sequence[int]) -> NDArray[np.int64]:
    """Source of each sample of one period, so that after any number of samples each source has within one of its share.

    Tijdeman's algorithm ("The chairman assignment problem", Discrete Mathematics 32, 1980): of the sources that are at
    least 1/(2n - 2) behind, the one whose turn ends first.

    Args:
        weights: whole numbers; the period is their sum.
    """
    total = sum(weights)
    active = [i for i, weight in enumerate(weights) if weight]
    if len(active) == 1:
        return np.full(total, active[0], dtype=np.int64)
    pairs = 2 * len(active) - 2
    taken = dict.fromkeys(active, 0)
    out = np.empty(total, dtype=np.int64)
    for k in range(1, total + 1):
        # In units of 1/(total * pairs): whole numbers.
        behind = {i: (k * weights[i] - total * taken[i]) * pairs for i in active}
        ready = [i for i in active if behind[i] >= total]
        chosen = min(ready, key=lambda i: ((total * (pairs - 1) - behind[i]) / weights[i], i))
        out[k - 1] = chosen
        taken[chosen] += 1
    return out


class _Joined:
    """Parts whose places follow one another."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = list(parts)
        self.offsets = np.concatenate([[0], np.cumsum([part.places for part in parts])]).astype(np.int64)
        self.places = int(self.offsets[-1])
        self.samples = sum(part.samples for part in parts)
        self.blocks = sum(part.blocks for part in parts)

    def window(self, starts: Indices) -> Indices:
        """See `Samples`."""
        owners = np.searchsorted(self.offsets, starts, side="right") - 1
        rows: dict[int, Indices] = {}
        for owner in np.unique(owners).tolist():
            for row, window in zip(
                np.flatnonzero(owners == owner).tolist(),
                self.parts[owner].window(starts[owners == owner] - self.offsets[owner]),
                strict=True,
            ):
                rows[row] = window
        return np.stack([rows[row] for row in range(len(starts))]) if rows else self.parts[0].window(starts)


class Mixture(_Joined):
    """Sources drawn in fixed shares, each in its own order; a source that is used up begins anew.

    The sources take turns by a table of one period; how many samples of a source came before is read from its sums, so
    that any position is reached at once.
    """

    def __init__(self, parts: Sequence[Samples], weights: Sequence[float]) -> None:
        super().__init__(parts)
        self.weights = whole_weights(weights)
        self.turns = interleave(self.weights)
        drawn = self.turns[:, None] == np.arange(len(parts))
        #: (period, sources): samples of each source before a place in the period.
        self.before = np.cumsum(drawn, axis=0) - drawn

    def sources_of(self, numbers: Indices) -> Indices:
        """Source of each sample."""
        out: Indices = self.turns[numbers % len(self.turns)]
        return out

    def starts_of(self, numbers: Indices) -> Indices:
        """See `Samples`."""
        periods, places = numbers // len(self.turns), numbers % len(self.turns)
        sources = self.turns[places]
        own = periods * np.array(self.weights)[sources] + self.before[places, sources]
        out = np.empty(len(numbers), dtype=np.int64)
        for source in np.unique(sources).tolist():
            mine = sources == source
            out[mine] = self.parts[source].starts_of(own[mine]) + self.offsets[source]
        return out

    def starts(self, first: int, count: int) -> Indices:
        """See `Samples`."""
        return self.starts_of(np.arange(first, first + count, dtype=np.int64))

    def spread_starts(self, count: int) -> Indices:
        """See `Samples`: of each source its share."""
        turns = self.turns[np.arange(min(count, self.blocks)) % len(self.turns)]
        counts = np.bincount(turns, minlength=len(self.parts)).tolist()
        found = [part.spread_starts(n) + at for part, n, at in zip(self.parts, counts, self.offsets, strict=False) if n]
        return np.concatenate(found)


class Staged(_Joined):
    """One data after another. Data that comes again goes on where it was.

    Args:
        parts: distinct data.
        order: index in `parts` of each stage's data.
        bounds: first sample of each stage; the last stage has no end.
    """

    def __init__(self, parts: Sequence[Samples], order: Sequence[int], bounds: Sequence[int]) -> None:
        super().__init__(parts)
        self.order, self.bounds = np.array(order), np.array(bounds, dtype=np.int64)
        lengths = np.diff([*bounds, bounds[-1]])
        #: Samples that a stage's data has given before the stage.
        self.given = np.array([sum(lengths[j] for j in range(i) if order[j] == order[i]) for i in range(len(order))])

    def starts_of(self, numbers: Indices) -> Indices:
        """See `Samples`."""
        stages = np.searchsorted(self.bounds, numbers, side="right") - 1
        own = numbers - self.bounds[stages] + self.given[stages]
        out = np.empty(len(numbers), dtype=np.int64)
        for part in np.unique(self.order[stages]).tolist():
            mine = self.order[stages] == part
            out[mine] = self.parts[part].starts_of(own[mine]) + self.offsets[part]
        return out

    def starts(self, first: int, count: int) -> Indices:
        """See `Samples`."""
        return self.starts_of(np.arange(first, first + count, dtype=np.int64))

    def spread_starts(self, count: int) -> Indices:
        """See `Samples`: of the first stage's data."""
        part = int(self.order[0])
        found: Indices = self.parts[part].spread_starts(count) + self.offsets[part]
        return found
