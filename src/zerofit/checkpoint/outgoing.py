"""Tensors on their way into a file: cast and handed over interval by interval, as the bytes that the file will hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from .foreign.sources import Source, Transposed, intervals

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Readable(Protocol):
    """What `checkpoint.store.Saved` and `checkpoint.foreign.Foreign` have in common."""

    @property
    def folder(self) -> Path:
        """Where it lies."""

    @property
    def step(self) -> int | None:
        """Optimizer steps attempted."""

    @property
    def scalars(self) -> Mapping[str, float]:
        """As `types.Scalars`."""

    @property
    def state(self) -> Mapping[str, Any]:
        """What the loop remembers."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape."""

    def read(self, name: str, role: str, start: int, stop: int) -> Tensor | None:
        """A `types.Reader`."""


@dataclass(frozen=True)
class Held:
    """A tensor of a checkpoint as a `Source`.

    Attributes:
        absent_is_zero: a tensor that is not there reads as zeros (moments of a frozen parameter); else it is an error.
    """

    checkpoint: Readable
    name: str
    role: str
    shape: tuple[int, ...]
    absent_is_zero: bool = False

    def read(self, start: int, stop: int) -> Tensor:
        """See `Source.read`."""
        values = self.checkpoint.read(self.name, self.role, start, stop)
        if values is not None:
            return values
        if self.absent_is_zero:
            return torch.zeros(stop - start)
        raise CheckpointError(f"Checkpoint {self.checkpoint.folder} holds no {self.role} {self.name}. Use another one.")


@dataclass(frozen=True)
class Constant:
    """The same number everywhere."""

    shape: tuple[int, ...]
    number: float = 0.0

    def read(self, start: int, stop: int) -> Tensor:
        """See `Source.read`."""
        return torch.full((stop - start,), self.number)


@dataclass(frozen=True)
class Outgoing:
    """One tensor of a file that is being written."""

    name: str
    source: Source
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.source.shape)

    @property
    def size_bytes(self) -> int:
        """In the file."""
        return self.elements * self.dtype.itemsize

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The tensor's bytes, interval by interval.

        Raises:
            CheckpointError: a finite value is beyond what the type holds.
        """
        for start, stop in intervals(self.elements):
            yield self.cast(self.source.read(start, stop)).view(torch.uint8).numpy().data
        if isinstance(self.source, Transposed):
            self.source.forget()

    def cast(self, values: Tensor) -> Tensor:
        """1-D fp32 values in the file's type; 1-D and contiguous."""
        out = values.to(self.dtype).contiguous()
        if self.dtype == torch.float16 and not torch.equal(out.isfinite(), values.isfinite()):
            largest = values[values.isfinite()].abs().max().item()
            raise CheckpointError(
                f"{self.name} holds {largest:.6g}, and fp16 ends at 65,504. Export with --dtype bf16 or fp32."
            )
        return out
