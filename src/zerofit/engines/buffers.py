"""What a model remembers and no gradient changes: a batch norm's running statistics. The same under every engine.

Every rank holds all buffers, whole and in fp32 (counters as they are), and moves them by its own micro-batches. Where
they are looked at from outside, at an evaluation, a prediction and a save, the ranks' values are averaged and the
average takes the place of each rank's own. Running statistics are linear in the batches' statistics, so the average
does not depend on when, or how often, it is taken; it never enters a training step. Counters are taken from rank 0:
they count micro-batches, and all ranks have seen equally many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import TrainingFailed
from ..types import Fragment, Reader, World

ROLE = "buffer"


class Buffers:
    """The buffers of `model`, which is built, wrapped and cast already: DeepSpeed makes halves of everything.

    Attributes:
        tensors: canonical name -> buffer; empty for a model without.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world = world
        self.tensors: dict[str, Tensor] = {}
        for prefix, module in model.named_modules():
            for leaf, buffer in list(module._buffers.items()):
                if buffer is not None and leaf not in module._non_persistent_buffers_set:
                    kept = buffer.float() if buffer.is_floating_point() else buffer
                    held = module._buffers[leaf] = kept.to(world.device)
                    self.tensors[f"{prefix}.{leaf}".lstrip(".")] = held
        self._changed = False

    def change(self) -> None:
        """A training step changes them: the ranks' differ from now on."""
        self._changed = True

    @torch.no_grad()
    def average(self) -> None:
        """Put the ranks' average in the place of each rank's own. Collective where there are buffers."""
        if not self._changed or self.world.world_size == 1:
            return
        self._changed = False
        averaged = [tensor for tensor in self.tensors.values() if tensor.is_floating_point()]
        if not averaged:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in averaged])
        dist.all_reduce(flat)
        flat /= self.world.world_size
        for tensor, part in zip(averaged, flat.split([tensor.numel() for tensor in averaged]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def fragments(self) -> Iterator[Fragment]:
        """Averaged copies, from rank 0 alone. Collective where there are buffers, when it is called."""
        self.average()
        held = self.tensors.items() if self.world.is_main else ()
        # Copies, because the next forward pass changes them, before any optimizer that can be held.
        return iter([Fragment(name, ROLE, tuple(t.shape), 0, t.reshape(-1).float().clone()) for name, t in held])

    @torch.no_grad()
    def load(self, read: Reader) -> None:
        """Take them from `read`.

        Raises:
            TrainingFailed: the source lacks one.
        """
        for name, tensor in self.tensors.items():
            values = read(name, ROLE, 0, math.prod(tensor.shape))
            if values is None:
                raise TrainingFailed(f"Buffer {name} was asked for, and its source does not hold it.")
            tensor.copy_(values.view(tensor.shape))
        self._changed = False

    @property
    def size_bytes(self) -> int:
        """Of one rank."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def memory(self) -> dict[str, int]:
        """As an item of `Engine.memory`; nothing for a model without."""
        return {"buffers": self.size_bytes} if self.tensors else {}
