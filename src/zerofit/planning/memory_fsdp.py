"""What `engines.fsdp` and PyTorch's FSDP2 allocate. Mirrors that file and ``torch/distributed/fsdp/_fully_shard``
(``_fsdp_param_group.py``, ``_fsdp_collectives.py``; torch 2.11 to 2.13).

N ranks; h bytes of the compute type; g bytes of the type in which gradients are reduced. Rows of a parameter are cut
into N pieces of ceil(rows / N); collectives move equal pieces, so that padded sizes count. A group is a block, or all
that is in no block. Gathering takes a buffer for the collective and, for each parameter, a place of its own; in a
forward pass the buffer lives until the next group's has arrived, and the next group's is asked for before the group
computes. Reducing takes a padded copy of the group's whole gradients, which lives until the next group reduces, and the
reduced share, which becomes the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .memory_replicated import CHUNK_ELEMENTS, has_copy
from .optimizer_states import (
    StateGroup,
    decaying,
    flat_elements,
    gathers_gradients,
    master_bytes,
    mean_bytes,
    state_groups,
)
from .plan import Plan
from .template import BlockEvent, ModuleEvent, StepEvent
from .timeline import GATHER, MAIN, REDUCE, Ledger

#: Name of the group of what is in no block.
ROOT = ""


class FSDPModel:
    """See `timeline.EngineModel`. One rank, the one whose model states are the largest."""

    def __init__(self, plan: Plan, ledger: Ledger, events: Sequence[StepEvent]) -> None:
        self.plan, self.ledger = plan, ledger
        self.h = 2 if plan.mixed else 4
        self.fp32_gradients = plan.mixed and plan.gradient_dtype == "fp32"
        self.g = 4 if self.fp32_gradients else self.h
        self.kept = not plan.fsdp.reshard_after_forward
        self.rank = busiest_rank(plan)
        self.shapes = plan.model.parameter_shapes()
        #: Blocks as their forward passes come; names of each group's parameters.
        self.blocks = [e.name for e in events if type(e) is BlockEvent and e.when == "f+" and e.name != ROOT]
        self.members = self._members()
        self.group_of = {name: group for group, members in self.members.items() for name in members}
        self.gathered: set[str] = set()
        #: The buffer of the last all-gather of a forward pass; that of the reduce-scatter before.
        self.forward_buffer: Any = None
        self.reduce_input: Any = None
        self.waiting: dict[str, list[Any]] = {}
        self.with_gradient: set[str] = set()

    def _members(self) -> dict[str, list[str]]:
        members: dict[str, list[str]] = {name: [] for name in (ROOT, *self.blocks)}
        prefixes = {name + ".": name for name in self.blocks}
        for parameter in self.shapes:
            cut = [parameter[: i + 1] for i, letter in enumerate(parameter) if letter == "."]
            members[next((prefixes[prefix] for prefix in cut if prefix in prefixes), ROOT)].append(parameter)
        return members

    def _padded(self, parameter: str) -> int:
        """Elements of the piece that every rank sends."""
        return _piece(self.shapes[parameter], self.plan.world_size)

    def _pieces(self, group: str) -> int:
        return sum(self._padded(name) for name in self.members[group])

    def init(self) -> None:
        """This rank's rows, then per optimizer group master, means and average; rows of the master's type become its
        views."""
        ledger, plan, optimizer = self.ledger, self.plan, self.plan.optimizer
        rows = {name: rows_held(shape, self.rank, plan.world_size) for name, shape in self.shapes.items()}
        for name, elements in rows.items():
            ledger.alloc(("rows", name), self.h * elements, "parameters")
        for index, group in enumerate(shard_groups(plan, self.rank)):
            flat = flat_elements(optimizer, group)
            item = "master" if has_copy(plan) else "parameters"
            ledger.alloc(("master", index), master_bytes(plan) * flat, item)
            for number, size in enumerate(mean_bytes(optimizer, group.kind, flat)):
                ledger.alloc(("moment", index, number), size, "moments")
            if optimizer.ema_decay is not None:
                ledger.alloc(("ema", index), 4 * flat, "ema")
            if not has_copy(plan):
                for name in group.members:
                    ledger.free(("rows", name))
        for name, elements in rows.items():
            if elements < self._padded(name):  # FSDP2 gathers from a padded copy
                ledger.alloc(("padded", name), self.h * self._padded(name), "parameters")
                ledger.free_if_live(("rows", name))
        if self.fp32_gradients:
            ledger.alloc("gradients", 4 * sum(rows.values()), "gradients")

    def micro_begin(self, index: int, last: bool) -> None:
        """Gathering begins with the model's own forward pass."""

    def module(self, event: ModuleEvent) -> None:
        """Groups are blocks."""

    def block(self, event: BlockEvent) -> None:
        """Hooks of `fully_shard` around a block, or around the model."""
        {"f+": self._before, "f-": self._after, "b+": self._before_backward, "b-": self._after_backward}[event.when](
            event.name
        )

    def _start_gather(self, group: str) -> None:
        """The all-gather's output, of which this rank's input is a part."""
        if group not in self.gathered and not self.ledger.is_live(("buffer", group)):
            self.ledger.alloc(
                ("buffer", group), self.h * self.plan.world_size * self._pieces(group), "gathered", GATHER
            )

    def _copy_out(self, group: str) -> None:
        for name in self.members[group]:
            size = self.h * self.plan.world_size * self._padded(name)
            self.ledger.alloc(("whole", name), size, "gathered", MAIN)
        self.gathered.add(group)

    def _let_go(self, group: str) -> None:
        if group in self.gathered:
            for name in self.members[group]:
                self.ledger.free(("whole", name))
            self.gathered.remove(group)

    def _before(self, group: str) -> None:
        """The previous buffer goes when this group has arrived; then the next group's all-gather begins."""
        if group not in self.gathered:
            self._start_gather(group)
            if self.forward_buffer is not None:
                self.ledger.free(self.forward_buffer)
            self._copy_out(group)
            self.forward_buffer = ("buffer", group)
        following = self._block_after(group)
        if following is not None:
            self._start_gather(following)

    def _after(self, group: str) -> None:
        if group != ROOT and not self.kept:
            self._let_go(group)
        if group == ROOT and self.forward_buffer is not None:
            self.ledger.free(self.forward_buffer)
            self.forward_buffer = None

    def _before_backward(self, group: str) -> None:
        """Wait for this group, start gathering the one that comes next."""
        if group not in self.gathered:
            self._start_gather(group)
            self._copy_out(group)
            self.ledger.free(("buffer", group))
        following = self.blocks[-1] if group == ROOT else self._block_before(group)
        if following is not None:
            self._start_gather(following)

    def _block_after(self, group: str) -> str | None:
        index = -1 if group == ROOT else self.blocks.index(group)
        return self.blocks[index + 1] if index + 1 < len(self.blocks) else None

    def _block_before(self, group: str) -> str | None:
        index = self.blocks.index(group)
        return self.blocks[index - 1] if index else None

    def gradient(self, key: Any, parameter: str) -> bool:
        """Whole gradients wait until their group is done."""
        self.ledger.keep(key, ("gradient", parameter), "gradients")
        self.waiting.setdefault(self.group_of[parameter], []).append(("gradient", parameter))
        return True

    def _after_backward(self, group: str) -> None:
        """Let go of the parameters; copy the gradients into the collective's input; reduce."""
        ledger = self.ledger
        self._let_go(group)
        if self.reduce_input is not None:
            ledger.free(self.reduce_input)
        self.reduce_input = ("reduce input", group)
        ledger.alloc(self.reduce_input, self.g * self.plan.world_size * self._pieces(group), "buckets")
        for key in self.waiting.pop(group, []):
            ledger.free(key)
        self._reduced(group)
        if group == ROOT:
            ledger.free(self.reduce_input)
            self.reduce_input = None

    def _reduced(self, group: str) -> None:
        """The first share of a window stays as the gradient, later ones are added to it."""
        ledger, pieces = self.ledger, self._pieces(group)
        ledger.alloc("reduced", self.g * pieces, "gradients", REDUCE)
        if self.fp32_gradients:
            ledger.free_if_live("reduced in fp32")
            ledger.keep("reduced", "reduced in fp32", "gradients")
            ledger.temporary(self.h * pieces, "gradients", REDUCE)
        elif group in self.with_gradient:
            ledger.free("reduced")
        else:
            self.with_gradient.add(group)
            ledger.keep("reduced", ("share", group), "gradients")

    def micro_end(self) -> None:
        """The last group has reduced already."""

    def step(self) -> None:
        """Where gradients are gathered, one chunk of them in fp32 as scratch; then the gradients go."""
        self.ledger.free_if_live("reduced in fp32")
        if gathers_gradients(self.plan.optimizer.kind, self.plan.device):
            largest = max(flat_elements(self.plan.optimizer, group) for group in shard_groups(self.plan, self.rank))
            self.ledger.temporary(4 * min(largest, CHUNK_ELEMENTS))
        for group in self.with_gradient:
            self.ledger.free(("share", group))
        self.with_gradient.clear()


def _piece(shape: Sequence[int], ranks: int) -> int:
    """Elements of ceil(rows / N) rows."""
    return math.ceil(shape[0] / ranks) * math.prod(shape[1:])


def rows_held(shape: Sequence[int], rank: int, ranks: int) -> int:
    """Elements of the rows that a rank holds: the last ranks may hold fewer."""
    piece, row = math.ceil(shape[0] / ranks), math.prod(shape[1:])
    return max(0, min(piece, shape[0] - rank * piece)) * row


def shard_groups(plan: Plan, rank: int) -> list[StateGroup]:
    """The optimizer's groups over a rank's rows; a parameter of which it holds none is in no group."""
    local, decays = {}, decaying(plan)
    for name, shape in plan.model.parameter_shapes().items():
        held = rows_held(shape, rank, plan.world_size)
        if held:
            local[name] = (held // math.prod(shape[1:]), *shape[1:])
    return state_groups(plan.optimizer.kind, local, decays)


def busiest_rank(plan: Plan) -> int:
    """The rank whose model states are the largest: the first, or, where the shards are the masters, one that pads (of
    many ranks the last)."""
    if has_copy(plan):
        return 0
    n = plan.world_size
    candidates = range(n) if n <= 64 else (0, n - 1)
    return max(candidates, key=lambda rank: (sum(_rank_bytes(plan, rank).values()), -rank))


def fsdp_state_bytes(plan: Plan) -> dict[str, int]:
    """Compute copy hP/N, masters 4P/N (unless the compute copy is the master), moments 8P/N (AdamW in fp32); fp32
    gradients 4P/N. On the busiest rank."""
    return _rank_bytes(plan, busiest_rank(plan))


def _rank_bytes(plan: Plan, rank: int) -> dict[str, int]:
    n, h, optimizer = plan.world_size, 2 if plan.mixed else 4, plan.optimizer
    groups = [(group, flat_elements(optimizer, group)) for group in shard_groups(plan, rank)]
    flat = sum(elements for _, elements in groups)
    rows = padded = copies = 0
    for shape in plan.model.parameter_shapes().values():
        held, piece = rows_held(shape, rank, n), _piece(shape, n)
        rows, padded, copies = rows + held, padded + piece, copies + (piece if held < piece else 0)
    # With a copy the optimizer writes into what FSDP2 gathers from; without, FSDP2 has a copy where it pads.
    parameters = h * padded if has_copy(plan) else master_bytes(plan) * flat + h * copies
    moments = sum(sum(mean_bytes(optimizer, group.kind, elements)) for group, elements in groups)
    items = {"parameters": parameters, "moments": moments}
    if has_copy(plan):
        items["master"] = 4 * flat
    if optimizer.ema_decay is not None:
        items["ema"] = 4 * flat
    if plan.mixed and plan.gradient_dtype == "fp32":
        items["gradients"] = 4 * rows
    return items
