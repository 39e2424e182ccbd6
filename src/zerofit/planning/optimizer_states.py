"""What each optimizer keeps of each parameter: roles, groups, bytes. Pure; engines read it too, so that both agree.

n elements of a flat group. Moments in fp32 take 4n bytes each, bf16 2n, 8 bits n codes and 4 bytes for 256 elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .plan import OptimizerPlan, Plan

#: `kernels.optimizer_step.BLOCK`: elements that share a scale.
BLOCK = 256
#: Running means that have the parameter's shape, by role.
MEANS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "sgd": ("momentum_buffer",),
    "muon": ("momentum_buffer",),
    "adafactor": (),
}
#: Adafactor's means of squares: over each row and each column of a matrix, or whole for a vector.
FACTORS = ("exp_avg_sq_row", "exp_avg_sq_col")


@dataclass(frozen=True)
class StateGroup:
    """Parameters that are updated alike.

    Attributes:
        kind: ``adamw``, ``lion``, ``sgd``, ``adafactor`` or ``muon``.
        decays: weight decay applies.
        members: name -> shape.
    """

    kind: str
    decays: bool
    members: Mapping[str, tuple[int, ...]]


def is_hidden_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether Muon orthogonalises the updates of this parameter: a linear map (or convolution) inside the repeated
    blocks, whose names hold the block's number. Embeddings, heads, stems and vectors are AdamW's."""
    return len(shape) in (2, 4) and any(part.isdigit() for part in name.split("."))


def state_groups(kind: str, shapes: Mapping[str, tuple[int, ...]], decays: Mapping[str, bool]) -> list[StateGroup]:
    """Parameters by how they are updated, in a fixed order; no group is empty."""
    groups = []
    for part in ("muon", "adamw") if kind == "muon" else (kind,):
        for wanted in (True, False):
            members = {
                name: shape
                for name, shape in shapes.items()
                if decays[name] is wanted
                and (kind != "muon" or (part == "muon") is (decays[name] and is_hidden_matrix(name, shape)))
            }
            if members:
                groups.append(StateGroup(part, wanted, members))
    return groups


def planned_groups(plan: Plan) -> list[StateGroup]:
    """The groups of a plan."""
    return state_groups(plan.optimizer.kind, plan.trained_shapes(), decaying(plan))


def decaying(plan: Plan) -> dict[str, bool]:
    """Name -> whether weight decay applies."""
    decayed = plan.model.decaying()
    return {name: name in decayed for name in plan.trained_shapes()}


def flat_elements(optimizer: OptimizerPlan, group: StateGroup) -> int:
    """Elements of the group's flat tensors: with 8 bits every parameter begins a block of its own."""
    sizes = (math.prod(shape) for shape in group.members.values())
    return sum(BLOCK * math.ceil(size / BLOCK) for size in sizes) if optimizer.state == "8bit" else sum(sizes)


def mean_bytes(optimizer: OptimizerPlan, kind: str, elements: int) -> list[int]:
    """Bytes of each allocation for the running means of a flat group."""
    each = {"fp32": [4 * elements], "bf16": [2 * elements], "8bit": [elements, 4 * math.ceil(elements / BLOCK)]}
    return each[optimizer.state] * len(MEANS[kind])


def gathers_gradients(kind: str, device: str) -> bool:
    """Whether a group's step gathers gradients in fp32 before it uses them: Muon's and Adafactor's, which need whole
    tensors; any on a CPU. On a GPU `kernels.optimizer_group` reads the others' where they lie. (Where that kernel
    cannot run, the step gathers there too, says so, and takes a chunk more than was planned.)"""
    return device == "cpu" or kind in ("muon", "adafactor")


def factor_bytes(group: StateGroup) -> Iterator[int]:
    """Bytes of Adafactor's means, tensor by tensor."""
    if group.kind != "adafactor":
        return
    for shape in group.members.values():
        for size in factor_shapes(shape).values():
            yield 4 * math.prod(size)


def factor_shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Role -> shape of Adafactor's means for a parameter."""
    if len(shape) < 2:
        return {"exp_avg_sq": shape}
    return {FACTORS[0]: (*shape[:-1], 1), FACTORS[1]: (*shape[:-2], 1, shape[-1])}


def master_bytes(plan: Plan) -> int:
    """Of one element of the weights that are updated."""
    return 2 if plan.optimizer.master == "bf16" else 4


def checkpoint_bytes_a_parameter(kind: str, ema: bool) -> int:
    """What a checkpoint holds of each parameter: everything in fp32. Adafactor's factors are small."""
    return 4 * (1 + len(MEANS[kind]) + ema)
