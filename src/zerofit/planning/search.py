"""Every option of one strategy, in an order in which the first that fits is the best; few memory predictions. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config.schema import Config
from .batch import BatchSplit
from .candidates import CHECKPOINTING, Builder, Candidate, Rung
from .plan import Plan


@dataclass(frozen=True)
class Option:
    """What the search varies within one strategy.

    Attributes:
        split: micro-batch and accumulation.
        every: every n-th block recomputed; 0 none.
        tight: narrow buckets.
    """

    split: BatchSplit
    every: int
    tight: bool

    @property
    def recomputed(self) -> float:
        """Share of the blocks that are recomputed."""
        return 1 / self.every if self.every else 0.0

    def needs_at_least(self, other: Option) -> bool:
        """True when this option cannot need less memory than `other`."""
        return (
            self.split.micro_batch >= other.split.micro_batch
            and self.recomputed <= other.recomputed
            and self.tight <= other.tight
        )


def options(config: Config, rung: Rung, splits: Sequence[BatchSplit]) -> list[Option]:
    """All that the configuration leaves open."""
    wish = config.activation_checkpointing
    levels = CHECKPOINTING if wish == "auto" else (wish if isinstance(wish, int) else {"none": 0, "full": 1}[wish],)
    widths = (False, True) if rung.strategy.startswith("zero") else (False,)
    return [Option(split, every, tight) for tight in widths for every in levels for split in splits]


def search(builder: Builder, rung: Rung, splits: Sequence[BatchSplit]) -> list[Candidate]:
    """The rung's fastest that fits, its least memory and its largest micro-batch, each once; or its nearest miss.

    Without rates the fastest is taken to be the one that recomputes least, then the one with the largest micro-batch.
    """
    plans = {
        option: builder.plan(rung, option.split, option.every, option.tight)
        for option in options(builder.config, rung, splits)
    }
    tried: dict[Option, Candidate] = {}
    by_speed = sorted(plans, key=lambda option: _slowness(builder, plans[option], option))
    fastest = _first_that_fits(builder, by_speed, plans, tried)
    least = min(plans, key=lambda o: (o.split.micro_batch, -o.recomputed, not o.tight))
    if fastest is None:
        return [replace(_try(builder, least, plans, tried), variant="fastest")]
    by_batch = sorted(plans, key=lambda o: (-o.split.micro_batch, o.recomputed, o.tight))
    largest = _first_that_fits(builder, by_batch, plans, tried)
    assert largest is not None
    found = [fastest]
    for candidate, variant in ((_try(builder, least, plans, tried), "least memory"), (largest, "largest batch")):
        if all(candidate.plan != other.plan for other in found):
            found.append(replace(candidate, variant=variant))
    return found


def _slowness(builder: Builder, plan: Plan, option: Option) -> tuple[float, float, int, bool]:
    step = builder.speed(plan)
    return (1 / step.tokens_per_second if step else 0.0, option.recomputed, -option.split.micro_batch, option.tight)


def _first_that_fits(
    builder: Builder, order: Sequence[Option], plans: dict[Option, Plan], tried: dict[Option, Candidate]
) -> Candidate | None:
    """The first option in `order` that fits. What needs at least as much as one that did not is not looked at."""
    for option in order:
        if any(not candidate.fits and option.needs_at_least(other) for other, candidate in tried.items()):
            continue
        candidate = _try(builder, option, plans, tried)
        if candidate.fits:
            return candidate
    return None


def _try(builder: Builder, option: Option, plans: dict[Option, Plan], tried: dict[Option, Candidate]) -> Candidate:
    if option not in tried:
        tried[option] = builder.candidate(plans[option])
    return tried[option]
