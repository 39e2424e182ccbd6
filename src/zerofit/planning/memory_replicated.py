"""What `engines.ddp` allocates: single and DDP, with `engines.flat_optimizer`. Mirrors those two files.

P parameters, h bytes of the compute type. Masters and moments are flat, one of each per optimizer group.
"""

from __future__ import annotations

import math
from typing import Any

from .optimizer_states import (
    factor_bytes,
    flat_elements,
    gathers_gradients,
    master_bytes,
    mean_bytes,
    planned_groups,
)
from .plan import Plan
from .template import BlockEvent, ModuleEvent
from .timeline import Ledger, parameter_elements

#: `engines.flat_optimizer.CHUNK_ELEMENTS`: gathered fp32 gradients exist in chunks of at most so many elements.
CHUNK_ELEMENTS = 32 * 1024 * 1024
#: DDP's buckets: the first small, so that reduction starts early.
FIRST_BUCKET_BYTES, BUCKET_BYTES = 1024**2, 25 * 1024**2


#: Muon and Adafactor make about so many fp32 tensors of a parameter's size while they update it.
WHOLE_TENSORS = 6


def has_copy(plan: Plan) -> bool:
    """Whether the compute copy lies beside the weights that are updated."""
    return plan.mixed and plan.optimizer.master == "fp32"


class ReplicatedModel:
    """See `timeline.EngineModel`."""

    def __init__(self, plan: Plan, ledger: Ledger) -> None:
        self.plan, self.ledger = plan, ledger
        self.elements = parameter_elements(plan)
        self.compute_bytes = 2 if plan.mixed else 4
        self.fp32_gradients = plan.mixed and plan.gradient_dtype == "fp32"
        self.buckets = plan.world_size > 1 and not self.fp32_gradients
        self.kept: set[str] = set()
        self.last = True
        self.rebuilt = False
        #: In which gradients were finished, of all parameters, in the first reduced backward pass.
        self.order: list[str] = []

    def init(self) -> None:
        """Parameters, then per group master, means and average; parameters of the master's type become its views."""
        ledger = self.ledger
        for name, elements in self.elements.items():
            ledger.alloc(("parameter", name), self.compute_bytes * elements, "parameters")
        if self.fp32_gradients:
            ledger.alloc("gradients", 4 * self.plan.parameters, "gradients")
        optimizer, copies = self.plan.optimizer, has_copy(self.plan)
        for index, group in enumerate(planned_groups(self.plan)):
            flat = flat_elements(optimizer, group)
            ledger.alloc(("master", index), master_bytes(self.plan) * flat, "master" if copies else "parameters")
            for number, size in enumerate([*mean_bytes(optimizer, group.kind, flat), *factor_bytes(group)]):
                ledger.alloc(("moment", index, number), size, "moments")
            if optimizer.ema_decay is not None:
                ledger.alloc(("ema", index), 4 * flat, "ema")
            if not copies:
                for name in group.members:
                    ledger.free(("parameter", name))
        if self.buckets:
            ledger.alloc(("bucket", 0), self.compute_bytes * self.plan.parameters, "gradients")
        if self.buckets and self.plan.compile and self.plan.accumulation_steps > 1:
            # Measured, not explained: a rank may hold DDP's first bucket once more (3 runs of about 20, this kind among
            # them: docs/experiments.md). Counted where a plan without it would have been within its margin and wrong.
            ledger.alloc("gradients again", self.compute_bytes * self.plan.parameters, "gradients")

    def _rebuild_buckets(self) -> None:
        """After its first backward pass DDP replaces its one bucket by many, filled in the order of gradients."""
        self.ledger.free(("bucket", 0))
        filled, count, limit = 0, 0, FIRST_BUCKET_BYTES
        for parameter in self.order:
            filled += self.compute_bytes * self.elements[parameter]
            if filled >= limit:
                self.ledger.alloc(("bucket", count), filled, "gradients")
                filled, count, limit = 0, count + 1, BUCKET_BYTES
        if filled:
            self.ledger.alloc(("bucket", count), filled, "gradients")
        self.rebuilt = True

    def micro_begin(self, index: int, last: bool) -> None:
        self.last = last
        if self.order and not self.rebuilt:
            self._rebuild_buckets()

    def gradient(self, key: Any, parameter: str) -> bool:
        """The first gradient of a window stays, and later ones are added to it.

        DDP's buckets take over in the last micro-step: until then (``no_sync``) gradients live beside the buckets.
        """
        if self.fp32_gradients:
            return False
        if self.buckets and self.last:
            if not self.rebuilt:
                self.order.append(parameter)
            if parameter in self.kept:
                self.kept.remove(parameter)
                self.ledger.free(("gradient", parameter))
            return False
        if parameter in self.kept:
            return False
        self.kept.add(parameter)
        self.ledger.keep(key, ("gradient", parameter), "gradients")
        return True

    def module(self, event: ModuleEvent) -> None:
        """Parameters are always there."""

    def block(self, event: BlockEvent) -> None:
        """Parameters are always there."""

    def micro_end(self) -> None:
        """Reduction happens in the buckets."""

    def step(self) -> None:
        """Where gradients are gathered, one chunk of them in fp32 as scratch; then the gradients go."""
        optimizer, sizes = self.plan.optimizer, []
        for group in planned_groups(self.plan):
            if not gathers_gradients(group.kind, self.plan.device):
                continue
            if group.kind in ("muon", "adafactor"):
                sizes.append(WHOLE_TENSORS * max(math.prod(shape) for shape in group.members.values()))
            else:
                sizes.append(min(flat_elements(optimizer, group), CHUNK_ELEMENTS))
        if sizes:
            self.ledger.temporary(4 * max(sizes))
        for parameter in self.kept:
            self.ledger.free(("gradient", parameter))
        self.kept.clear()


def replicated_state_bytes(plan: Plan) -> dict[str, int]:
    """single, DDP. Parameters hP; moments 8P (AdamW in fp32); half precision adds masters 4P, unless the compute copy
    is the master; an average of the weights 4P; DDP's gradient buckets stay, and a CUDA graph's gradients: hP."""
    p, h, optimizer = plan.parameters, 2 if plan.mixed else 4, plan.optimizer
    groups = planned_groups(plan)
    flat = sum(flat_elements(optimizer, group) for group in groups)
    means = (mean_bytes(optimizer, group.kind, flat_elements(optimizer, group)) for group in groups)
    moments = sum(map(sum, means)) + sum(sum(factor_bytes(group)) for group in groups)
    items = {"parameters": h * p if has_copy(plan) else master_bytes(plan) * flat, "moments": moments}
    if has_copy(plan):
        items["master"] = 4 * flat
    if optimizer.ema_decay is not None:
        items["ema"] = 4 * flat
    if plan.mixed and plan.gradient_dtype == "fp32":
        items["gradients"] = 4 * p
    elif plan.world_size > 1 or plan.cuda_graphs:
        items["gradients"] = h * p
    return items
