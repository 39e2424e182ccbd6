"""How long a run is, as people write it: ``1000`` steps, ``3ep``, ``2e9tok``, ``90min``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

Unit = Literal["steps", "epochs", "tokens", "seconds"]
#: Spelling -> unit, and how many of it one is.
_UNITS: dict[str, tuple[Unit, float]] = {
    "": ("steps", 1), "step": ("steps", 1), "steps": ("steps", 1),
    "ep": ("epochs", 1), "epoch": ("epochs", 1), "epochs": ("epochs", 1),
    "tok": ("tokens", 1), "token": ("tokens", 1), "tokens": ("tokens", 1),
    "s": ("seconds", 1), "sec": ("seconds", 1), "min": ("seconds", 60), "h": ("seconds", 3600),
}  # fmt: skip
_FORM = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+]?[0-9]+)?)\s*([a-z]*)\s*")
#: Steps of a run that only the clock ends.
ENDLESS_STEPS = 1_000_000_000


@dataclass(frozen=True)
class Duration:
    """An amount of a unit."""

    amount: float
    unit: Unit

    def steps(self, *, epoch_samples: int | None, global_batch: int, sample_tokens: int) -> int | None:
        """Optimizer steps, rounded up; None for what is not known yet: epochs without data. Time: `ENDLESS_STEPS`."""
        if self.unit == "seconds":
            return ENDLESS_STEPS
        if self.unit == "epochs":
            return None if epoch_samples is None else _up(self.amount * epoch_samples / global_batch)
        if self.unit == "tokens":
            return _up(self.amount / (global_batch * sample_tokens))
        return _up(self.amount)


def _up(steps: float) -> int:
    return max(1, math.ceil(steps - 1e-9))


def parse_duration(text: str | int) -> Duration:
    """Read a duration.

    Raises:
        ValueError: it is none, in words.
    """
    found = _FORM.fullmatch(str(text))
    if found is None or found.group(2) not in _UNITS or float(found.group(1)) <= 0:
        raise ValueError(
            f"duration {text!r} is no length of a run: write a number of steps (1000), epochs (3ep), tokens (2e9tok) "
            f"or a time (90min, 2h, 45s)"
        )
    unit, factor = _UNITS[found.group(2)]
    return Duration(float(found.group(1)) * factor, unit)
