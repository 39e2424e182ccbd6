"""What a frozen network holds beside what it trains (`models.freezing`): whole on every rank, in the compute dtype.

In half precision the fp32 values lie in host memory, an equal share on every rank: they are what checkpoints hold and
what the whole network starts from, so that freezing rounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import TrainingFailed
from ..planning.plan import Plan
from ..types import Fragment, Reader, World


class Frozen:
    """The frozen parameters of a model that `models.freezing.freeze` has changed.

    Attributes:
        tensors: canonical name -> values; empty where nothing is frozen.
    """

    def __init__(self, plan: Plan, model: nn.Module, world: World) -> None:
        self.shapes = plan.frozen_shapes()
        self.tensors = {name: model.get_buffer(name) for name in self.shapes}
        self.average = plan.optimizer.ema_decay is not None
        elements = sum(math.prod(shape) for shape in self.shapes.values())
        self.start, self.stop = (elements * rank // world.world_size for rank in (world.rank, world.rank + 1))
        #: This rank's share of the fp32 values, 1-D on the CPU; None where the tensors themselves are fp32.
        self.masters = torch.empty(self.stop - self.start) if plan.mixed and self.tensors else None

    def _mine(self) -> Iterator[tuple[str, int, int, int]]:
        """This rank's parts: name, interval of the tensor, where it begins in `masters`."""
        offset = 0
        for name, shape in self.shapes.items():
            elements = math.prod(shape)
            low, high = max(self.start - offset, 0), min(self.stop - offset, elements)
            if low < high:
                yield name, low, high, offset + low - self.start
            offset += elements

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share. The average of what does not change is itself."""
        for role in ("parameter", "ema") if self.average else ("parameter",):
            for name, low, high, place in self._mine():
                held = self.tensors[name].reshape(-1)[low:high]
                data = held if self.masters is None else self.masters[place : place + high - low]
                yield Fragment(name, role, self.shapes[name], low, data)

    @torch.no_grad()
    def load(self, read: Reader) -> None:
        """Take the values from `read`.

        Raises:
            TrainingFailed: the source lacks one.
        """
        shares = {name: (low, high, place) for name, low, high, place in self._mine()}
        for name, tensor in self.tensors.items():
            values = read(name, "parameter", 0, tensor.numel())
            if values is None:
                raise TrainingFailed(f"parameter {name} was asked for and its source does not hold it")
            tensor.copy_(values.view(tensor.shape))
            if self.masters is not None and name in shares:
                low, high, place = shares[name]
                self.masters[place : place + high - low] = values[low:high]

    def memory(self) -> dict[str, int]:
        """Bytes by item, as `planning.memory` has them."""
        items = {"frozen": sum(tensor.nbytes for tensor in self.tensors.values())} if self.tensors else {}
        return items if self.masters is None else items | {"host_frozen": self.masters.nbytes}
