"""Batch arithmetic: ``global_batch = micro_batch * accumulation_steps * world_size``, solved in one place."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.schema import Config
from ..errors import ConfigError


@dataclass(frozen=True)
class BatchSplit:
    """How a global batch is spread over ranks and micro-steps."""

    micro_batch: int
    accumulation_steps: int
    world_size: int

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step."""
        return self.micro_batch * self.accumulation_steps * self.world_size

    def equation(self) -> str:
        """The arithmetic in words, as printed with the plan."""
        return (
            f"global batch {self.global_batch} = micro-batch {self.micro_batch} x accumulation "
            f"{self.accumulation_steps} x {self.world_size} {'rank' if self.world_size == 1 else 'ranks'}"
        )


def possible_splits(config: Config, world_size: int) -> list[BatchSplit]:
    """Every split that the configuration leaves open, largest micro-batch first.

    Raises:
        ConfigError: nothing was given, or the numbers contradict each other; the message shows the arithmetic.
    """
    total, micro, steps = config.global_batch, config.micro_batch, config.accumulation_steps
    if total is None:
        if micro is None:
            raise ConfigError(
                "No batch size was given: set global_batch (zerofit solves the rest), or micro_batch and "
                "accumulation_steps."
            )
        return [BatchSplit(micro, steps or 1, world_size)]
    if total % world_size:
        near = [n for n in range(1, total + 1) if total % n == 0]
        closest = min(near, key=lambda n: abs(n - world_size))
        raise ConfigError(
            f"global_batch {total} over {world_size} ranks: every rank needs the same number of samples, and {total} "
            f"is not a multiple of {world_size}. Use global_batch {-(-total // world_size) * world_size}, or "
            f"{closest} ranks."
        )
    per_rank = total // world_size
    micros = [micro] if micro else [m for m in range(per_rank, 0, -1) if per_rank % m == 0]
    if steps:
        micros = [m for m in micros if m * steps == per_rank]
    splits = [BatchSplit(m, per_rank // m, world_size) for m in micros if m <= per_rank and per_rank % m == 0]
    if not splits:
        raise ConfigError(
            f"global_batch {total} with {_given(micro, steps)} on {world_size} "
            f"{'rank' if world_size == 1 else 'ranks'}: each rank takes {per_rank} samples a step, and global batch = "
            f"micro-batch x accumulation x ranks has no whole solution. Leave out micro_batch and accumulation_steps, "
            f"or set global_batch {(micro or 1) * (steps or 1) * world_size}."
        )
    return splits


def _given(micro: int | None, steps: int | None) -> str:
    named = [f"{name} {value}" for name, value in (("micro_batch", micro), ("accumulation_steps", steps)) if value]
    return " and ".join(named)
