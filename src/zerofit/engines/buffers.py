"""What a model remembers and no gradient changes: a batch norm's running statistics. The same under every engine.

Every rank holds all buffers, whole and in fp32 (counters as they are), and moves them by its own micro-batches. Where
they are looked at from outside, at an evaluation, a prediction and a save, the ranks' values are averaged and the
average takes the place of each rank's own. Running statistics are linear in the batches' statistics, so the average
does not depend on when, or how often, it is taken; it never enters a training step. Counters are taken from rank 0:
they count micro-batches, and all ranks have seen equally many.

A step that is skipped leaves the statistics as they were: what is not finite in one batch would stay in them for good.

A buffer that is no statistic but a constant, which the forward pass wants in the compute dtype, is held twice: in fp32
as all are, for checkpoints, and rounded in the model (`models.timm_buffers`).

With an average of the weights (``ema_decay``) the statistics are averaged alike, step by step with the same weight: an
average that lags behind the weights needs statistics that lag with it. It is linear too, so that ranks average it late.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import TrainingFailed
from ..models.timm_buffers import ROUNDED
from ..types import Fragment, Reader, World
from .flat_optimizer import average_weight

ROLE, AVERAGE = "buffer", "ema"


class Buffers:
    """The buffers of `model`, which is built, wrapped and cast already: DeepSpeed makes halves of everything.

    Args:
        ema_decay: of the average of the statistics; None: none is kept.
        others: names of buffers that are somebody else's.

    Attributes:
        tensors: canonical name -> buffer; empty for a model without.
    """

    def __init__(
        self, model: nn.Module, world: World, ema_decay: float | None = None, others: Collection[str] = ()
    ) -> None:
        self.world, self.ema_decay = world, ema_decay
        self.tensors: dict[str, Tensor] = {}
        #: (fp32 constant, the model's rounded copy of it).
        self._copies: list[tuple[Tensor, Tensor]] = []
        rounded = vars(model).get(ROUNDED, ())
        for prefix, module in model.named_modules():
            for leaf, buffer in list(module._buffers.items()):
                name = f"{prefix}.{leaf}".lstrip(".")
                if buffer is not None and leaf not in module._non_persistent_buffers_set and name not in others:
                    kept = buffer.float() if buffer.is_floating_point() else buffer
                    self.tensors[name] = held = kept.to(world.device)
                    if name in rounded and buffer.is_floating_point() and buffer.dtype != torch.float32:
                        self._copies.append((held, buffer))
                    else:
                        module._buffers[leaf] = held
        self._averaged = [tensor for tensor in self.tensors.values() if tensor.is_floating_point()]
        #: The average over steps of what `_flat` gives.
        self.ema = self._flat() if ema_decay is not None else None
        self._changed = False
        self._before: Tensor | None = None

    @torch.no_grad()
    def change(self) -> None:
        """A training step changes them: the ranks' differ from now on."""
        self._changed = True
        self._before = self._flat()

    @torch.no_grad()
    def settle(self, skipped: Tensor, steps: Tensor) -> None:
        """After the step: back to what `change` saw where it was skipped. Does not wait for the device.

        Args:
            skipped: scalar bool tensor, the same on every rank.
            steps: applied steps, this one included; a scalar fp32 tensor.
        """
        before, self._before = self._before, None
        after = self._flat()
        if before is None or after is None:
            return
        skipped = skipped.to(after.device)
        settled = torch.where(skipped, before, after)
        self._put(settled)
        if self.ema is not None and self.ema_decay is not None:
            self.ema.lerp_(settled, average_weight(steps.to(after.device), self.ema_decay) * (~skipped).float())

    def _flat(self) -> Tensor | None:
        """A copy of all statistics, 1-D fp32; None where there are none."""
        return torch.cat([tensor.reshape(-1) for tensor in self._averaged]) if self._averaged else None

    def _put(self, flat: Tensor) -> None:
        parts = flat.split([tensor.numel() for tensor in self._averaged])
        shaped = [part.view(tensor.shape) for tensor, part in zip(self._averaged, parts, strict=True)]
        torch._foreach_copy_(self._averaged, shaped)

    @torch.no_grad()
    def average(self) -> None:
        """Put the ranks' average in the place of each rank's own. Collective where there are buffers."""
        if not self._changed or self.world.world_size == 1:
            return
        self._changed = False
        flat = self._flat()
        if flat is None:
            return
        both = flat if self.ema is None else torch.cat([flat, self.ema])
        dist.all_reduce(both)
        both /= self.world.world_size
        self._put(both[: flat.numel()])
        if self.ema is not None:
            self.ema.copy_(both[flat.numel() :])

    def _averages(self) -> dict[str, Tensor]:
        """Name -> its part of the average over steps, in its shape."""
        if self.ema is None:
            return {}
        names = [name for name, tensor in self.tensors.items() if tensor.is_floating_point()]
        parts = self.ema.split([tensor.numel() for tensor in self._averaged])
        shaped = (part.view(tensor.shape) for part, tensor in zip(parts, self._averaged, strict=True))
        return dict(zip(names, shaped, strict=True))

    def fragments(self) -> Iterator[Fragment]:
        """Averaged copies, from rank 0 alone. Collective where there are buffers, when it is called."""
        self.average()
        held = {ROLE: self.tensors, AVERAGE: self._averages()} if self.world.is_main else {}
        # Copies, because the next forward pass changes them, before any optimizer that can be held.
        return iter(
            [
                Fragment(name, role, tuple(tensor.shape), 0, tensor.reshape(-1).float().clone())
                for role, tensors in held.items()
                for name, tensor in tensors.items()
            ]
        )

    @torch.no_grad()
    def load(self, read: Reader) -> None:
        """Take them from `read`; a missing average is the statistics themselves.

        Raises:
            TrainingFailed: the source lacks one.
        """
        for name, tensor in self.tensors.items():
            values = read(name, ROLE, 0, math.prod(tensor.shape))
            if values is None:
                raise TrainingFailed(f"Buffer {name} was asked for, and its source does not hold it.")
            tensor.copy_(values.view(tensor.shape))
        for constant, copy in self._copies:
            copy.copy_(constant)
        for name, average in self._averages().items():
            values = read(name, AVERAGE, 0, average.numel())
            average.copy_(self.tensors[name] if values is None else values.view(average.shape))
        self._changed = False

    @property
    def size_bytes(self) -> int:
        """Of one rank."""
        return sum(tensor.nbytes for tensor in self.tensors.values()) + (self.ema.nbytes if self.ema is not None else 0)

    def memory(self) -> dict[str, int]:
        """As an item of `Engine.memory`; nothing for a model without."""
        return {"buffers": self.size_bytes} if self.tensors else {}
