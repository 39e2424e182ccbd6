"""One step of an element-wise optimizer over all parameters of a group, where their gradients and compute copies lie.

`optimizer_step` takes one flat gradient in fp32 and leaves the compute copies to its caller: gathering the gradients
and copying the weights move 12 bytes an element more than the 28 that AdamW with fp32 states and a bf16 copy needs
(gradient 2, weights 8, moments 16, copy 2). Here one launch does all of it. A table on the device tells where each
parameter's gradient and copy lie; gradients are made anew in every step, so their addresses are sent with each step
that changed them: 16 bytes a parameter, from page-locked memory, without waiting.

Legend: as `optimizer_step`. A tile is 4 blocks of 256 elements of one parameter; a program takes some tiles of one.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .optimizer_step import BLOCK, Figures, Moment, Rule, StateType, reference_step
from .triton_use import agrees, falls_back

#: Of a tile.
BLOCKS_OF_TILE = 4
#: Programs of a launch, beside one a parameter: enough to keep every multiprocessor busy some fifty times over, and the
#: table of programs stays below 1 MiB.
PROGRAMS = 1 << 16


@dataclass(frozen=True)
class Flat:
    """A group's flat tensors, n elements each.

    Attributes:
        weights: fp32 or bf16.
        moments: the rule's running means.
        average: of the weights, fp32; None where there is none.
    """

    weights: Tensor
    moments: tuple[Moment, ...]
    average: Tensor | None = None


@dataclass(frozen=True)
class Places:
    """Where a group's parameters lie outside its flat tensors; one entry a parameter, contiguous.

    Attributes:
        gradients: of one dtype; None counts as zeros.
        copies: compute copies of one dtype, written with the step; None where the weights are the parameters.
    """

    gradients: Sequence[Tensor | None]
    copies: Sequence[Tensor] | None

    @property
    def gradient_dtype(self) -> torch.dtype:
        """fp32 where there is no gradient."""
        return next((g.dtype for g in self.gradients if g is not None), torch.float32)

    @property
    def copy_dtype(self) -> torch.dtype | None:
        return self.copies[0].dtype if self.copies else None

    def addresses(self) -> list[int]:
        """Of each parameter's gradient and copy; 0 where there is none."""
        found = []
        for index, gradient in enumerate(self.gradients):
            found.append(0 if gradient is None else gradient.data_ptr())
            found.append(self.copies[index].data_ptr() if self.copies else 0)
        return found


class Tables:
    """What the kernel reads of a group beside its tensors.

    Attributes:
        spans: (parameters, 2) int64: first element in the flat tensors, and number of elements.
        programs: (programs, 2) int32: the parameter that a program works on, and the first of its tiles.
        tiles: that a program takes at most.
        addresses: (parameters, 2) int64: see `Places.addresses`.
    """

    def __init__(self, spans: Sequence[tuple[int, int]], device: torch.device, programs: int = PROGRAMS) -> None:
        tile = BLOCKS_OF_TILE * BLOCK
        counts = [-(-elements // tile) for _, elements in spans]
        self.tiles = 1
        while sum(counts) > programs * self.tiles:
            self.tiles *= 2
        pairs = [
            torch.stack([torch.full_like(first, parameter), first], 1)
            for parameter, count in enumerate(counts)
            if len(first := torch.arange(0, count, self.tiles, dtype=torch.int32))
        ]
        self.spans = torch.tensor(spans, dtype=torch.int64).to(device)
        self.programs = torch.cat(pairs).to(device)
        self.addresses = torch.zeros((len(spans), 2), dtype=torch.int64, device=device)
        self._known: list[int] = []

    def send(self, addresses: list[int]) -> None:
        """Have the device read these addresses from here on; does not wait for it."""
        if addresses == self._known:
            return
        host = torch.tensor(addresses, dtype=torch.int64)
        if self.addresses.is_cuda:
            host = host.pin_memory()  # PyTorch's allocator keeps it until the copy is done
        self.addresses.view(-1).copy_(host, non_blocking=True)
        self._known = addresses


class GroupStep:
    """One group's step in one pass.

    Args:
        rule: what a step does.
        spans: of each parameter, first element in the flat tensors and number of elements. With 8-bit moments every
            parameter begins a block.
        programs: of the launch, beside one a parameter.
    """

    def __init__(self, rule: Rule, spans: Sequence[tuple[int, int]], programs: int = PROGRAMS) -> None:
        self.rule, self.spans, self.programs = rule, spans, programs
        self._tables: Tables | None = None

    def runs(self, flat: Flat, places: Places) -> bool:
        """Whether the kernel does this here; says once why it does not. May wait for the device, the first time."""
        if {g.dtype for g in places.gradients if g is not None} - {places.gradient_dtype}:
            falls_back("the optimizer's step", "takes gradients of one type", "they are gathered first, in fp32")
            return False
        average = flat.average is not None
        of = (flat.weights.dtype, flat.moments[0].values.dtype, places.gradient_dtype, places.copy_dtype, average)
        return _kernel_agrees(self.rule, flat.weights.device, *of)

    @torch.no_grad()
    def __call__(
        self,
        flat: Flat,
        places: Places,
        figures: Figures,
        average_weight: Tensor | None,
        *,
        lr: float,
        weight_decay: float,
        seed: int,
        stream: int,
    ) -> None:
        """Update the flat tensors and the copies in place, where `runs`; nothing where ``found_inf`` is not 0.

        Args:
            flat: what is updated.
            places: gradients, divided by the figures' divisor first, and copies.
            figures: see there.
            average_weight: scalar fp32 tensor: what the new weights count for in the average.
            lr, weight_decay, seed, stream: as `optimizer_step.step`; random numbers go by the element's number in the
                flat tensors.
        """
        from .optimizer_step_triton import step_group

        if self._tables is None:
            self._tables = Tables(self.spans, flat.weights.device, self.programs)
        self._tables.send(places.addresses())
        step_group(
            self.rule, flat, self._tables, places.gradient_dtype, places.copy_dtype, figures, average_weight, lr,
            weight_decay, seed, stream,
        )  # fmt: skip


def reference(
    rule: Rule,
    spans: Sequence[tuple[int, int]],
    flat: Flat,
    places: Places,
    figures: Figures,
    average_weight: Tensor | None,
    *,
    lr: float,
    weight_decay: float,
    seed: int,
    stream: int,
) -> None:
    """What `GroupStep` does, in plain PyTorch."""
    gradient = torch.zeros(flat.weights.numel(), device=flat.weights.device)
    for (start, elements), own in zip(spans, places.gradients, strict=True):
        if own is not None:
            gradient[start : start + elements] = own.view(-1)
    reference_step(rule, gradient, flat.weights, flat.moments, figures.packed, lr, weight_decay, seed, stream, 0)
    for (start, elements), copy in zip(spans, places.copies or (), strict=False):
        copy.view(-1).copy_(flat.weights[start : start + elements])
    if flat.average is not None and average_weight is not None:
        flat.average.lerp_(flat.weights.float(), average_weight * (figures.packed[1] == 0))


@functools.cache
def _kernel_agrees(
    rule: Rule,
    device: torch.device,
    weights_dtype: torch.dtype,
    kept: torch.dtype,
    gradient_dtype: torch.dtype,
    copy_dtype: torch.dtype | None,
    averaged: bool,
) -> bool:
    """Two steps of the kernel against the reference, once: whole tiles and odd ends, and a parameter without
    gradient."""
    consequence = "gradients are gathered in fp32 first, which takes 128 MiB and up to twice the time"
    if importlib.util.find_spec("triton") is None:
        falls_back("the optimizer's step", "needs Triton, which is not installed (`pip install triton`)", consequence)
        return False
    state: StateType = "fp32" if kept == torch.float32 else "bf16" if kept == torch.bfloat16 else "8bit"
    sizes, spans, end = (9 * BLOCK, 5 * BLOCK + 100, 77, 300), [], 0
    for size in sizes:
        spans.append((end, size))
        end += BLOCK * -(-size // BLOCK) if state == "8bit" else size
    random = torch.Generator(device).manual_seed(0)
    gradients, start = (torch.randn(*shape, generator=random, device=device) for shape in ((2, end), (end,)))

    def run(in_one_pass: bool) -> list[Tensor]:
        moments = tuple(Moment(end, state, signed, device) for signed in rule.signed_moments)
        weights = torch.zeros(end, dtype=weights_dtype, device=device)
        for at, size in spans:
            weights[at : at + size] = start[at : at + size]
        flat = Flat(weights, moments, weights.float() if averaged else None)
        copies = None if copy_dtype is None else [start.new_zeros(size, dtype=copy_dtype) for size in sizes]
        one = torch.ones((), device=device)
        kernel = GroupStep(rule, spans, programs=4)  # some take two tiles
        for t, gradient in enumerate(gradients):
            parts = [gradient[at : at + size].to(gradient_dtype, copy=True) for at, size in spans]
            places = Places([*parts[:3], None if t else parts[3]], copies)
            given = (flat, places, Figures.of(rule, one * (t + 1), 2 * one, 0 * one), one / 4 if averaged else None)
            if in_one_pass:
                kernel(*given, lr=0.1, weight_decay=0.1, seed=7, stream=3)
            else:
                reference(rule, spans, *given, lr=0.1, weight_decay=0.1, seed=7, stream=3)
        averages = [] if flat.average is None else [flat.average]
        return [weights, *(moment.read(0, end) for moment in moments), *(copies or ()), *averages]

    return agrees("the optimizer's step", lambda: run(True), lambda: run(False), consequence)
