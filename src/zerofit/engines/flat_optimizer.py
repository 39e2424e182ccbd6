"""Optimizers over flat masters (mixed precision as Micikevicius et al. 2018), for engines that own their states.

Bytes per parameter with a half-precision compute copy and AdamW: 2 copy + 2 gradient + 4 master + 8 moments = 16; in
fp32 the parameters are views of the master: 4 + 4 gradient + 8 = 16; with a bf16 master, which is the compute copy, and
8-bit moments: 2 + 2 gradient + 2.03 = 6.03.

On a GPU with Triton an element-wise step is one pass over a group, which reads gradients and writes compute copies
where they lie. Otherwise it works through the masters in chunks, so that the fp32 gradients never exist whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.optimizer_group import Flat, GroupStep, Places
from ..kernels.optimizer_step import BLOCK, Figures, Moment
from ..planning.optimizer_states import state_groups
from ..planning.plan import OptimizerPlan
from ..types import Fragment, Reader
from .decoding import in_fp32
from .loss_scale import LossScaler
from .updates import Region, StepInputs, make_means, make_update

#: Elements that a chunk holds at most: 128 MiB of fp32 gradients.
CHUNK_ELEMENTS = 32 * 1024 * 1024
#: Random streams of one rank: flat groups, partitions.
STREAMS = 1 << 16


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in its group's flat tensors."""

    name: str
    parameter: nn.Parameter
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()


class Group:
    """Parameters that are updated alike, and their flat tensors by role: ``parameter`` (the master), means, ``ema``."""

    def __init__(
        self, kind: str, parameters: Mapping[str, nn.Parameter], weight_decay: float, plan: OptimizerPlan, stream: int
    ) -> None:
        self.weight_decay = weight_decay
        self.slots: list[Slot] = []
        end, aligned = 0, BLOCK if plan.state == "8bit" else 1
        for name, parameter in parameters.items():
            self.slots.append(Slot(name, parameter, end))
            end += aligned * -(-parameter.numel() // aligned)
        self.elements, self.has_gaps = end, aligned > 1
        device = self.slots[0].parameter.device
        master = Moment(end, plan.master, True, device)
        self.states: dict[str, Moment] = {"parameter": master, **make_means(plan, kind, end, device)}
        self.mean_roles = tuple(self.states)[1:]
        if plan.ema_decay is not None:
            self.states["ema"] = Moment(end, "fp32", True, device)
        for slot in self.slots:
            if slot.parameter.dtype == master.values.dtype:
                slot.parameter.data = master.values[slot.start : slot.stop].view(slot.parameter.shape)
        shapes = [tuple(slot.parameter.shape) for slot in self.slots]
        self.update = make_update(plan, kind, shapes, -(-end // CHUNK_ELEMENTS), stream, device)
        self.stream = stream
        self.one_pass: GroupStep | None = None
        if (rule := self.update.rule) is not None:
            self.one_pass = GroupStep(rule, [(slot.start, slot.parameter.numel()) for slot in self.slots])

    @property
    def master(self) -> Tensor:
        """(elements,) fp32 or bf16."""
        return self.states["parameter"].values

    @property
    def flat(self) -> Flat:
        """What a step in one pass updates."""
        average = self.states["ema"].values if "ema" in self.states else None
        return Flat(self.master, tuple(self.states[role] for role in self.mean_roles), average)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Slot, int, int]]:
        """The parts of parameters inside ``[start, stop)`` of the flat master: slot, and interval within it."""
        for slot in self.slots:
            low, high = max(start, slot.start), min(stop, slot.stop)
            if low < high:
                yield slot, low - slot.start, high - slot.start

    def regions(self) -> Iterator[Region]:
        """What is updated at once, in order."""
        if self.update.by_parameter:
            for index, slot in enumerate(self.slots):
                yield Region(index, slot.start, slot.stop, tuple(slot.parameter.shape))
            return
        for index, start in enumerate(range(0, self.elements, CHUNK_ELEMENTS)):
            stop = min(start + CHUNK_ELEMENTS, self.elements)
            yield Region(index, start, stop, (stop - start,))


class FlatOptimizer:
    """The plan's optimizer over all parameters of a rank.

    Args:
        parameters: canonical name -> parameter (under sharding the rank's part), all of one dtype, on one device.
        decays: tells by name whether weight decay applies.
        plan: kind, its constants, types of its states.
        gradient_of: where a parameter's accumulated gradient is (None: it got none in this window).
        rank: of engines that shard: their random numbers differ. Replicas must draw the same: 0.

    Attributes:
        in_one_pass: whether groups may step in one pass; on a GPU they may. It does the same up to rounding: under
            stochastic rounding and in 8 bits with the same random numbers.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decays: Callable[[str], bool],
        plan: OptimizerPlan,
        gradient_of: Callable[[nn.Parameter], Tensor | None],
        rank: int = 0,
    ) -> None:
        self.plan, self.gradient_of = plan, gradient_of
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.groups = [
            Group(
                group.kind,
                {name: parameters[name] for name in group.members},
                plan.weight_decay if group.decays else 0.0,
                plan,
                rank * STREAMS + index,
            )
            for index, group in enumerate(state_groups(plan.kind, shapes, {name: decays(name) for name in parameters}))
        ]
        first = next(iter(parameters.values()))
        self.copies = first.dtype != self.groups[0].master.dtype
        self.in_one_pass = first.device.type == "cuda"

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

    def clip_and_step(self, lr: float, scaled_norm: Tensor, scaler: LossScaler) -> tuple[Tensor, Tensor, Tensor]:
        """Clip, step unless the gradient is not finite, and let the loss scale follow; nothing waits for the device.

        Args:
            scaled_norm: of the whole gradient as it is, the same on every rank; a scalar fp32 tensor.

        Returns:
            The unscaled norm, whether the step was skipped, and the scale that it ran under.
        """
        scale = scaler.scale.clone()
        grad_norm = scaled_norm / scale.float()
        overflow = ~torch.isfinite(grad_norm)
        clip = self.plan.grad_clip
        divisor = scale.float() * (((grad_norm + 1e-6) / clip).clamp(min=1.0) if clip else 1.0)
        self.step(lr, divisor, overflow.float())
        scaler.update(overflow)
        return grad_norm, overflow, scale

    @torch.no_grad()
    def step(self, lr: float, grad_divisor: Tensor, found_inf: Tensor) -> None:
        """Apply one step; does nothing on the device where `found_inf` is not 0.

        Args:
            lr: learning rate.
            grad_divisor: scalar fp32 tensor; gradients are divided by it (loss scale and clipping in one).
            found_inf: scalar fp32 tensor, 1.0 when the gradient is not finite.
        """
        inputs = {g: StepInputs(lr, g.weight_decay, grad_divisor, found_inf) for g in self.groups}
        rest = self._step_in_one_pass(inputs) if self.in_one_pass else self.groups
        if not rest:
            return
        elements = max(r.stop - r.start for group in rest for r in group.regions())
        scratch = torch.empty(elements, dtype=torch.float32, device=found_inf.device)
        for group in rest:
            self._step_in_regions(group, inputs[group], scratch)

    def _step_in_one_pass(self, inputs: Mapping[Group, StepInputs]) -> list[Group]:
        """Step the groups that can; returns the others."""
        rest: list[Group] = []
        figures: Figures | None = None
        weight: Tensor | None = None
        for group in self.groups:
            if group.one_pass is None:
                rest.append(group)
                continue
            flat, places = group.flat, self.places(group)
            if not group.one_pass.runs(flat, places):
                rest.append(group)
                continue
            given = inputs[group]
            group.update.count(given)
            if figures is None:  # of all these groups: they have one rule, and count alike
                figures = Figures.of(group.one_pass.rule, group.update.steps, given.grad_divisor, given.found_inf)
                if self.plan.ema_decay is not None:
                    weight = average_weight(group.update.steps, self.plan.ema_decay)
            group.one_pass(
                flat, places, figures, weight, lr=given.lr, weight_decay=given.weight_decay, seed=self.plan.seed,
                stream=group.stream,
            )  # fmt: skip
        return rest

    def places(self, group: Group) -> Places:
        """Where the group's gradients and copies are now."""
        gradients = [self.gradient_of(slot.parameter) for slot in group.slots]
        copies = [slot.parameter for slot in group.slots] if self.copies else None
        return Places([None if g is None else g.contiguous() for g in gradients], copies)

    def _step_in_regions(self, group: Group, given: StepInputs, scratch: Tensor) -> None:
        """Region by region: gather gradients, update, copy to the compute copy, average."""
        group.update.begin(given)
        for region in group.regions():
            gradient = scratch[: region.stop - region.start]
            self._gather(group, region.start, region.stop, gradient)
            means = [group.states[role].part(region.start, region.stop) for role in group.mean_roles]
            group.update.apply(region, group.master[region.start : region.stop], means, gradient, given)
            if self.copies:
                self._refresh(group, region.start, region.stop)
            if self.plan.ema_decay is not None:
                self._average(group, region, given.found_inf, self.plan.ema_decay)

    def _gather(self, group: Group, start: int, stop: int, gradient: Tensor) -> None:
        """The interval's gradients in fp32, as they are."""
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        if group.has_gaps:
            gradient.zero_()
        for slot, low, high in group.pieces(start, stop):
            source = self.gradient_of(slot.parameter)
            target = gradient[slot.start + low - start : slot.start + high - start]
            if source is None:
                target.zero_()
            else:
                sources.append(source.view(-1)[low:high])
                targets.append(target)
        if sources:
            torch._foreach_copy_(targets, sources)

    def _refresh(self, group: Group, start: int, stop: int) -> None:
        """Copy masters to the compute copy over an interval."""
        pieces = list(group.pieces(start, stop))
        if not pieces:
            return
        copies = [slot.parameter.data.view(-1)[low:high] for slot, low, high in pieces]
        masters = [group.master[slot.start + low : slot.start + high] for slot, low, high in pieces]
        torch._foreach_copy_(copies, masters)

    def _average(self, group: Group, region: Region, found_inf: Tensor, decay: float) -> None:
        weight = average_weight(group.update.steps, decay) * (1 - found_inf)
        average = group.states["ema"].values[region.start : region.stop]
        average.lerp_(group.master[region.start : region.stop].float(), weight)

    def fragments(self, rank: int, world_size: int) -> Iterator[Fragment]:
        """The share of rank `rank` when all hold the same: an equal interval of each group."""
        for group in self.groups:
            start, stop = (group.elements * r // world_size for r in (rank, rank + 1))
            for role, state in group.states.items():  # so that neighbours in memory follow each other
                parts = (((s, low), s.start + low, s.start + high) for s, low, high in group.pieces(start, stop))
                for (slot, low), offset, data in in_fp32(state, parts):
                    shape = tuple(slot.parameter.shape)
                    yield Fragment(slot.name, role, shape, low + offset, data, temporary=state.is_coded)
            for index, role, shape, data in group.update.factors():
                if index % world_size == rank:
                    yield Fragment(group.slots[index].name, role, shape, 0, data)

    @torch.no_grad()
    def load(self, read: Reader, steps: float) -> None:
        """Take masters and states from `read` (missing ones are 0, a missing average is the weights), then refresh the
        compute copy."""
        for group in self.groups:
            for role, state in group.states.items():
                state.clear()
                for slot in group.slots:
                    _load(state, role, slot, read)
            for index, role, _, target in group.update.factors():
                source = read(group.slots[index].name, role, 0, target.numel())
                target.zero_() if source is None else target.copy_(source)
            group.update.set_steps(steps)
            if self.copies:
                self._refresh(group, 0, group.elements)

    @property
    def applied_steps(self) -> float:
        """Steps that were applied (Adam's t); waits for the device."""
        return float(self.steps.item())

    @property
    def steps(self) -> Tensor:
        """The same as a scalar fp32 tensor on the device."""
        return self.groups[0].update.steps

    def memory(self) -> dict[str, int]:
        """Bytes by the plan's items: ``master`` (where it is not the parameters themselves), ``moments``, ``ema``."""
        items = {"moments": sum(map(_mean_bytes, self.groups))}
        if self.copies:
            items["master"] = sum(group.master.nbytes for group in self.groups)
        if self.plan.ema_decay is not None:
            items["ema"] = sum(group.states["ema"].nbytes for group in self.groups)
        return items

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the flat masters where they are the parameters themselves, gaps included; else 0."""
        return 0 if self.copies else sum(group.master.nbytes for group in self.groups)


def average_weight(steps: Tensor, decay: float) -> Tensor:
    """What the newest weights count for after `steps` applied ones: 1 - min(decay, (1 + t) / (10 + t)), so that a young
    average is not that of the initial values (as TensorFlow's ExponentialMovingAverage)."""
    return 1 - ((1 + steps) / (10 + steps)).clamp(max=decay)


def _load(state: Moment, role: str, slot: Slot, read: Reader) -> None:
    elements = slot.parameter.numel()
    source = read(slot.name, role, 0, elements)
    if source is None and role == "ema":
        source = read(slot.name, "parameter", 0, elements)
    if source is None and role == "parameter":
        raise KeyError(slot.name)
    if source is not None:
        state.write(slot.start, source)


def _mean_bytes(group: Group) -> int:
    means = sum(group.states[role].nbytes for role in group.mean_roles)
    return means + sum(tensor.nbytes for _, _, _, tensor in group.update.factors())
