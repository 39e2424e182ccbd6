"""What `engines.ddp` allocates: single and DDP, with `engines.adamw`. Mirrors those two files.

P parameters, h bytes of the compute type. Masters and moments are flat, one of each per optimizer group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .plan import Plan
from .template import ModuleEvent
from .timeline import Ledger, parameter_elements
from .zero_memory import optimizer_groups

#: `engines.adamw.CHUNK_ELEMENTS`: fp32 gradients exist in chunks of at most so many elements.
CHUNK_ELEMENTS = 32 * 1024 * 1024
#: DDP's buckets: the first small, so that reduction starts early.
FIRST_BUCKET_BYTES, BUCKET_BYTES = 1024**2, 25 * 1024**2


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

    def init(self) -> None:
        """Parameters, then per group three flat fp32 tensors; in fp32 the parameters then become views of one."""
        ledger = self.ledger
        for name, elements in self.elements.items():
            ledger.alloc(("parameter", name), self.compute_bytes * elements, "parameters")
        if self.fp32_gradients:
            ledger.alloc("gradients", 4 * self.plan.parameters, "gradients")
        for index, members in enumerate(optimizer_groups(self.plan)):
            flat = 4 * sum(members.values())
            ledger.alloc(("master", index), flat, "master" if self.plan.mixed else "parameters")
            for moment in (0, 1):
                ledger.alloc(("moment", index, moment), flat, "moments")
            if not self.plan.mixed:
                for name in members:
                    ledger.free(("parameter", name))
        if self.buckets:
            for index, size_bytes in enumerate(self._bucket_bytes()):
                ledger.alloc(("bucket", index), size_bytes, "gradients")

    def _bucket_bytes(self) -> Iterator[int]:
        """Filled in the order of gradients, which is about the reverse of construction."""
        filled, limit = 0, FIRST_BUCKET_BYTES
        for elements in reversed(self.elements.values()):
            filled += self.compute_bytes * elements
            if filled >= limit:
                yield filled
                filled, limit = 0, BUCKET_BYTES
        if filled:
            yield filled

    def micro_begin(self, index: int, last: bool) -> None:
        self.last = last

    def gradient(self, key: Any, parameter: str) -> bool:
        """The first gradient of a window stays, and later ones are added to it.

        DDP's buckets take over in the last micro-step: until then (``no_sync``) gradients live beside the buckets.
        """
        if self.fp32_gradients:
            return False
        if self.buckets and self.last:
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

    def micro_end(self) -> None:
        """Reduction happens in the buckets."""

    def step(self) -> None:
        """One chunk of fp32 gradients as scratch; then the gradients go."""
        largest = max(sum(members.values()) for members in optimizer_groups(self.plan))
        self.ledger.temporary(4 * min(largest, CHUNK_ELEMENTS))
        for parameter in self.kept:
            self.ledger.free(("gradient", parameter))
        self.kept.clear()
