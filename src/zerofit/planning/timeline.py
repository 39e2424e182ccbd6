"""One rank's allocations over a run, in order: initialisation, then training steps. Pure.

`Ledger` counts what is live, by item and phase, and keeps the sequence for `allocator`. An `EngineModel` says what an
engine allocates and frees at each moment; `simulate` plays a composed micro-step (see `template`) against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, Protocol

from .allocator import EMPTIED, FREED, RELEASED
from .plan import Plan
from .template import Alloc, Backward, BlockEvent, Free, Gradient, ModuleEvent, StepEvent

#: CUDA streams with memory pools of their own: computing, reducing gradients, gathering parameters, copying what is
#: saved. What a CUDA graph records has its own pool too.
MAIN, REDUCE, GATHER, RECORDED, SAVE, FEED = 0, 1, 2, 3, 4, 5
#: Micro-steps of a longer window that are played: the first, one in the middle, the last.
PLAYED_MICRO_STEPS = 3
#: From the second step on every step repeats the one before.
PLAYED_STEPS = 2


class Ledger:
    """What is live. Sizes are rounded up to `granularity` bytes (512 in PyTorch's CUDA allocator).

    Attributes:
        sequence: ``(number, bytes, stream)`` for an allocation, ``(number, FREED, 0)`` for its end, and so on in order:
            see `allocator.simulate_allocator`.
        peaks: phase -> (bytes, items) at the phase's peak.
        main: the stream that stands for `MAIN`: while a CUDA graph is recorded, `RECORDED`.
    """

    def __init__(self, granularity: int = 1) -> None:
        self.granularity = granularity
        self.live_bytes = 0
        self.items: dict[str, int] = {}
        self.sequence: list[tuple[int, int, int]] = []
        self.peaks: dict[str, tuple[int, dict[str, int]]] = {}
        self.phase = "init"
        self.main = MAIN
        self._live: dict[Any, tuple[int, int, str]] = {}
        self._peak_bytes = -1
        self._count = 0

    def begin(self, phase: str) -> None:
        """Enter a phase; its peak goes on from earlier visits."""
        self.phase = phase
        self._peak_bytes = self.peaks[phase][0] if phase in self.peaks else -1
        self._watch()

    def alloc(self, key: Any, size_bytes: int, item: str, stream: int = MAIN) -> None:
        """Allocate; `key` must not be live."""
        if self.granularity > 1:
            size_bytes = -(-size_bytes // self.granularity) * self.granularity
        assert key not in self._live, key
        self._count += 1
        self._live[key] = (self._count, size_bytes, item)
        self.live_bytes += size_bytes
        self.items[item] = self.items.get(item, 0) + size_bytes
        self.sequence.append((self._count, size_bytes, self.main if stream == MAIN else stream))
        if self.live_bytes > self._peak_bytes:
            self._watch()

    def free(self, key: Any) -> None:
        self.passed(self._end(key))

    def release(self, key: Any) -> int:
        """Free what another stream still uses. Its number, for `passed`."""
        number = self._end(key)
        self.sequence.append((number, RELEASED, 0))
        return number

    def passed(self, number: int) -> None:
        """Nothing uses the allocation of this number any more."""
        self.sequence.append((number, FREED, 0))

    def _end(self, key: Any) -> int:
        number, size_bytes, item = self._live.pop(key)
        self.live_bytes -= size_bytes
        self.items[item] -= size_bytes
        return number

    def free_if_live(self, key: Any) -> None:
        if key in self._live:
            self.free(key)

    def is_live(self, key: Any) -> bool:
        return key in self._live

    def keep(self, key: Any, as_key: Any, item: str) -> None:
        """From now on the allocation is known as `as_key`, and counted under `item`."""
        number, size_bytes, before = self._live.pop(key)
        self.items[before] -= size_bytes
        self.items[item] = self.items.get(item, 0) + size_bytes
        self._live[as_key] = (number, size_bytes, item)

    def empty_cache(self) -> None:
        """The allocator gives whole free segments back to the driver."""
        self.sequence.append((0, EMPTIED, 0))

    def temporary(self, size_bytes: int, item: str = "temporaries", stream: int = MAIN) -> None:
        """Allocated and freed at once."""
        self.alloc("temporary", size_bytes, item, stream)
        self.free("temporary")

    def _watch(self) -> None:
        if self.live_bytes > self._peak_bytes:
            self._peak_bytes = self.live_bytes
            self.peaks[self.phase] = (self.live_bytes, dict(self.items))


class EngineModel(Protocol):
    """What an engine allocates, on one rank; see the engine's own file for where."""

    def init(self) -> None:
        """Construction and loading."""

    def micro_begin(self, index: int, last: bool) -> None:
        """Before a forward pass."""

    def gradient(self, key: Any, parameter: str) -> bool:
        """A gradient is finished; True when the engine keeps the allocation `key` (and will free it itself)."""

    def module(self, event: ModuleEvent) -> None:
        """A module that owns parameters begins or ends a pass."""

    def block(self, event: BlockEvent) -> None:
        """A block, or the whole model, begins or ends a pass."""

    def micro_end(self) -> None:
        """After a backward pass, still in its phase."""

    def step(self) -> None:
        """Clipping and the optimizer's step."""


def simulate(
    plan: Plan,
    ledger: Ledger,
    engine: EngineModel,
    events: Sequence[StepEvent],
    inputs: Sequence[int],
    workspace_bytes: int = 0,
    save: Callable[[], None] | None = None,
) -> None:
    """Play initialisation and `PLAYED_STEPS` steps, with a save after the first.

    Args:
        plan: accumulation.
        ledger: shared with the engine.
        engine: of the plan's strategy.
        events: one micro-step.
        inputs: bytes of each input tensor.
        workspace_bytes: of the matrix library, for each thread that multiplies: one from the first forward pass on,
            one from the first product of a backward pass on, which runs in a thread of its own. Where in the sequence
            it comes matters: it splits a block of the loss and stays there (seen in the allocator's history on H200s).
            With compiled units both are there from the start: what was measured fits that.
        save: plays a save that allocates; None: it allocates nothing.
    """
    ledger.begin("init")
    engine.init()
    ledger.begin("forward")
    if workspace_bytes:
        ledger.alloc(("workspace", "forward"), workspace_bytes, "workspaces")
    first_product = _first_product(events) if workspace_bytes and not plan.compile else None
    if workspace_bytes and plan.compile:
        ledger.alloc(("workspace", "backward"), workspace_bytes, "workspaces")
    micro_steps = min(plan.accumulation_steps, PLAYED_MICRO_STEPS)
    for number in range(PLAYED_STEPS):
        if number == 1 and save is not None:
            save()
        for index in range(micro_steps):
            if first_product is None:
                _micro_step(ledger, engine, events, inputs, index, index == micro_steps - 1)
                continue
            workspace = Alloc(("workspace", "backward"), workspace_bytes, "workspaces")
            once = [*events[: first_product + 1], workspace, *events[first_product + 1 :]]
            _micro_step(ledger, engine, once, inputs, index, index == micro_steps - 1)
            first_product = None
        ledger.begin("step")
        engine.step()
    if plan.cuda_graphs:
        _record(plan, ledger, engine, events, inputs, workspace_bytes)


def _record(
    plan: Plan,
    ledger: Ledger,
    engine: EngineModel,
    events: Sequence[StepEvent],
    inputs: Sequence[int],
    workspace_bytes: int,
) -> None:
    """Recording the graphs of `engines.cuda_graphs`, a step, and an evaluation, which cannot use their memory: without
    gradients two blocks' share of what a forward pass keeps at a time, or its largest tensor."""
    ledger.begin("forward")
    ledger.empty_cache()
    for number, size_bytes in enumerate(inputs):
        ledger.alloc(("recorded input", number), size_bytes, "activations")
    ledger.main = RECORDED
    for direction in ("forward", "backward"):
        ledger.alloc(("recorded workspace", direction), workspace_bytes, "workspaces")
    micro_steps = min(plan.accumulation_steps, 2)
    for index in range(micro_steps):
        _micro_step(ledger, engine, events, inputs, index, index == micro_steps - 1)
    ledger.main = MAIN
    ledger.begin("step")
    engine.step()
    ledger.begin("forward")
    passing = list(takewhile(lambda event: type(event) is not Backward, events))
    freed = {event.key for event in passing if type(event) is Free}
    sizes = {event.key: event.size_bytes for event in passing if type(event) is Alloc}
    kept = sum(size for key, size in sizes.items() if key not in freed)
    ledger.temporary(max(2 * kept // plan.model.depth, *sizes.values()))


def _first_product(events: Sequence[StepEvent]) -> int | None:
    """Index of the allocation of the gradient that the backward pass computes first."""
    start = next((i for i, event in enumerate(events) if type(event) is Backward), len(events))
    key = next((event.key for event in events[start:] if type(event) is Gradient), None)
    places = (i for i, event in enumerate(events[start:], start) if type(event) is Alloc and event.key == key)
    return next(places, None)


def _micro_step(
    ledger: Ledger, engine: EngineModel, events: Sequence[StepEvent], inputs: Sequence[int], index: int, last: bool
) -> None:
    ledger.begin("forward")
    engine.micro_begin(index, last)
    for number, size_bytes in enumerate(inputs):
        ledger.alloc(("input", number), size_bytes, "activations")
    kept = set()
    for event in events:
        if type(event) is Alloc:
            ledger.alloc(*event)
        elif type(event) is Free:
            if event.key not in kept:
                ledger.free(event.key)
        elif type(event) is Gradient:
            if engine.gradient(event.key, event.parameter):
                kept.add(event.key)
        elif type(event) is ModuleEvent:
            engine.module(event)
        elif type(event) is BlockEvent:
            engine.block(event)
        elif type(event) is Backward:
            ledger.begin("backward")
    engine.micro_end()
    for number in range(len(inputs)):
        ledger.free(("input", number))


def parameter_elements(plan: Plan) -> dict[str, int]:
    """Canonical name -> elements."""
    return {name: math.prod(shape) for name, shape in plan.trained_shapes().items()}
