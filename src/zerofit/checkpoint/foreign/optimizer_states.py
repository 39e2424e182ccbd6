"""Optimizer states of torch.optim in dictionaries whose keys are numbers: which number is which parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from .contents import MOMENTS, PARAMETER, Contents
from .sources import Joined, cut, join
from .torch_file import TorchFile


def moments_of(optimizer: Any, group: int) -> Mapping[str, Any]:
    """State of the one flat tensor of a group; empty before the first step.

    Args:
        optimizer: ``torch.optim``'s state_dict, or DeepSpeed's elastic list of one state a group.
    """
    if isinstance(optimizer, list):
        state: Mapping[str, Any] = optimizer[group]
        return state
    numbers = [number for entry in optimizer["param_groups"] for number in entry["params"]]
    # Only the numbers of parameters that have made a step are keys.
    found: Mapping[str, Any] = optimizer["state"].get(numbers[group] if group < len(numbers) else group, {})
    return found


def add_moments_in_order(
    contents: Contents, file: TorchFile, parameters: Mapping[str, Tensor], optimizer: Mapping[str, Any]
) -> None:
    """Moments (and fp32 masters) of an optimizer that was given whole parameters.

    The states' order is that of the groups given to the optimizer: by name where the groups have names, else all
    parameters in the model's order, or matrices first and vectors after them (nanoGPT's `configure_optimizers`). The
    first order that fits every shape is taken.

    Args:
        parameters: of the model, in its order; tied ones may appear under each of their names.
        optimizer: torch's state_dict, or what DeepSpeed's half precision optimizers wrap around it.
    """
    inner = optimizer.get("optimizer_state_dict", optimizer)
    groups = [list(group["params"]) for group in inner.get("param_groups", [])]
    masters = optimizer.get("fp32_groups") or optimizer.get("fp32_groups_flat")
    flat = "fp32_groups_flat" in optimizer
    unique = _without_ties(parameters)
    order = _order(inner, groups, unique, masters, flat)
    if order is None:
        contents.note("The optimizer's states do not match the parameters' order: weights only were carried over.")
        return
    if masters:
        # The other names of a tied tensor still stand for the half precision copy.
        contents.tensors[PARAMETER] = {name: contents.tensors[PARAMETER][name] for name in unique}
        _add_tensors(contents, file, PARAMETER, order, unique, masters, flat)
    elif any(tensor.dtype.itemsize < 4 for tensor in unique.values()):
        contents.note("There are no fp32 masters: the parameters are those of training in half precision.")
    states = [[inner["state"].get(number, {}) for number in numbers] for numbers in groups]
    for role in MOMENTS:
        if all(role in state for group in states for state in group):
            values = [[state[role] for state in group] for group in states]
            _add_tensors(contents, file, role, order, unique, [v[0] for v in values] if flat else values, flat)
    first: Mapping[str, Any] = next((state for group in states for state in group), {})
    steps = file.number(first.get("step"))
    if steps is not None and contents.tensors["exp_avg"]:
        contents.scalars["optimizer_steps"] = steps


def _without_ties(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each storage once, under its first name."""
    seen: set[tuple[Any, ...]] = set()
    unique = {}
    for name, tensor in parameters.items():
        storage = tensor.untyped_storage()
        # Two tensors on the meta device never share a storage object; the place in the file tells.
        place = storage._cdata if storage._checkpoint_offset is None else storage._checkpoint_offset
        key = (place, tensor.storage_offset(), tuple(tensor.shape))
        if key not in seen:
            seen.add(key)
            unique[name] = tensor
    return unique


def _order(
    inner: Mapping[str, Any],
    groups: Sequence[Sequence[int]],
    parameters: Mapping[str, Tensor],
    masters: Any,
    flat: bool,
) -> list[list[str]] | None:
    """The parameters' names in each group."""
    names = list(parameters)
    matrices = [name for name in names if parameters[name].dim() >= 2]
    vectors = [name for name in names if parameters[name].dim() < 2]
    named = [list(group.get("param_names", [])) for group in inner["param_groups"]]
    candidates = [named] if all(name in parameters for group in named for name in group) else []
    candidates += [[names], [matrices, vectors], [vectors, matrices]]
    for candidate in candidates:
        if flat:
            lengths = [sum(parameters[name].numel() for name in group) for group in candidate]
            if lengths == [master.numel() for master in masters]:
                return candidate
        elif [len(group) for group in candidate] == [len(group) for group in groups] and all(
            _fits(inner["state"].get(number, {}), parameters[name])
            for group, numbers in zip(candidate, groups, strict=True)
            for name, number in zip(group, numbers, strict=True)
        ):
            return candidate
    return None


def _fits(state: Mapping[str, Any], parameter: Tensor) -> bool:
    return all(tuple(state[role].shape) == tuple(parameter.shape) for role in MOMENTS if role in state)


def _add_tensors(
    contents: Contents,
    file: TorchFile,
    role: str,
    order: Sequence[Sequence[str]],
    parameters: Mapping[str, Tensor],
    values: Sequence[Any],
    flat: bool,
) -> None:
    for names, value in zip(order, values, strict=True):
        if not flat:
            contents.tensors[role] |= {name: file.source(v) for name, v in zip(names, value, strict=True)}
            continue
        vector: Joined = join([file.source(value)])
        offset = 0
        for name in names:
            contents.tensors[role][name] = cut(vector, offset, tuple(parameters[name].shape))
            offset += math.prod(parameters[name].shape)
        if offset > vector.shape[0]:
            raise CheckpointError(f"{file.path}: {role} has {vector.shape[0]} elements and the parameters {offset}.")
