"""Bytes that DeepSpeed 0.19.8 keeps between two steps, item by item, on its busiest rank.

The arithmetic of its source (``runtime/zero/stage_1_and_2.py``, ``stage3.py``, ``partition_parameters.py``,
``runtime/swap_tensor``); the conformance suite compares every row with the engine's own tensors. N ranks; h bytes of
the compute type (2 or 4); g bytes of the gradient type. Items named ``host_*`` lie in host memory; what was swapped to
NVMe is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from .optimizer_states import decaying, mean_bytes
from .plan import Plan
from .timeline import Ledger

#: Smaller partitions are not swapped to NVMe (``swap_tensor/utils.py``: MIN_AIO_BYTES).
MIN_SWAP_BYTES = 1024**2
#: Swap buffers are rounded up to this (AIO_ALIGNED_BYTES with one thread).
SWAP_ALIGNMENT_BYTES = 1024
#: Buffers in the NVMe pools (DeepSpeed's defaults): of optimizer states, of parameters.
STATE_BUFFERS, PARAMETER_BUFFERS = 4, 5


def zero_state_bytes(plan: Plan) -> dict[str, int]:
    """Model states and persistent buffers under ZeRO-1, 2 or 3, after the first step."""
    if plan.strategy == "zero3":
        return _sharded(plan)
    return max((_replicated(plan, rank) for rank in range(plan.world_size)), key=lambda items: sum(items.values()))


def pinned_bytes(size_bytes: int) -> int:
    """What a page-locked block takes: PyTorch's host allocator rounds it up to a power of two."""
    return 1 << (size_bytes - 1).bit_length() if size_bytes > 1 else size_bytes


def optimizer_groups(plan: Plan) -> list[dict[str, int]]:
    """Elements of each parameter by name, in the optimizer's two groups: with weight decay and without."""
    shapes, decays = plan.model.parameter_shapes(), decaying(plan)
    groups = [
        {name: math.prod(shape) for name, shape in shapes.items() if decays[name] is wanted} for wanted in (True, False)
    ]
    return [group for group in groups if group]


def _groups(plan: Plan) -> list[list[int]]:
    return [list(group.values()) for group in optimizer_groups(plan)]


def _compute_bytes(plan: Plan) -> int:
    return 2 if plan.mixed else 4


def _gradient_bytes(plan: Plan) -> int:
    return 4 if plan.gradient_dtype == "fp32" else _compute_bytes(plan)


def _replicated(plan: Plan, rank: int) -> dict[str, int]:
    """ZeRO-1 and 2. Each group is padded to a multiple of 2 N elements and cut into N equal partitions.

    With offload, the fp32 gradient that the optimizer reads stays (4 a partition element), a staging buffer of the
    largest parameter on either side, and a host copy of the partition in the compute type.
    """
    h, groups = _compute_bytes(plan), _groups(plan)
    parts = [2 * math.ceil(sum(group) / (2 * plan.world_size)) for group in groups]
    part = sum(parts)
    parameters = h * part * plan.world_size
    if plan.offload == "none":
        return {"parameters": parameters, **_states(plan, parts)}
    staging = h * max(max(group) for group in groups)
    return {
        "parameters": parameters,
        "buckets": staging,
        "host_parameters": h * part,
        "host_gradients": 4 * part + staging + _accumulated_on_host(plan, groups, parts, rank),
        **_states(plan, parts, "host_"),
    }


def _states(plan: Plan, parts: Iterable[int], where: str = "") -> dict[str, int]:
    """Master 4 an element, unless it is the compute copy itself; the means; an fp32 average of the weights 4."""
    parts = list(parts)
    items = {} if plan.optimizer.master == "bf16" else {f"{where}master": 4 * sum(parts)}
    kind = plan.optimizer.kind
    items[f"{where}moments"] = sum(size for part in parts for size in mean_bytes(plan.optimizer, kind, part))
    if plan.optimizer.ema_decay is not None:
        items[f"{where}ema"] = 4 * sum(parts)
    return items


def alloc_states(plan: Plan, ledger: Ledger, index: int, part: int, where: str = "") -> None:
    """Allocate what the optimizer keeps of the `index`-th flat partition, of `part` elements, beside its master."""
    for number, size in enumerate(mean_bytes(plan.optimizer, plan.optimizer.kind, part)):
        ledger.alloc((f"{where}moment", index, number), size, f"{where}moments")
    if plan.optimizer.ema_decay is not None:
        ledger.alloc((f"{where}ema", index), 4 * part, f"{where}ema")


def _accumulated_on_host(plan: Plan, groups: list[list[int]], parts: list[int], rank: int) -> int:
    """ZeRO-2 accumulates on the host, in the compute type, every parameter that touches the rank's partition.

    Not with a gradient type of its own, which accumulates on the GPU; ZeRO-1 accumulates there always.
    """
    if plan.strategy == "zero1" or plan.accumulation_steps == 1 or _gradient_bytes(plan) != _compute_bytes(plan):
        return 0
    elements = 0
    for group, part in zip(groups, parts, strict=True):
        start, stop, position = rank * part, (rank + 1) * part, 0
        for size in group:
            elements += size if position < stop and position + size > start else 0
            position += size
    return _compute_bytes(plan) * elements


def _sharded(plan: Plan) -> dict[str, int]:
    """ZeRO-3. Every parameter is cut into N parts of ceil(n / N); small ones also stay whole on every rank."""
    h, g = _compute_bytes(plan), _gradient_bytes(plan)
    sizes = [size for group in _groups(plan) for size in group]
    parts = [_part(size, plan) for size in sizes]
    items = {"parameters": h * _kept_whole(plan, sizes), "buckets": g * plan.zero.reduce_bucket_elements}
    if plan.offload_parameters == "none":
        items["parameters"] += h * sum(parts)
    else:
        nvme = plan.offload_parameters == "nvme"
        items["host_parameters"] = h * sum(part for part in parts if not (nvme and h * part >= MIN_SWAP_BYTES))
    return {**items, **_sharded_states(plan, sum(parts)), **_swap_pools(plan)}


def _kept_whole(plan: Plan, sizes: list[int]) -> int:
    """Elements of parameters at or below the persistence threshold, gathered for good.

    On one rank the partition is the whole parameter already, unless it lies on the other side of the PCIe bus.
    """
    if plan.world_size == 1 and (plan.offload_parameters == "none" or plan.device == "cpu"):
        return 0
    return sum(size for size in sizes if size <= plan.zero.persistence_threshold_elements)


def _sharded_states(plan: Plan, part: int) -> dict[str, int]:
    """Gradients of the window g and the states of each sub-group; offloaded, an fp32 gradient (4) as well."""
    gradients = _gradient_bytes(plan) * part
    parts = [sum(_part(size, plan) for size in members) for members in sub_groups(plan)]
    if plan.offload == "none":
        return {"gradients": gradients, **_states(plan, parts)}
    if plan.offload == "nvme":
        parts = [size for size in parts if 4 * size < MIN_SWAP_BYTES]
    return {"host_gradients": gradients + 4 * sum(parts), **_states(plan, parts, "host_")}


def _part(size: int, plan: Plan) -> int:
    return math.ceil(size / plan.world_size)


def sub_groups(plan: Plan) -> Iterator[list[int]]:
    """Elements of the parameters that the optimizer steps together (``_create_fp16_sub_groups``)."""
    for group in _groups(plan):
        members: list[int] = []
        parts = 0
        for size in group:
            members.append(size)
            parts += _part(size, plan)
            if parts >= plan.zero.sub_group_elements:
                yield members
                members, parts = [], 0
        if members:
            yield members


def _swap_pools(plan: Plan) -> dict[str, int]:
    """Host buffers through which NVMe is read and written."""
    h, pools = _compute_bytes(plan), 0
    largest = max(sub_groups(plan), key=lambda members: sum(_part(size, plan) for size in members))
    if plan.offload == "nvme":
        pools += STATE_BUFFERS * _aligned([4 * sum(_part(size, plan) for size in largest)])
    if plan.offload_parameters == "nvme":
        pools += PARAMETER_BUFFERS * _aligned([h * max(_part(size, plan) for group in _groups(plan) for size in group)])
        pools += _aligned(h * size for size in largest)  # whole parameters, though only parts are written
    return {"host_buckets": pools} if pools else {}


def _aligned(sizes_bytes: Iterable[int]) -> int:
    return sum(SWAP_ALIGNMENT_BYTES * math.ceil(size / SWAP_ALIGNMENT_BYTES) for size in sizes_bytes)


def swapped_bytes(plan: Plan) -> int:
    """Files of one rank on NVMe: per swapped sub-group the master, two moments and the gradient in fp32 (16 an
    element); h an element of each swapped parameter."""
    total = 0
    if plan.offload == "nvme":
        parts = [sum(_part(size, plan) for size in members) for members in sub_groups(plan)]
        total += 16 * sum(part for part in parts if 4 * part >= MIN_SWAP_BYTES)
    if plan.offload_parameters == "nvme":
        sizes = [_compute_bytes(plan) * _part(size, plan) for group in _groups(plan) for size in group]
        total += sum(size for size in sizes if size >= MIN_SWAP_BYTES)
    return total
