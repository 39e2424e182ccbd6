"""What DeepSpeed 0.19.8 allocates on the GPU under ZeRO-1 and 2. Mirrors ``runtime/zero/stage_1_and_2.py``.

N ranks; h bytes of the compute type; B elements of a reduce bucket. The tests compare it with the real optimizer,
allocation by allocation, on gloo.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from .plan import Plan
from .template import BlockEvent, ModuleEvent
from .timeline import MAIN, REDUCE, Ledger
from .zero_memory import alloc_states, optimizer_groups, pinned_bytes

#: Of the gradients that were copied for the host because they are larger than a bucket, those whose copies the reducing
#: stream has not passed yet (2 H200s: 5 of 12 and 16 of 45; docs/experiments.md). It lags behind the host, which only
#: starts the work. PyTorch waits for it where memory is short.
LAGGING_SHARE = 0.36


class _Group:
    """One optimizer group: flat, padded to a multiple of 2 N elements, cut into N partitions."""

    def __init__(self, members: dict[str, int], world_size: int) -> None:
        self.members = members
        self.part = 2 * math.ceil(sum(members.values()) / (2 * world_size))
        self.starts: dict[str, int] = {}
        position = 0
        for name, elements in members.items():
            self.starts[name] = position
            position += elements

    def pieces(self, name: str) -> Iterator[tuple[int, int]]:
        """(rank, elements) of the partitions that a parameter lies in."""
        start, stop = self.starts[name], self.starts[name] + self.members[name]
        while start < stop:
            rank = start // self.part
            end = min(stop, (rank + 1) * self.part)
            yield rank, end - start
            start = end

    def touching(self, rank: int) -> dict[str, int]:
        """Parameters with elements in a rank's partition -> how many."""
        low, high = rank * self.part, (rank + 1) * self.part
        found = {}
        for name, elements in self.members.items():
            start = self.starts[name]
            inside = min(high, start + elements) - max(low, start)
            if inside > 0:
                found[name] = inside
        return found


class Zero2Model:
    """See `timeline.EngineModel`.

    Args:
        rank: None is the last one, which owns the last layers: their gradients come first and so lie beside the most
            activations. Rank 0 owns the first, an embedding among them, for whose gradient the stream that reduces
            takes memory of its own at the end of the backward pass.
        room_bytes: what the GPU has free for PyTorch's allocator. DeepSpeed looks, and flattens through host memory
            where the flat copy does not fit beside the parameters; None: it fits.
    """

    def __init__(
        self, plan: Plan, ledger: Ledger, host: Ledger, room_bytes: int | None = None, rank: int | None = None
    ) -> None:
        self.plan, self.ledger, self.host, self.room_bytes = plan, ledger, host, room_bytes
        self.h = 2 if plan.mixed else 4
        self.stage2 = plan.strategy == "zero2"
        self.offload = plan.offload != "none"
        self.shared = plan.optimizer.master == "bf16"
        #: Gradients are accumulated in a type of their own: ZeRO-2 in a flat fp32 partition, ZeRO-1 a parameter each.
        self.separate = plan.mixed and plan.gradient_dtype == "fp32"
        self.groups = [_Group(members, plan.world_size) for members in optimizer_groups(plan)]
        self.group_of = {name: group for group in self.groups for name in group.members}
        self.rank = plan.world_size - 1 if rank is None else rank
        self.own = {name: size for group in self.groups for name, size in group.touching(self.rank).items()}
        self.stream = REDUCE if plan.zero.overlap_comm else MAIN
        self.bucket: list[str] = []
        self.bucket_elements = 0
        self.filled = False
        #: Parameters whose gradient is an allocation of its own.
        self.whole: set[str] = set()
        self.micro_step, self.last = 0, True
        #: Numbers of copies that were freed and are still used, and how many copies there were in the pass.
        self.lagging: list[int] = []
        self.copies = 0

    def init(self) -> None:
        """Flatten group after group, then cut out the fp32 master; states are made when they are loaded."""
        ledger, h = self.ledger, self.h
        for group in self.groups:
            for name, elements in group.members.items():
                ledger.alloc(("parameter", name), h * elements, "parameters")
        for index, group in enumerate(self.groups):
            ledger.empty_cache()
            flat_bytes = h * group.part * self.plan.world_size
            through_host = self.room_bytes is not None and self.room_bytes - ledger.live_bytes < flat_bytes
            if through_host:
                self.host.alloc("flattening", h * sum(group.members.values()), "loading")
                for name in group.members:
                    ledger.free(("parameter", name))
                ledger.empty_cache()
            ledger.alloc(("flat", index), flat_bytes, "parameters")
            if through_host:
                self.host.free("flattening")
            else:
                for name in group.members:
                    ledger.free(("parameter", name))
            if self.offload or (h == 2 and not self.shared):
                ledger.alloc("clone", h * group.part, "temporaries")
            if self.shared:
                ledger.alloc(("clone", index), h * group.part, "temporaries")
            elif not self.offload:
                ledger.alloc(("master", index), 4 * group.part, "master")
            else:
                self._on_host(("host master", index), 4 * group.part, "host_master")
                if h == 4 and self.plan.device == "cpu":
                    ledger.free("clone")  # it is the master
                ledger.free_if_live("clone")
                self._on_host(("host parameters", index), h * group.part, "host_parameters")
            ledger.free_if_live("clone")
        if self.offload:
            self._init_offload()
            return
        for index, group in enumerate(self.groups):
            ledger.alloc(("zeros", index), (h if self.shared else 4) * group.part, "temporaries")
        for index in range(len(self.groups)):
            ledger.free(("zeros", index))
            ledger.free_if_live(("clone", index))  # the master becomes the partition itself
        for index, group in enumerate(self.groups):
            alloc_states(self.plan, ledger, index, group.part)

    def _init_offload(self) -> None:
        """A staging buffer of the largest parameter on both sides; the fp32 gradient and the moments on the host."""
        staging = self.h * max(max(group.members.values()) for group in self.groups)
        self._on_host("host staging", staging, "host_gradients")
        self.ledger.alloc("staging", staging, "buckets")
        for index, group in enumerate(self.groups):
            self._on_host(("host gradient", index), 4 * group.part, "host_gradients")
        for index, group in enumerate(self.groups):
            alloc_states(self.plan, self.host, index, group.part, "host_")

    def _on_host(self, key: Any, size_bytes: int, item: str) -> None:
        """Made pageable first; page-locked memory is a copy, rounded up to a power of two."""
        if not self.plan.zero.pin_memory:
            self.host.alloc(key, size_bytes, item)
            return
        self.host.alloc("pageable", size_bytes, item)
        self.host.alloc(key, pinned_bytes(size_bytes), item)
        self.host.free("pageable")

    def micro_begin(self, index: int, last: bool) -> None:
        self.micro_step, self.last = index, last
        self._catch_up(0)
        self.copies = 0
        if not self.stage2 and self.separate and index == 0:
            # ZeRO-1's fp32 gradients of other ranks' parameters were views of the buckets until here.
            self._free_buckets()

    def gradient(self, key: Any, parameter: str) -> bool:
        """Into the bucket; what is too large for it waits as it is. ZeRO-1 first accumulates over the window."""
        self._set_up_buckets()
        kept = False
        if not self.stage2:
            kept = self._accumulate(key, parameter)
            if not self.last:
                return kept
        elements = self.group_of[parameter].members[parameter]
        if self.bucket_elements + elements > self.plan.zero.reduce_bucket_elements:
            self._reduce()
        if elements > self.plan.zero.reduce_bucket_elements:
            kept = self._keep_whole(key, parameter, kept)
        elif parameter in self.whole:
            # Accumulated; the copy in the bucket takes over.
            self.whole.remove(parameter)
            self.ledger.free(("gradient", parameter))
        self.bucket.append(parameter)
        self.bucket_elements += elements
        return kept

    def _set_up_buckets(self) -> None:
        if self.filled:
            return
        self.filled = True
        size = 4 if self.separate and not self.stage2 else self.h
        for index in range(2 if self.plan.zero.overlap_comm else 1):
            if not self.ledger.is_live(("bucket", index)):
                self.ledger.alloc(("bucket", index), size * self.plan.zero.reduce_bucket_elements, "buckets")

    def _accumulate(self, key: Any, parameter: str) -> bool:
        """ZeRO-1: the gradient stays with its parameter, in fp32 if it has a type of its own."""
        ledger, fp32_bytes = self.ledger, 4 * self.group_of[parameter].members[parameter]
        if self.separate:
            if parameter in self.whole:
                ledger.temporary(fp32_bytes)
            else:
                self.whole.add(parameter)
                ledger.alloc(("gradient", parameter), fp32_bytes, "gradients")
            return False
        if self.plan.accumulation_steps == 1 or parameter in self.whole:
            return False
        self.whole.add(parameter)
        ledger.keep(key, ("gradient", parameter), "gradients")
        return True

    def _keep_whole(self, key: Any, parameter: str, kept: bool) -> bool:
        """The gradient is not copied; under offload it is cloned, to own its storage."""
        if parameter in self.whole:
            return kept
        self.whole.add(parameter)
        if self.offload:
            size = self.h * self.group_of[parameter].members[parameter]
            self.ledger.alloc(("gradient", parameter), size, "gradients")
            self.copies += 1
            return False
        self.ledger.keep(key, ("gradient", parameter), "gradients")
        return True

    def _reduce(self) -> None:
        """Average the bucket and hand out its slices."""
        if not self.bucket:
            return
        if self.separate:
            self._fp32_partitions()
        for elements, slices in self._messages():
            self._message(elements, slices)
        for parameter in self.bucket:
            self._hand_out(parameter)
        self.bucket.clear()
        self.bucket_elements = 0

    def _fp32_partitions(self) -> None:
        """The flat fp32 gradient of each partition that the bucket reaches is made when it is first reached."""
        for index, group in enumerate(self.groups):
            reached = any(name in group.members and name in self.own for name in self.bucket)
            if reached and not self.ledger.is_live(("partition", index)):
                self.ledger.alloc(("partition", index), 4 * group.part, "gradients", self.stream)

    def _messages(self) -> Iterator[tuple[int, int]]:
        """(elements, slices) of each all-reduce: neighbours with one destination are one slice."""
        slices: list[tuple[int, int]] = []
        for name in self.bucket:
            for rank, elements in self.group_of[name].pieces(name):
                mine = self.separate and rank == self.rank
                if slices and slices[-1][0] == rank and not mine:
                    slices[-1] = (rank, slices[-1][1] + elements)
                else:
                    slices.append((rank, elements))
        count = total = 0
        for _, elements in slices:
            count, total = count + 1, total + elements
            if total > self.plan.zero.reduce_bucket_elements:
                yield total, count
                count = total = 0
        if count:
            yield total, count

    def _message(self, elements: int, slices: int) -> None:
        """Several slices are copied together; another type of communication takes another copy."""
        size = 4 if self.separate and not self.stage2 else self.h
        if slices > 1:
            self.ledger.alloc("message", size * elements, "buckets", self.stream)
        if self.separate and self.stage2:
            self.ledger.temporary(4 * elements, "buckets", self.stream)
        self.ledger.free_if_live("message")

    def _hand_out(self, parameter: str) -> None:
        """Own gradients are copied out of the bucket; of others only ZeRO-1 keeps what was not copied."""
        if parameter not in self.own:
            if self.stage2:
                self._drop(parameter)
            return
        if self.offload:
            self._to_host(parameter)
        elif self.separate:
            if not self.stage2:
                self._drop(parameter)
        else:
            if not self.ledger.is_live(("own", self._window_part())):
                size = self.h * sum(self.group_of[name].members[name] for name in self.own)
                self.ledger.alloc(("own", self._window_part()), size, "gradients", self.stream)
            self._drop(parameter)

    def _window_part(self) -> int:
        """ZeRO-2 reduces in every micro-step of a window, ZeRO-1 once."""
        return self.micro_step if self.stage2 else 0

    def _to_host(self, parameter: str) -> None:
        """At the window's end: the norm in fp64, an fp32 copy for the transfer."""
        if self.stage2 and not self.separate and not (self.last and self.micro_step == 0):
            # Accumulated on the host, whole parameters.
            size, key = self.h * self.group_of[parameter].members[parameter], ("host accumulated", parameter)
            if not self.host.is_live(key):
                self._on_host(key, size, "host_gradients")
        if not self.last:
            return
        self.ledger.temporary(8 * self.own[parameter], stream=self.stream)
        if self.h == 2 and not self.separate:
            self.ledger.temporary(4 * self.own[parameter], stream=self.stream)
        self._drop(parameter)

    def _drop(self, parameter: str) -> None:
        if parameter not in self.whole:
            return
        self.whole.remove(parameter)
        if self.offload and self.stream != MAIN:
            self.lagging.append(self.ledger.release(("gradient", parameter)))
            self._catch_up(math.ceil(LAGGING_SHARE * self.copies))
        else:
            self.ledger.free(("gradient", parameter))

    def _catch_up(self, left: int) -> None:
        """The reducing stream passes all but the last copies."""
        while len(self.lagging) > left:
            self.ledger.passed(self.lagging.pop(0))

    def module(self, event: ModuleEvent) -> None:
        """Parameters are always there."""

    def block(self, event: BlockEvent) -> None:
        """Parameters are always there."""

    def micro_end(self) -> None:
        """Reduce the rest, let go of the buckets; from the second micro-step on add to the window's gradient."""
        if not self.stage2 and not self.last:
            return
        self._reduce()
        if self._window_part() > 0:
            self.ledger.free_if_live(("own", self._window_part()))
        for parameter in tuple(self.whole):
            self._drop(parameter)
        if self.separate and not self.stage2 and self.plan.world_size > 1:
            self.filled = False
            return
        self._free_buckets()

    def _free_buckets(self) -> None:
        self.filled = False
        for index in (0, 1):
            self.ledger.free_if_live(("bucket", index))

    def step(self) -> None:
        """The norm of each own slice in fp64; then group after group: flatten, an fp32 copy, AdamW."""
        if self.offload:
            for index in range(len(self.groups)):
                self.ledger.free_if_live(("partition", index))
            return
        for elements in self.own.values():
            self.ledger.temporary(8 * elements)
        for index, group in enumerate(self.groups):
            if self.separate:
                self.ledger.free_if_live(("partition", index))
                continue
            if self.h == 4:
                self._fp32_gradient(index, group)
                continue
            self.ledger.alloc("flat gradient", self.h * group.part, "temporaries")
            if not self.shared:
                self.ledger.alloc("fp32 gradient", 4 * group.part, "temporaries")
                self.ledger.free("flat gradient")
            self._let_go(index)
            self.ledger.free("flat gradient" if self.shared else "fp32 gradient")

    def _fp32_gradient(self, index: int, group: _Group) -> None:
        self.ledger.alloc("fp32 gradient", 4 * group.part, "temporaries")
        self._let_go(index)
        self.ledger.free("fp32 gradient")

    def _let_go(self, index: int) -> None:
        """The window's gradients of all groups are one allocation: it goes with the last group."""
        if index == len(self.groups) - 1:
            self.ledger.free_if_live(("own", 0))
