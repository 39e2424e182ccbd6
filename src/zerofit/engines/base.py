"""The seam: everything that trains looks like this from above."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ..types import Batch, Fragment, PendingStep, PendingSums, Reader, Scalars
from .common import Inputs


class Engine(Protocol):
    """Owns the model, its partitioning, the optimizer and the loss scaler of one rank.

    Made by `engines.build.build`; holds no weights worth anything until `load` was called (a fresh start loads from
    a reader that computes the initial values).
    """

    inputs: Inputs
    """Brings a batch's inputs to the device; a task may give it a transform (`tasks.base.Feed.transform`)."""

    def train_step(self, window: Sequence[Batch], lr: float, step: int, wishes: int = 0) -> PendingStep:
        """One optimizer step over a whole accumulation window. Collective.

        Opens with one all-reduced integer vector: the window's weight, which divides the loss, and every wish.
        Each rank back-propagates ``loss sum * world_size / weight``, so that gradients averaged over ranks are those
        of the mean over all valid items, however they are spread.

        Args:
            window: ``accumulation_steps`` batches of ``micro_batch`` samples; the same count on every rank.
            lr: learning rate of this step.
            step: number of this attempted step; randomness inside the step is a function of (seed, step, rank).
            wishes: bits of `types.WISHES` that this rank asks for.
        """

    def eval_step(self, window: Sequence[Batch], *, compiled: bool = True) -> PendingSums:
        """Loss sums over the window and all ranks, without gradients, dropout or randomness. Collective; every
        rank brings equally many batches; does not wait. ``compiled=False`` for batches of another shape than
        training's."""

    def predict(self, batch: Batch) -> Tensor:
        """The model's output for inputs without targets, on the engine's device. Collective under sharding: every
        rank calls it equally often."""

    def fragments(self) -> Iterator[Fragment]:
        """What this rank holds. The union over ranks covers every element of every tensor exactly once. Every rank
        should call it: where the model has buffers (`engines.buffers`) it is collective, else no communication."""

    def hold_updates(self, wait: Callable[[], None]) -> None:
        """Call `wait` once, before what `fragments` shows changes next: somebody is still copying it."""

    def scalars(self) -> Scalars:
        """What is remembered beside tensors; the same on every rank."""

    def load(self, read: Reader, scalars: Scalars | None = None) -> None:
        """Take parameters (into the fp32 masters, then the compute copies), moments and buffers from `read`, scalars
        from `scalars` (None: a fresh optimizer). Collective."""

    def memory(self) -> Mapping[str, int]:
        """Bytes of model states that this rank holds now, under the item names of `planning.memory`."""

    def close(self) -> None:
        """Release what outlives the object (swap files, hooks). The engine is unusable afterwards."""
