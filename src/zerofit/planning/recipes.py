"""The largest batch of each way to save memory on one GPU: what `zerofit plan` says of classifiers. Pure."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from ..config.schema import Config, Precision
from .batch import BatchSplit
from .calibration import constants, rates
from .candidates import Builder, Candidate, Checkpointing, Rung
from .hardware import Hardware

#: Larger micro-batches are not looked for.
MOST_SAMPLES = 4096


@dataclass(frozen=True)
class Recipe:
    """A way to save memory, and how far it goes.

    Attributes:
        name: for people.
        micro_batch: the largest that fits; 0: not even one sample does.
        candidate: at that micro-batch; the one of a single sample when nothing fits.
        tight_micro_batch: the largest that fits when PyTorch gives back what it holds in reserve, which takes time.
    """

    name: str
    micro_batch: int
    candidate: Candidate
    tight_micro_batch: int

    def accumulation_for(self, batch: int) -> int | None:
        """Micro-steps that come to `batch` samples; None when nothing fits."""
        fitting = [m for m in range(min(self.micro_batch, batch), 0, -1) if batch % m == 0]
        return batch // fitting[0] if fitting else None


def recipes(config: Config, hardware: Hardware) -> list[Recipe]:
    """Plain fp32, half precision, and what it can be combined with, on one GPU of `hardware`; none without a GPU."""
    if not hardware.gpus:
        return []
    half: Precision = "bf16" if all(gpu.has_bf16 for gpu in hardware.gpus) else "fp16"
    zero2 = Rung("zero2", "cpu")
    ways: list[tuple[str, Precision, Rung, int]] = [
        ("fp32", "fp32", Rung("single"), 0),
        (half, half, Rung("single"), 0),
        (f"{half}, activation_checkpointing full", half, Rung("single"), 1),
    ]
    if hardware.has_deepspeed and hardware.system == "Linux":
        ways += [
            (f"{half}, strategy zero2, offload cpu", half, zero2, 0),
            (f"{half}, zero2, offload cpu, activation_checkpointing full", half, zero2, 1),
        ]
    return [_recipe(config, hardware, *way) for way in ways]


def _recipe(config: Config, hardware: Hardware, name: str, precision: Precision, rung: Rung, every: int) -> Recipe:
    builder = Builder(config, hardware, "cuda", precision, rates(hardware, precision), constants(hardware))

    def candidate(samples: int) -> Candidate:
        tight = rung.strategy.startswith("zero")
        return builder.candidate(builder.plan(rung, BatchSplit(samples, 1, 1), Checkpointing(every), tight))

    sizes = range(1, MOST_SAMPLES + 1)
    largest = bisect_left(sizes, True, key=lambda samples: not candidate(samples).fits)
    most = bisect_left(sizes, True, lo=largest, key=lambda samples: not builder.squeeze(candidate(samples)).fits)
    return Recipe(name, largest, candidate(max(largest, 1)), most)
