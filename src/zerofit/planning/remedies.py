"""For a candidate that does not fit: the nearest changes that would make it fit, each tried, not guessed. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator

from ..config.optimizers import LOW_BIT_KINDS, why_not
from .batch import BatchSplit
from .candidates import LOW_BIT, Builder, Candidate, Checkpointing, Rung, describe_states
from .plan import Plan, ZeroPlan
from .sizes import GIB

#: Numbers of GPUs that people have.
GPU_COUNTS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)


def remedies(builder: Builder, missed: Candidate) -> tuple[str, ...]:
    """``fits at micro-batch 2``, ``fits with every block checkpointed``, ``fits on 6 GPUs``, …: nearest first."""
    found = list(_smaller(builder, missed))
    found += list(_on_host(builder, missed.plan))
    found += list(_low_bit(builder, missed.plan))
    found += list(_more_gpus(builder, missed.plan))
    return (*found, *_more_room(missed))


def roomier(builder: Builder, squeezed: Candidate) -> tuple[str, ...]:
    """For a candidate that fits only when PyTorch gives back its reserve: what makes it fit without; at most one."""
    ways = tuple(_on_host(builder, squeezed.plan)) or tuple(_more_room(squeezed))
    return tuple(f"without that it {way}" for way in ways)


def _fits(builder: Builder, plan: Plan) -> bool:
    return builder.candidate(plan).fits


def _smaller(builder: Builder, missed: Candidate) -> Iterator[str]:
    """A smaller micro-batch, recomputation, or both: what a fixed wish ruled out."""
    plan = missed.plan
    micro = _micro_batch_that_fits(builder, plan)
    if micro:
        yield f"fits at micro-batch {micro}"
    recomputed = plan.model_copy(update={"activation_checkpointing_every": 1, "recomputation": "full"})
    if recomputed == plan:
        return
    if _fits(builder, recomputed):
        yield "fits with every block checkpointed"
    elif not micro:
        micro = _micro_batch_that_fits(builder, recomputed)
        if micro:
            yield f"fits at micro-batch {micro} with every block checkpointed"


def _micro_batch_that_fits(builder: Builder, plan: Plan) -> int | None:
    """The largest smaller micro-batch that fits, same batch of the rank; None when not even one sample does."""
    samples = plan.micro_batch * plan.accumulation_steps
    changed = [
        plan.model_copy(update={"micro_batch": m, "accumulation_steps": samples // m})
        for m in range(1, plan.micro_batch)
        if samples % m == 0
    ]
    # bisect wants the fitting ones last: from the largest micro-batch to the smallest.
    changed.reverse()
    index = bisect_left(changed, True, key=lambda smaller: _fits(builder, smaller))
    return changed[index].micro_batch if index < len(changed) else None


def _on_host(builder: Builder, plan: Plan) -> Iterator[str]:
    """Recomputed blocks whose inputs wait in host memory."""
    if builder.device != "cuda" or plan.activation_offload == "cpu" or not plan.model.inputs_to_host:
        return
    way = plan.recomputation if plan.activation_checkpointing_every == 1 else "full"
    moved = {"activation_offload": "cpu", "activation_checkpointing_every": 1, "recomputation": way}
    if _fits(builder, plan.model_copy(update=moved)):
        more = "" if plan.activation_checkpointing_every == 1 else " --activation-checkpointing full"
        yield f"fits with the blocks' inputs in host memory: --activation-offload cpu{more}"


def _low_bit(builder: Builder, plan: Plan) -> Iterator[str]:
    """The least lossy smaller states that fit."""
    optimizer = plan.optimizer
    for state, master in LOW_BIT[1:]:
        if (state, master) == (optimizer.state, optimizer.master):
            continue
        if why_not(optimizer.kind, state, master, plan.strategy, plan.offload) or optimizer.kind not in LOW_BIT_KINDS:
            return
        if master == "bf16" and (plan.precision != "bf16" or plan.gradient_dtype == "fp32"):
            return
        smaller = optimizer.model_copy(update={"state": state, "master": master})
        if _fits(builder, plan.model_copy(update={"optimizer": smaller})):
            flags = f"--optimizer.state {state}" + (f" --optimizer.master {master}" if master == "bf16" else "")
            yield f"fits with {describe_states(smaller)}: {flags}"
            return


def _more_gpus(builder: Builder, plan: Plan) -> Iterator[str]:
    """The fewest GPUs over which the shards are small enough; nothing for what is not sharded."""
    if not plan.strategy.startswith(("zero", "fsdp")) or builder.device != "cuda":
        return
    samples = plan.global_batch
    wider = [_over(builder, plan, n) for n in GPU_COUNTS if n > plan.world_size and samples % n == 0]
    index = bisect_left(wider, True, key=lambda changed: _fits(builder, changed))
    if index < len(wider):
        yield f"fits on {wider[index].world_size} GPUs"


def _over(builder: Builder, plan: Plan, ranks: int) -> Plan:
    """The plan over more ranks, its global batch kept. Further GPUs may be in further nodes, with their own memory."""
    rung = Rung(plan.strategy, plan.offload, plan.offload_parameters)
    samples = plan.global_batch // ranks
    micro = max(m for m in range(1, plan.micro_batch + 1) if samples % m == 0)
    tight = plan.zero.prefetch_bucket_elements < ZeroPlan().prefetch_bucket_elements
    checkpointing = Checkpointing(plan.activation_checkpointing_every, plan.recomputation)
    changed = builder.plan(rung, BatchSplit(micro, samples // micro, ranks), checkpointing, tight)
    return changed.model_copy(update={"ranks_per_node": min(ranks, plan.ranks_per_node or ranks)})


def _more_room(missed: Candidate) -> Iterator[str]:
    """What the machine would have to have; always true, and last."""
    for need in missed.needs:
        if not need.met:
            yield f"fits with {math.ceil(need.needed_bytes / need.share / GIB)} GiB of {need.what}"
