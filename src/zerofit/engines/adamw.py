"""AdamW over flat fp32 masters (Loshchilov & Hutter 2019; mixed precision as Micikevicius et al. 2018).

Bytes per parameter with a half-precision compute copy: 2 copy + 2 gradient + 4 master + 8 moments = 16; in fp32 the
parameters are views of the master: 4 + 4 gradient + 8 = 16. The step works through the masters in chunks, so that
the fp32 gradients never exist whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..planning.plan import OptimizerPlan
from ..types import Fragment, Reader

#: Elements that a chunk holds at most: 128 MiB of fp32 gradients.
CHUNK_ELEMENTS = 32 * 1024 * 1024
ROLES = ("parameter", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Slot:
    """Where a parameter lies in its group's flat master."""

    name: str
    parameter: nn.Parameter
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()


class _Group:
    """Parameters with one weight decay, and their flat fp32 master and moments."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], weight_decay: float, device: torch.device) -> None:
        self.weight_decay = weight_decay
        self.slots: list[_Slot] = []
        end = 0
        for name, parameter in parameters.items():
            self.slots.append(_Slot(name, parameter, end))
            end += parameter.numel()
        self.elements = end
        self.tensors = {role: torch.zeros(end, dtype=torch.float32, device=device) for role in ROLES}
        for slot in self.slots:
            if slot.parameter.dtype == torch.float32:
                slot.parameter.data = self.tensors["parameter"][slot.start : slot.stop].view(slot.parameter.shape)
        chunks = range(0, end, CHUNK_ELEMENTS)
        self.steps = [torch.zeros((), dtype=torch.float32, device=device) for _ in chunks]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[_Slot, int, int]]:
        """The parts of parameters inside ``[start, stop)`` of the flat master: slot, and interval within it."""
        for slot in self.slots:
            low, high = max(start, slot.start), min(stop, slot.stop)
            if low < high:
                yield slot, low - slot.start, high - slot.start


class FlatAdamW:
    """Fused AdamW over all parameters of a rank.

    Args:
        parameters: canonical name -> parameter, all of one dtype, on one device.
        decays: tells by name whether weight decay applies.
        plan: betas, eps, decay, clipping.
        gradient_of: where a parameter's accumulated gradient is (None: it got none in this window).
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decays: Callable[[str], bool],
        plan: OptimizerPlan,
        gradient_of: Callable[[nn.Parameter], Tensor | None],
    ) -> None:
        self.plan, self.gradient_of = plan, gradient_of
        device = next(iter(parameters.values())).device
        split = ({n: p for n, p in parameters.items() if decays(n) is wanted} for wanted in (True, False))
        self.groups = [
            _Group(group, decay, device) for group, decay in zip(split, (plan.weight_decay, 0.0), strict=True) if group
        ]
        self.mixed = next(iter(parameters.values())).dtype != torch.float32
        largest = max(min(group.elements, CHUNK_ELEMENTS) for group in self.groups)
        self.scratch_elements = largest

    def gradient_norm(self) -> Tensor:
        """L2 norm of all gradients as they are (scaled), in fp32; a scalar on the device."""
        gradients = [
            g for group in self.groups for slot in group.slots if (g := self.gradient_of(slot.parameter)) is not None
        ]
        # The CPU adds in sequence, which in fp32 costs five digits on large tensors; the GPU adds in trees.
        dtype = torch.float64 if gradients[0].device.type == "cpu" else torch.float32
        norms = torch._foreach_norm(gradients, 2, dtype=dtype)
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return total.float()

    @torch.no_grad()
    def step(self, lr: float, grad_divisor: Tensor, found_inf: Tensor) -> None:
        """Apply one step; does nothing on the device where `found_inf` is not 0.

        Args:
            lr: learning rate.
            grad_divisor: scalar fp32 tensor; gradients are divided by it (loss scale and clipping in one).
            found_inf: scalar fp32 tensor, 1.0 when the gradient is not finite.
        """
        scratch = torch.empty(self.scratch_elements, dtype=torch.float32, device=found_inf.device)
        for group in self.groups:
            for index, start in enumerate(range(0, group.elements, CHUNK_ELEMENTS)):
                stop = min(start + CHUNK_ELEMENTS, group.elements)
                self._step_chunk(group, index, start, stop, scratch[: stop - start], lr, grad_divisor, found_inf)

    def _step_chunk(
        self,
        group: _Group,
        index: int,
        start: int,
        stop: int,
        gradient: Tensor,
        lr: float,
        grad_divisor: Tensor,
        found_inf: Tensor,
    ) -> None:
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        offset = 0
        for slot, low, high in group.pieces(start, stop):
            source = self.gradient_of(slot.parameter)
            target = gradient[offset : offset + high - low]
            offset += high - low
            if source is None:
                target.zero_()
            else:
                sources.append(source.view(-1)[low:high])
                targets.append(target)
        if sources:
            torch._foreach_copy_(targets, sources)
        master = group.tensors["parameter"][start:stop]
        adamw(
            [master],
            [gradient],
            [group.tensors["exp_avg"][start:stop]],
            [group.tensors["exp_avg_sq"][start:stop]],
            [],
            [group.steps[index]],
            fused=True,
            grad_scale=grad_divisor,
            found_inf=found_inf,
            amsgrad=False,
            beta1=self.plan.beta1,
            beta2=self.plan.beta2,
            lr=lr,
            weight_decay=group.weight_decay,
            eps=self.plan.eps,
            maximize=False,
        )
        if self.mixed:
            self._refresh(group, start, stop)

    def _refresh(self, group: _Group, start: int, stop: int) -> None:
        """Copy masters to the compute copy over an interval."""
        pieces = list(group.pieces(start, stop))
        if not pieces:
            return
        master = group.tensors["parameter"]
        copies = [slot.parameter.data.view(-1)[low:high] for slot, low, high in pieces]
        masters = [master[slot.start + low : slot.start + high] for slot, low, high in pieces]
        torch._foreach_copy_(copies, masters)

    def fragments(self, rank: int, world_size: int) -> Iterator[Fragment]:
        """The share of rank `rank` when all hold the same: an equal interval of each group."""
        for group in self.groups:
            start, stop = (group.elements * r // world_size for r in (rank, rank + 1))
            for role, flat in group.tensors.items():  # so that neighbours in memory follow each other
                for slot, low, high in group.pieces(start, stop):
                    data = flat[slot.start + low : slot.start + high]
                    yield Fragment(slot.name, role, tuple(slot.parameter.shape), low, data)

    @torch.no_grad()
    def load(self, read: Reader, steps: float) -> None:
        """Take masters and moments from `read` (missing moments are 0), then refresh the compute copy."""
        for group in self.groups:
            for slot in group.slots:
                for role, flat in group.tensors.items():
                    source = read(slot.name, role, 0, slot.parameter.numel())
                    target = flat[slot.start : slot.stop]
                    if source is None and role == "parameter":
                        raise KeyError(slot.name)
                    target.zero_() if source is None else target.copy_(source)
            for step in group.steps:
                step.fill_(steps)
            if self.mixed:
                self._refresh(group, 0, group.elements)

    @property
    def applied_steps(self) -> float:
        """Steps that were applied (Adam's t); waits for the device."""
        return float(self.groups[0].steps[0].item())
