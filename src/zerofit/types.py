"""The few values that cross rooms. Imports torch for type checkers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, on the CPU.

    Attributes:
        inputs: keyword arguments of the model's ``forward``; the first dimension counts samples.
        weight: how many items of this batch are trained on (unmasked tokens, samples, pairs), counted by
            collate. 0 for padding: such a batch takes part in every collective and changes nothing.
    """

    inputs: Mapping[str, Tensor]
    weight: int


@dataclass(frozen=True)
class LossSum:
    """A sum over ``weight`` items, so that means of unequal parts stay exact."""

    total: float
    weight: int

    @property
    def mean(self) -> float:
        """``total / weight``; NaN when nothing was counted."""
        return self.total / self.weight if self.weight else float("nan")


@dataclass(frozen=True)
class Fragment:
    """One interval of one flattened logical tensor, without padding.

    Attributes:
        name: canonical parameter name; tied tensors appear once.
        role: ``parameter`` | ``exp_avg`` | ``exp_avg_sq`` | ``ema`` | ``buffer``.
        shape: of the whole logical tensor.
        start: first element of the interval, counted in the flattened logical tensor.
        data: 1-D; parameters (the fp32 master where there is one) and moments as fp32. May be a view of the
            engine's own memory and may lie on the GPU: copy before the next step.
        temporary: `data` was made for this fragment and nobody else keeps it: copy it before asking for the next
            fragments, so that few such copies exist at a time.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    start: int
    data: Tensor
    temporary: bool = False


#: ``(name, role, start, stop) -> 1-D CPU tensor`` of ``stop - start`` elements, or None when the source does not
#: hold that tensor (a fresh start holds no moments). Roles as in `Fragment`.
Reader = Callable[[str, str, int, int], "Tensor | None"]

#: Everything an engine remembers beside tensors; JSON-ready. Keys: ``optimizer_steps`` (applied steps, Adam's t),
#: ``loss_scale``, ``loss_scale_iteration``, ``loss_scale_last_overflow``, ``loss_scale_hysteresis``.
Scalars = Mapping[str, float]


@dataclass(frozen=True)
class World:
    """Where this process stands among the ranks.

    Attributes:
        rank: 0 .. world_size - 1 over all nodes.
        world_size: number of data-parallel ranks.
        local_rank: rank within this node; the index of its GPU.
        device: the torch device of this rank.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes shared files and talks to the terminal."""
        return self.rank == 0


#: Environment variable of a rank: process id of the ``zerofit train`` that started it.
LAUNCHER = "ZEROFIT_LAUNCHER_PID"

#: Bits of ``wishes``: what a rank asks of all ranks. A wish of any rank is agreed by all, in `StepResult.wishes`.
STOP = 1
SAVE = 2
FINISH = 4
WISHES = (STOP, SAVE, FINISH)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step came to, the same on every rank.

    Attributes:
        loss: mean over all ranks' valid items of the window.
        grad_norm: L2 norm of the whole gradient, unscaled, before clipping; not finite on a skipped step.
        weight: valid items of the window over all ranks.
        wishes: the ranks' wishes, or-ed.
        skipped: the step was not applied because the gradient was not finite.
        loss_scale: in force during this step; 1.0 without loss scaling.
    """

    loss: float
    grad_norm: float
    weight: int
    wishes: int
    skipped: bool
    loss_scale: float


Result = TypeVar("Result")


class Pending(Generic[Result]):
    """Something that the device may still be working on. `read` it later, so that nobody waits."""

    def __init__(self, finish: Callable[[], Result]) -> None:
        self._finish: Callable[[], Result] | None = finish
        self._result: Result | None = None

    def read(self) -> Result:
        """Wait for it and return it; later calls return the same object."""
        if self._result is None:
            assert self._finish is not None
            self._result, self._finish = self._finish(), None
        return self._result


#: A step, read one step later.
PendingStep = Pending[StepResult]
#: Loss sums of an evaluation by name.
PendingSums = Pending[Mapping[str, LossSum]]
