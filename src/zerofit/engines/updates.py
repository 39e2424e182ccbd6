"""How one group of flat parameters takes its gradient: torch's fused AdamW, an element-wise rule with low-bit states,
Muon, or Adafactor. Nothing waits for the device: a step that is skipped is computed and not stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..kernels.optimizer_step import Figures, Kind, Moment, Rule
from ..kernels.optimizer_step import step as elementwise_step
from ..planning.optimizer_states import MEANS, factor_shapes
from ..planning.plan import OptimizerPlan

#: Newton-Schulz coefficients (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) and what keeps its
#: division finite.
NEWTON_SCHULZ, NEWTON_SCHULZ_EPS = (3.4445, -4.7750, 2.0315), 1e-7
#: RMS of AdamW's updates, which Muon's are scaled to, so that one learning rate serves both (Liu et al. 2025, "Muon is
#: Scalable for LLM Training", equation 4).
ADAMW_UPDATE_RMS = 0.2
#: torch.optim.Adafactor's: smallest mean square, and smallest scale of a parameter.
ADAFACTOR_EPS, ADAFACTOR_SCALE_FLOOR = torch.finfo(torch.float32).eps, 1e-3


@dataclass(frozen=True)
class Region:
    """An interval of a group's flat tensors that is updated at once.

    Attributes:
        index: of the chunk or the slot.
        start, stop: interval.
        shape: of the parameter, where regions are whole parameters.
    """

    index: int
    start: int
    stop: int
    shape: tuple[int, ...]


@dataclass
class StepInputs:
    """What every region of a step is updated with; scalars are fp32 tensors on the device.

    Attributes:
        lr: learning rate.
        weight_decay: decoupled, of the group.
        grad_divisor: gradients are divided by it.
        found_inf: 1.0 when the step is skipped.
    """

    lr: float
    weight_decay: float
    grad_divisor: Tensor
    found_inf: Tensor
    figures: Figures | None = None

    @property
    def skipped(self) -> Tensor:
        """Scalar bool tensor."""
        return self.found_inf != 0


class Update(Protocol):
    """One group's rule, with what it keeps beside the flat means."""

    by_parameter: bool
    """Regions are whole parameters; else chunks of any size."""

    @property
    def rule(self) -> Rule | None:
        """What `kernels.optimizer_group` can do in the place of `begin` and `apply`, after `count`; else None."""

    def count(self, inputs: StepInputs) -> None:
        """Count the step."""

    def begin(self, inputs: StepInputs) -> None:
        """Begin a step that `apply` carries out; it is counted here or there."""

    def apply(
        self, region: Region, weights: Tensor, means: Sequence[Moment], gradient: Tensor, given: StepInputs
    ) -> None:
        """Update the region's weights and means (views) with its fp32 gradient."""

    @property
    def steps(self) -> Tensor:
        """Applied steps, a scalar fp32 tensor."""

    def set_steps(self, steps: float) -> None:
        """Continue counting."""

    def factors(self) -> Iterator[tuple[int, str, tuple[int, ...], Tensor]]:
        """(slot, role, shape, 1-D tensor) of what does not have the parameter's shape."""


@dataclass
class _Counted:
    """Counts applied steps on the device."""

    plan: OptimizerPlan
    counter: Tensor

    @property
    def steps(self) -> Tensor:
        return self.counter

    @property
    def rule(self) -> Rule | None:
        return None

    def set_steps(self, steps: float) -> None:
        self.counter.fill_(steps)

    def count(self, inputs: StepInputs) -> None:
        self.counter += 1 - inputs.found_inf

    def begin(self, inputs: StepInputs) -> None:
        self.count(inputs)

    def factors(self) -> Iterator[tuple[int, str, tuple[int, ...], Tensor]]:
        yield from ()


class PlainAdamW:
    """fp32 AdamW: by torch's fused kernel, which counts for each chunk itself, where no one pass does it."""

    by_parameter = False

    def __init__(self, plan: OptimizerPlan, chunks: int, device: torch.device) -> None:
        self.plan = plan
        self.counters = torch.zeros(chunks, dtype=torch.float32, device=device)

    @property
    def steps(self) -> Tensor:
        return self.counters[0]

    def set_steps(self, steps: float) -> None:
        self.counters.fill_(steps)

    @property
    def rule(self) -> Rule | None:
        return rule_of(self.plan, "adamw")

    def count(self, inputs: StepInputs) -> None:
        self.counters += 1 - inputs.found_inf  # torch._foreach_add_ would wait for the number

    def begin(self, inputs: StepInputs) -> None:
        """torch's kernel counts."""

    def factors(self) -> Iterator[tuple[int, str, tuple[int, ...], Tensor]]:
        yield from ()

    def apply(
        self, region: Region, weights: Tensor, means: Sequence[Moment], gradient: Tensor, given: StepInputs
    ) -> None:
        adamw(
            [weights],
            [gradient],
            [means[0].values],
            [means[1].values],
            [],
            [self.counters[region.index]],
            fused=True,
            grad_scale=given.grad_divisor,
            found_inf=given.found_inf,
            amsgrad=False,
            beta1=self.plan.beta1,
            beta2=self.plan.beta2,
            lr=given.lr,
            weight_decay=given.weight_decay,
            eps=self.plan.eps,
            maximize=False,
        )


@dataclass
class Elementwise(_Counted):
    """AdamW, Lion or SGD with states of any type; see `kernels.optimizer_step`.

    Attributes:
        kind: which.
        stream: tells this group's random numbers from others'.
    """

    kind: Kind = "adamw"
    stream: int = 0
    by_parameter: bool = False

    @property
    def rule(self) -> Rule | None:
        return rule_of(self.plan, self.kind)

    def begin(self, inputs: StepInputs) -> None:
        super().begin(inputs)
        inputs.figures = Figures.of(rule_of(self.plan, self.kind), self.counter, inputs.grad_divisor, inputs.found_inf)

    def apply(
        self, region: Region, weights: Tensor, means: Sequence[Moment], gradient: Tensor, given: StepInputs
    ) -> None:
        assert given.figures is not None
        elementwise_step(
            rule_of(self.plan, self.kind),
            gradient,
            weights,
            tuple(means),
            given.figures,
            lr=given.lr,
            weight_decay=given.weight_decay,
            seed=self.plan.seed,
            stream=self.stream,
            first=region.start,
        )


def rule_of(plan: OptimizerPlan, kind: Kind) -> Rule:
    """The kernel's rule of a plan."""
    return Rule(kind, plan.beta1, plan.beta2, plan.eps, plan.momentum, plan.nesterov)


@dataclass
class Muon(_Counted):
    """Momentum, orthogonalised (Jordan et al. 2024), scaled to AdamW's RMS; convolutions as (out, in x height x width).

    As torch.optim.Muon with ``adjust_lr_fn="match_rms_adamw"``.
    """

    by_parameter: bool = True

    def apply(
        self, region: Region, weights: Tensor, means: Sequence[Moment], gradient: Tensor, given: StepInputs
    ) -> None:
        gradient.div_(given.grad_divisor)
        before, rate = means[0].values, 1 - self.plan.momentum
        momentum = before.lerp(gradient, rate)
        update = gradient.lerp(momentum, self.plan.momentum) if self.plan.nesterov else momentum
        rows, columns = region.shape[0], math.prod(region.shape[1:])
        direction = orthogonalized(update.view(rows, columns), self.plan.orthogonal_steps).reshape(-1)
        scale = ADAMW_UPDATE_RMS * math.sqrt(max(rows, columns))
        after = weights * (1 - given.lr * given.weight_decay) - given.lr * scale * direction
        weights.copy_(torch.where(given.skipped, weights, after))
        before.copy_(torch.where(given.skipped, before, momentum))


def orthogonalized(matrix: Tensor, steps: int) -> Tensor:
    """About U V^T of the matrix's singular value decomposition U S V^T, by a quintic Newton-Schulz iteration in bf16.

    Singular values end between about 0.7 and 1.2.

    Args:
        matrix: (rows, columns) fp32.
        steps: iterations.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=NEWTON_SCHULZ_EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).float()


@dataclass
class Adafactor(_Counted):
    """Mean squares by row and column, steps relative to the parameter's RMS (Shazeer & Stern 2018, algorithms 4 and 5).

    As torch.optim.Adafactor. For more than two dimensions the last two count as the matrix.
    """

    shapes: Sequence[tuple[int, ...]] = ()
    by_parameter: bool = True
    #: Of each slot, by role.
    squares: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        device = self.counter.device
        self.squares = [
            {role: torch.zeros(size, device=device) for role, size in factor_shapes(shape).items()}
            for shape in self.shapes
        ]

    def factors(self) -> Iterator[tuple[int, str, tuple[int, ...], Tensor]]:
        for index, squares in enumerate(self.squares):
            for role, square in squares.items():
                yield index, role, tuple(square.shape), square.view(-1)

    def apply(
        self, region: Region, weights: Tensor, means: Sequence[Moment], gradient: Tensor, given: StepInputs
    ) -> None:
        p, g = weights.view(region.shape), gradient.div_(given.grad_divisor).view(region.shape)
        rate = self.counter.clamp(min=1) ** self.plan.beta2_decay
        squares = self.squares[region.index]
        if g.dim() >= 2:
            new = [squares[role].lerp(g.square().mean(dim, keepdim=True), rate)
                   for role, dim in (("exp_avg_sq_row", -1), ("exp_avg_sq_col", -2))]  # fmt: skip
            square = new[0] @ new[1] / new[0].mean(-2, keepdim=True).clamp(min=ADAFACTOR_EPS)
        else:
            new = [squares["exp_avg_sq"].lerp(g.square(), rate)]
            square = new[0]
        update = g * square.clamp(min=ADAFACTOR_EPS**2).rsqrt()
        scale = _rms(p).clamp(min=ADAFACTOR_SCALE_FLOOR) * self.counter.clamp(min=1).rsqrt().clamp(max=given.lr)
        clip = (_rms(update) / self.plan.update_clip).clamp(min=1.0)
        after = p * (1 - given.lr * given.weight_decay) - scale / clip * update
        p.copy_(torch.where(given.skipped, p, after))
        for square, value in zip(squares.values(), new, strict=True):
            square.copy_(torch.where(given.skipped, square, value))


def _rms(values: Tensor) -> Tensor:
    rms: Tensor = values.norm() / math.sqrt(values.numel())
    return rms


def make_update(
    plan: OptimizerPlan, kind: str, shapes: Sequence[tuple[int, ...]], chunks: int, stream: int, device: torch.device
) -> Update:
    """The rule of a group of parameters of these shapes."""
    counter = torch.zeros((), dtype=torch.float32, device=device)
    if kind == "muon":
        return Muon(plan, counter)
    if kind == "adafactor":
        return Adafactor(plan, counter, shapes)
    if kind == "adamw" and plan.state == "fp32" and plan.master == "fp32":
        return PlainAdamW(plan, chunks, device)
    return Elementwise(plan, counter, kind, stream)  # type: ignore[arg-type]


def make_means(plan: OptimizerPlan, kind: str, elements: int, device: torch.device) -> dict[str, Moment]:
    """Role -> running mean of a flat group, zeros."""
    signs = Rule(kind).signed_moments if kind in ("adamw", "lion", "sgd") else (True,)  # type: ignore[arg-type]
    return {
        role: Moment(elements, plan.state, signed, device) for role, signed in zip(MEANS[kind], signs, strict=False)
    }
