"""Memory of a model that cannot be traced: a closed formula, for Transformers within tens of percent.

P parameters, N ranks, h bytes of the compute type (2 or 4). Bytes on the busiest rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .pictures import sizes_on_gpu
from .plan import Plan

MIB = 1024**2


def coarse_items(plan: Plan, states: Mapping[str, int]) -> dict[str, int]:
    """Estimated bytes of PyTorch's allocator at the peak, by item (on the CPU: of the process).

    Args:
        states: model states, `memory.state_bytes`.
    """
    # Without a GPU, what is offloaded lies in the same memory.
    counts_host = plan.device == "cpu"
    items = {name: size for name, size in states.items() if counts_host or not name.startswith("host_")}
    p, h = plan.parameters, 2 if plan.mixed else 4
    items["gradients"] = max(items.get("gradients", 0), _gradient_bytes(plan, h))
    items["activations"] = _activation_bytes(plan, h)
    items["logits"] = _logit_bytes(plan, h)
    items["temporaries"] = min(4 * p, 128 * MIB)
    if plan.strategy == "fsdp2":
        # Two blocks, each in a collective's buffer and in a place of its own; embedding and head stay.
        kept = 0 if plan.fsdp.reshard_after_forward else plan.model.depth
        items["gathered"] = h * (max(4, kept) * _block_elements(plan) + _root_elements(plan))
    if pictures := sum(sizes_on_gpu(plan)):
        items["pictures"] = pictures
    if plan.strategy == "zero3":
        # Parameters that stay gathered at the turn from forward to backward.
        items["gathered"] = h * min(p, plan.zero.max_reuse_distance_elements // 2 + plan.zero.prefetch_bucket_elements)
    return items


def _gradient_bytes(plan: Plan, h: int) -> int:
    p, n = plan.parameters, plan.world_size
    if plan.strategy == "fsdp2":  # the share, and whole gradients of embedding and head and of a block, twice
        return h * math.ceil(p / n) + 2 * h * (_root_elements(plan) + _block_elements(plan))
    if plan.strategy in ("zero2", "zero3"):
        return (0 if plan.offload != "none" else h * math.ceil(p / n)) + h * min(p, plan.zero.reduce_bucket_elements)
    return h * p


def _block_elements(plan: Plan) -> int:
    """Of one block: parameters whose names hold a block's number."""
    shapes = plan.model.parameter_shapes().items()
    in_blocks = sum(math.prod(shape) for name, shape in shapes if any(part.isdigit() for part in name.split(".")))
    return in_blocks // plan.model.depth


def _root_elements(plan: Plan) -> int:
    """Of what is in no block."""
    return plan.parameters - plan.model.depth * _block_elements(plan)


def _activation_bytes(plan: Plan, h: int) -> int:
    saved = plan.model.saved_elements_per_sample(plan.activation_checkpointing_every)
    if plan.activation_checkpointing_every and plan.recomputation != "full":
        # Half is less than any of the ways between drops.
        saved = max(saved, plan.model.saved_elements_per_sample(0) // 2)
    return plan.micro_batch * h * saved


def _logit_bytes(plan: Plan, h: int) -> int:
    """Logits in the compute type and in fp32, and the fp32 gradient of the softmax."""
    return plan.micro_batch * plan.model.logits_per_sample * (h + 4 + 4)
