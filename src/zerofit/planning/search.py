"""Every option of one strategy, in an order in which the first that fits is the best; few memory predictions. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config.schema import Config, Goal
from .batch import BatchSplit
from .candidates import Builder, Candidate, Checkpointing, Rung, checkpointings
from .plan import Plan


@dataclass(frozen=True)
class Option:
    """What the search varies within one strategy.

    Attributes:
        split: micro-batch and accumulation.
        checkpointing: what is recomputed.
        tight: narrow buckets.
    """

    split: BatchSplit
    checkpointing: Checkpointing
    tight: bool


def options(config: Config, splits: Sequence[BatchSplit], *, tight: bool) -> list[Option]:
    """All that the configuration leaves open."""
    return [Option(split, level, tight) for level in checkpointings(config) for split in splits]


def search(builder: Builder, rung: Rung, splits: Sequence[BatchSplit], goals: Sequence[Goal]) -> list[Candidate]:
    """The rung's fastest that fits, or its nearest miss; then what serves the other goals better, each once.

    Narrow buckets are tried where nothing fits with the usual ones. Without rates the fastest is taken to be the one
    that recomputes least, then the one with the largest micro-batch.
    """
    usual = _Search(builder, rung, options(builder.config, splits, tight=False))
    found = usual.ends(goals)
    if found[0].fits or not rung.strategy.startswith("zero"):
        return found if found[0].fits else [builder.squeeze(found[0])]
    narrow = _Search(builder, rung, options(builder.config, splits, tight=True)).ends(goals)
    return narrow if narrow[0].fits else [builder.squeeze(narrow[0])]


class _Search:
    """One rung's options with one width of buckets; remembers what was predicted."""

    def __init__(self, builder: Builder, rung: Rung, considered: Sequence[Option]) -> None:
        self.builder = builder
        self.plans: dict[Option, Plan] = {o: builder.plan(rung, o.split, o.checkpointing, o.tight) for o in considered}
        self.tried: dict[Option, Candidate] = {}
        #: If this does not fit, nothing does.
        self.least = min(considered, key=lambda o: (o.split.micro_batch, -o.checkpointing.dropped[0]))

    def ends(self, goals: Sequence[Goal]) -> list[Candidate]:
        """What fits and serves each goal; the least when nothing fits."""
        fastest = self._first_that_fits(sorted(self.plans, key=self._slowness))
        found = [fastest]
        if fastest.fits and "memory" in goals:
            found.append(replace(self._try(self.least), variant="least memory"))
        if fastest.fits and "largest-batch" in goals:
            largest = self._first_that_fits(
                sorted(self.plans, key=lambda o: (-o.split.micro_batch, o.checkpointing.recomputed))
            )
            found.append(replace(largest, variant="largest batch"))
        return [c for index, c in enumerate(found) if all(c.plan != other.plan for other in found[:index])]

    def _slowness(self, option: Option) -> tuple[float, float, int]:
        step = self.builder.speed(self.plans[option])
        return (1 / step.tokens_per_second if step else 0.0, option.checkpointing.recomputed, -option.split.micro_batch)

    def _first_that_fits(self, order: Sequence[Option]) -> Candidate:
        """The first option in `order` that fits, else the least; what cannot fit is not looked at."""
        for option in order:
            if option in self.tried or not self._cannot_fit(option):
                candidate = self._try(option)
                if candidate.fits:
                    return candidate
            if not self._try(self.least).fits:
                break
        return self._try(self.least)

    def _cannot_fit(self, option: Option) -> bool:
        return any(_at_least(option, other, missed) > missed.limit_bytes for other, missed in self.tried.items())

    def _try(self, option: Option) -> Candidate:
        if option not in self.tried:
            self.tried[option] = self.builder.candidate(self.plans[option])
        return self.tried[option]


def _at_least(option: Option, other: Option, known: Candidate) -> float:
    """Bytes that `option` needs at least, from what `other` needs at its peak.

    At that moment activations grow with the micro-batch and with the blocks that keep theirs, logits with the
    micro-batch, and the rest stays; another moment can only be higher.
    """
    items, micro = known.memory.items, option.split.micro_batch / other.split.micro_batch
    dropped, before = option.checkpointing.dropped[1], other.checkpointing.dropped[0]
    kept = (1 - dropped) / (1 - before) if before < 1 else float(option == other)
    saved = items.get("activations", 0) * max(0.0, 1 - micro * kept) + items.get("logits", 0) * max(0.0, 1 - micro)
    outside = known.memory.driver_bytes - known.memory.reserved_bytes
    return known.memory.allocated_bytes + outside - saved
