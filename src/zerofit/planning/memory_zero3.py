"""What DeepSpeed 0.19.8 allocates on the GPU under ZeRO-3. Mirrors ``runtime/zero/stage3.py``,
``partitioned_param_coordinator.py`` and ``partition_parameters.py``.

N ranks; h bytes of the compute type; g bytes of the gradient type. Every parameter of n elements is cut into N parts
of ceil(n / N). The tests compare it with the real optimizer, allocation by allocation, on gloo.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from .plan import Plan
from .template import BlockEvent, ModuleEvent
from .timeline import GATHER, MAIN, REDUCE, Ledger, parameter_elements
from .zero_memory import alloc_states, pinned_bytes, sub_groups, zero_state_bytes

#: In a set, whose order Python does not promise, DeepSpeed's parameters follow their construction.
NEVER = -(10**10)


class Zero3Model:
    """See `timeline.EngineModel`. All ranks allocate the same."""

    def __init__(self, plan: Plan, ledger: Ledger, host: Ledger, modules: Sequence[ModuleEvent]) -> None:
        self.plan, self.ledger, self.host = plan, ledger, host
        self.h = 2 if plan.mixed else 4
        self.g = 4 if plan.gradient_dtype == "fp32" else self.h
        self.elements = parameter_elements(plan)
        self.offload = plan.offload != "none"
        self.offload_parameters = plan.offload_parameters != "none"
        self.shared = plan.optimizer.master == "bf16"
        self.gather = _Coordinator(plan, ledger, self.elements, modules)
        self.bucket: list[str] = []
        self.bucket_elements = 0
        self.whole: set[str] = set()
        self.micro_step, self.last = 0, True

    def _part(self, name: str) -> int:
        return math.ceil(self.elements[name] / self.plan.world_size)

    def init(self) -> None:
        """Parameters are cut as soon as they are made; then one flat buffer, fp32 masters, bucket, gradients."""
        ledger, h = self.ledger, self.h
        for name, elements in self.elements.items():
            ledger.alloc(("whole", name), h * elements, "temporaries")
            if not self.offload_parameters:
                ledger.alloc(("part", name), h * self._part(name), "parameters")
            ledger.free(("whole", name))
        total = sum(self._part(name) for name in self.elements)
        if not self.offload_parameters:
            self._defragment(h * total)
        self._masters()
        ledger.alloc("bucket", self.g * self.plan.zero.reduce_bucket_elements, "buckets")
        if not self.offload:
            ledger.alloc("gradients", self.g * total, "gradients")
        self._moments()
        self._on_host()
        self.gather.gather_persistent()

    def _defragment(self, size_bytes: int) -> None:
        """The parts move into one buffer, on a GPU by way of the host."""
        if self.plan.device == "cpu":
            self.ledger.alloc("parts", size_bytes, "parameters")
        for name in self.elements:
            self.ledger.free(("part", name))
        if self.plan.device == "cuda":
            self.ledger.empty_cache()
            self.ledger.alloc("parts", size_bytes, "parameters")

    def _masters(self) -> None:
        """Per sub-group an fp32 copy, cloned; the copy lives until the next one replaces it."""
        if self.offload:
            return
        before = None
        sizes = self._sub_group_parts()
        for index, part in enumerate(sizes):
            if self.shared:
                self.ledger.alloc(("copy", index), self.h * part, "temporaries")
                continue
            if self.h == 2:
                self.ledger.alloc(("copy", index), 4 * part, "temporaries")
                if before is not None:
                    self.ledger.free(before)
                before = ("copy", index)
            self.ledger.alloc(("master", index), 4 * part, "master")
        if before is not None:
            self.ledger.free(before)
        self.ledger.temporary((self.h if self.shared else 4) * max(sizes))

    def _sub_group_parts(self) -> list[int]:
        """Elements of each sub-group on one rank."""
        return [sum(math.ceil(n / self.plan.world_size) for n in group) for group in sub_groups(self.plan)]

    def _moments(self) -> None:
        for index, part in enumerate(self._sub_group_parts()):
            self.ledger.free_if_live(("copy", index))  # a bf16 master becomes the partition itself
            if not self.offload:
                alloc_states(self.plan, self.ledger, index, part)

    def _on_host(self) -> None:
        """What `zero_memory` says; page-locked blocks are one an item and sub-group, rounded up."""
        blocks = max(len(self._sub_group_parts()), 1)
        for name, size_bytes in zero_state_bytes(self.plan).items():
            if not name.startswith("host_"):
                continue
            pinned = self.plan.zero.pin_memory and name != "host_moments"
            size = blocks * pinned_bytes(math.ceil(size_bytes / blocks)) if pinned else size_bytes
            self.host.alloc(name, size, name)

    def micro_begin(self, index: int, last: bool) -> None:
        self.micro_step, self.last = index, last
        self.gather.begin_step()

    def gradient(self, key: Any, parameter: str) -> bool:
        """Into the bucket; what does not fit in an empty one waits as it is."""
        elements, limit = self.elements[parameter], self.plan.zero.reduce_bucket_elements
        if self.bucket_elements + elements > limit and self.bucket_elements > 0:
            self._reduce()
        fits = self.bucket_elements + elements <= limit
        self.bucket.append(parameter)
        self.bucket_elements += elements
        if fits:
            return False
        self.whole.add(parameter)
        self.ledger.keep(key, ("gradient", parameter), "gradients")
        return True

    def _reduce(self) -> None:
        """Reduce-scatter the bucket: interleaved by rank in a copy, unless it is one parameter that divides."""
        if not self.bucket:
            return
        ledger, n = self.ledger, self.plan.world_size
        if self.g != self.h:
            for name in self.whole:  # what lies in the bucket has its type already
                ledger.alloc(("converted", name), self.g * self.elements[name], "buckets", REDUCE)
        alone = len(self.bucket) == 1 and self.elements[self.bucket[0]] % n == 0
        if not alone:
            ledger.alloc("message", self.g * n * sum(map(self._part, self.bucket)), "buckets", REDUCE)
        if self.offload:
            self._to_host()
        ledger.free_if_live("message")
        for name in self.bucket:
            ledger.free_if_live(("converted", name))
            ledger.free_if_live(("gradient", name))
        self.whole.difference_update(self.bucket)
        self.bucket.clear()
        self.bucket_elements = 0

    def _to_host(self) -> None:
        """The host's gradient comes to the GPU, is added to, and goes back; at the window's end as fp32."""
        on_gpu = self.plan.device == "cuda"
        for name in self.bucket:
            part = self._part(name)
            if on_gpu:
                self.ledger.alloc(("accumulated", name), self.g * part, "temporaries", REDUCE)
            if self.last:
                self.ledger.temporary(8 * part, stream=REDUCE)
                if self.g != 4:
                    self.ledger.temporary(4 * part, stream=REDUCE)
        for name in self.bucket:
            self.ledger.free_if_live(("accumulated", name))

    def module(self, event: ModuleEvent) -> None:
        """Gather before a module's passes, let go after them."""
        if event.when.endswith("+"):
            self.gather.fetch(event.parameters)
        else:
            self.gather.release(event.parameters)

    def block(self, event: BlockEvent) -> None:
        """DeepSpeed's hooks are on modules that own parameters."""

    def micro_end(self) -> None:
        self._reduce()

    def step(self) -> None:
        """Let go of what is gathered; norms in fp64; per sub-group a flat gradient, its fp32 copy, AdamW."""
        self.gather.release_all()
        if not self.offload:
            for name in self.elements:
                self.ledger.temporary(8 * self._part(name))
            for part, group in zip(self._sub_group_parts(), sub_groups(self.plan), strict=True):
                self._step_sub_group(part, len(group))
        self.gather.gather_persistent()

    def _step_sub_group(self, part: int, members: int) -> None:
        if members > 1:
            self.ledger.alloc("flat gradient", self.g * part, "temporaries")
        if self.g != 4 and not self.shared:
            self.ledger.alloc("fp32 gradient", 4 * part, "temporaries")
            self.ledger.free_if_live("flat gradient")
        self.ledger.free_if_live("fp32 gradient")
        self.ledger.free_if_live("flat gradient")


class _Coordinator:
    """Which parameters are gathered: ``PartitionedParameterCoordinator`` once it knows the order of modules."""

    def __init__(self, plan: Plan, ledger: Ledger, elements: dict[str, int], modules: Sequence[ModuleEvent]) -> None:
        self.plan, self.ledger, self.elements = plan, ledger, elements
        self.h = 2 if plan.mixed else 4
        self.order = [event.parameters for event in modules if event.when.endswith("+")]
        self.index = {name: index for index, name in enumerate(elements)}
        self.offload_parameters = plan.offload_parameters != "none"
        threshold = plan.zero.persistence_threshold_elements
        self.persistent = [name for name, n in elements.items() if n <= threshold]
        self.available: set[str] = set()
        self.in_flight: dict[str, Any] = {}
        self.members: dict[Any, set[str]] = {}
        #: Modules that are using a parameter; the one that is recomputed counts once.
        self.active: dict[str, set[tuple[str, ...]]] = {name: set() for name in elements}
        self.gathers = 0
        self.queue: deque[tuple[str, int]] = deque()
        self.uses = [
            (name, step) for step, names in enumerate(self.order) for name in sorted(names, key=self.index.__getitem__)
        ]
        self.fetched_for: dict[str, int] = {}
        self.step_id = self.available_elements = 0
        self.prefetch = 0 if plan.offload_parameters == "nvme" else plan.zero.prefetch_bucket_elements
        self.reuse = 0 if plan.offload_parameters == "nvme" else plan.zero.max_reuse_distance_elements
        #: Elements of the modules before each step, and the steps of each parameter.
        self.passed = [0]
        self.steps_of: dict[str, list[int]] = {name: [] for name in elements}
        for step, names in enumerate(self.order):
            self.passed.append(self.passed[-1] + sum(elements[name] for name in names))
            for name in names:
                self.steps_of[name].append(step)

    @property
    def whole_already(self) -> bool:
        """On one rank the part is the parameter, unless it lies on the other side of the PCIe bus."""
        return self.plan.world_size == 1 and (not self.offload_parameters or self.plan.device == "cpu")

    def gather_persistent(self) -> None:
        """Small parameters stay whole on every rank."""
        for name in self.persistent:
            if name not in self.available:
                self._make_available(name, padded=False)

    def release_all(self) -> None:
        for name in sorted(self.available, key=self.index.__getitem__):
            self.ledger.free_if_live(("gathered", name))
        self.available.clear()
        for users in self.active.values():
            users.clear()

    def begin_step(self) -> None:
        """Before a forward pass: the queue starts over."""
        self.queue = deque(self.uses)
        self.fetched_for = {}
        self.step_id = self.available_elements = 0

    def fetch(self, names: tuple[str, ...]) -> None:
        """Gather what the module needs, start gathering what comes after, wait for the first."""
        self._gather([n for n in names if n not in self.available and n not in self.in_flight])
        for name in names:
            self.active[name].add(names)
            if name in self.in_flight:
                self._wait(name)
        fresh = {name for name in names if self.fetched_for.get(name, NEVER) < self.step_id}
        dropped: set[str] = set()
        while self.queue and len(dropped) < len(fresh):
            name, step = self.queue.popleft()
            self.fetched_for[name] = step
            dropped.add(name)
        self._prefetch()
        self.step_id += 1

    def _prefetch(self) -> None:
        limit = min(self.plan.zero.max_live_elements - self.available_elements, self.prefetch)
        wanted: list[str] = []
        elements = 0
        while self.prefetch and self.queue and elements < limit:
            name, step = self.queue.popleft()
            self.fetched_for[name] = max(self.fetched_for.get(name, NEVER), step)
            if name not in self.available and name not in self.in_flight and name not in wanted:
                wanted.append(name)
                elements += self.elements[name]
        self._gather(wanted)

    def _gather(self, names: Iterable[str]) -> None:
        """Start an all-gather: one parameter straight into its place, several into a flat buffer."""
        names = list(names)
        if not names:
            return
        self.gathers += 1
        self.available_elements += sum(self.elements[name] for name in names)
        parts = [math.ceil(self.elements[name] / self.plan.world_size) for name in names]
        if len(names) > 1 and not self.whole_already:
            flat = self.h * self.plan.world_size * sum(parts)
            self.ledger.alloc(("flat", self.gathers), flat, "gathered", GATHER)
        elif not self.whole_already:
            self._make_available(names[0], padded=True, stream=GATHER)
            self.available.discard(names[0])
        if self.offload_parameters and self.plan.device == "cuda":
            self.ledger.temporary(self.h * sum(parts), "gathered", GATHER)
        self.members[self.gathers] = set(names)
        for name in names:
            self.in_flight[name] = self.gathers

    def _wait(self, name: str) -> None:
        """The whole all-gather is unpacked with its first parameter; its buffer goes with its last one."""
        number = self.in_flight.pop(name)
        waiting = self.members[number]
        for member in sorted(waiting, key=self.index.__getitem__):
            if member not in self.available:
                self._make_available(member, padded=False, stream=GATHER)
        waiting.discard(name)
        if not waiting:
            self.ledger.free_if_live(("flat", number))
            del self.members[number]

    def _make_available(self, name: str, padded: bool, stream: int = MAIN) -> None:
        self.available.add(name)
        if self.whole_already or self.ledger.is_live(("gathered", name)):
            return
        n = self.plan.world_size
        elements = n * math.ceil(self.elements[name] / n) if padded else self.elements[name]
        item = "parameters" if name in self.persistent else "gathered"
        self.ledger.alloc(("gathered", name), self.h * elements, item, stream)

    def release(self, names: tuple[str, ...]) -> None:
        """Let go of the module's parameters that are not used again soon."""
        for name in names:
            self.active[name].discard(names)
            if self.active[name] or name not in self.available or name in self.persistent:
                continue
            if self.fetched_for.get(name, NEVER) > self.step_id or self._reused_soon(name):
                continue
            self.available.discard(name)
            self.available_elements -= self.elements[name]
            self.ledger.free_if_live(("gathered", name))

    def _reused_soon(self, name: str) -> bool:
        """True when a following module uses the parameter before `reuse` elements of others have passed."""
        steps = self.steps_of[name]
        index = bisect_left(steps, self.step_id)
        return index < len(steps) and self.passed[steps[index]] - self.passed[self.step_id] < self.reuse
