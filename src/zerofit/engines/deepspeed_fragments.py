"""Where DeepSpeed's ZeRO optimizers keep fp32 masters and moments, as intervals of named parameters.

DeepSpeed flattens parameters into groups and gives each rank a padded partition of each. ZeRO-1 and 2 cut the flat
group, ZeRO-3 cuts every parameter; here both become `Partition`, so that reading and writing are written once. Read in
DeepSpeed 0.19.8: ``utils/tensor_fragment.py``, ``runtime/zero/stage_1_and_2.py``, ``runtime/zero/stage3.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import TrainingFailed
from ..kernels.optimizer_step import Moment
from ..types import Fragment, Reader
from .decoding import in_fp32, is_coded
from .flat_optimizer import average_weight

#: Low-bit states are read and written in pieces of at most so many elements.
CHUNK_ELEMENTS = 32 * 1024 * 1024
#: Parameter -> canonical name.
Names = Mapping[Any, str]
#: (applied steps, master, its state) -> None: makes the optimizer's state.
Begin = Callable[[float, Tensor, dict[str, Any]], None]


@dataclass(frozen=True)
class Slot:
    """``length`` elements of parameter `name` from `start` on; they lie at `offset` of the flat partition."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    offset: int


class Partition:
    """A flat master of this rank with its means, and what lies where. Padding has no slot.

    Args:
        slots: disjoint intervals.
        roles: of the means, and ``ema`` where an average of the weights is kept.
        master: 1-D fp32 or bf16; holds no elements while it is swapped out.
        state: what the optimizer keeps for `master`; empty until the first `load`.
    """

    swaps = False

    def __init__(
        self, slots: Sequence[Slot], roles: Sequence[str], master: nn.Parameter, state: dict[str, Any]
    ) -> None:
        self.slots, self.roles, self.master, self.state = slots, roles, master, state

    @contextmanager
    def opened(self, write: bool) -> Iterator[None]:
        """Inside, master and moments are in memory; `write` keeps what was changed."""
        yield

    def refresh(self) -> None:
        """Copy the master to this rank's share of the compute copy; call it inside `opened`."""

    def states(self) -> dict[str, Tensor | Moment]:
        """Role -> flat state, inside `opened`."""
        return {"parameter": self.master.detach(), **{role: self.state[role] for role in self.roles}}

    def fragments(self) -> Iterator[Fragment]:
        """Every slot in every role: views of the engine's memory, or copies of what was swapped in, or, a piece at a
        time, of what is low-bit."""
        with self.opened(write=False):
            for role, flat in self.states().items():
                temporary = self.swaps or is_coded(flat)
                intervals = ((slot, slot.offset, slot.offset + slot.length) for slot in self.slots)
                for slot, offset, data in in_fp32(flat, intervals):
                    data = data.clone() if self.swaps else data
                    yield Fragment(slot.name, role, slot.shape, slot.start + offset, data, temporary)

    @torch.no_grad()
    def load(self, read: Reader, steps: float, begin: Begin) -> None:
        """Take master and means from `read` (missing means are 0, a missing average is the weights) and refresh the
        compute copy.

        Raises:
            TrainingFailed: the source lacks a parameter.
        """
        with self.opened(write=True):
            begin(steps, self.master, self.state)
            if "ema" in self.roles and "ema" not in self.state:
                self.state["ema"] = torch.zeros_like(self.master, dtype=torch.float32, requires_grad=False)
            for role, flat in self.states().items():
                if isinstance(flat, Moment) and flat.scales is not None:
                    self._load_blocks(flat, role, read)
                    continue
                values = flat.values if isinstance(flat, Moment) else flat
                values.zero_()
                self._fill(values, 0, role, read)
            self.refresh()

    def _fill(self, target: Tensor, start: int, role: str, read: Reader) -> None:
        """What belongs into the interval of the flat state that begins at `start`."""
        stop = start + target.numel()
        for slot in self.slots:
            low, high = max(start, slot.offset), min(stop, slot.offset + slot.length)
            if low >= high:
                continue
            first, last = (slot.start + edge - slot.offset for edge in (low, high))
            values = read(slot.name, role, first, last)
            if values is None and role == "ema":
                values = read(slot.name, "parameter", first, last)
            if values is not None:
                target[low - start : high - start].copy_(values)
            elif role == "parameter":
                raise TrainingFailed(f"Parameter {slot.name} was asked for, and its source does not hold it.")

    def _load_blocks(self, flat: Moment, role: str, read: Reader) -> None:
        elements = flat.values.numel()
        flat.clear()
        if all(read(slot.name, role, slot.start, slot.start + 1) is None for slot in self.slots):
            return  # a fresh optimizer
        for start in range(0, elements, CHUNK_ELEMENTS):
            buffer = torch.zeros(min(CHUNK_ELEMENTS, elements - start), device=flat.values.device)
            self._fill(buffer, start, role, read)
            flat.write(start, buffer)

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Let the weights' average follow an applied step."""
        steps = torch.as_tensor(self.state["step"], dtype=torch.float32, device=self.master.device)
        self.state["ema"].lerp_(self.master.float(), average_weight(steps, decay))


class _ShardedPartition(Partition):
    """One sub-group of ZeRO-3; may be swapped to NVMe."""

    def __init__(self, optimizer: Any, index: int, slots: Sequence[Slot], roles: Sequence[str]) -> None:
        master = optimizer.fp32_partitioned_groups_flat[index]
        super().__init__(slots, roles, master, optimizer.optimizer.state[master])
        self.optimizer, self.index = optimizer, index
        self.swaps = optimizer._swappable_optimizer_subgroup(index)

    @contextmanager
    def opened(self, write: bool) -> Iterator[None]:
        if self.swaps:
            self.optimizer._optimizer_states_and_gradient_swap_in(self.index)
        try:
            yield
        except BaseException:  # a reader that gives up, a disk that is full: the buffers are needed again
            if self.swaps:
                self.optimizer._release_swap_buffers(self.index)
            raise
        if self.swaps and write:
            self.optimizer._optimizer_states_and_gradient_swap_out(self.index)
        elif self.swaps:
            self.optimizer._release_swap_buffers(self.index)

    def refresh(self) -> None:
        self.optimizer._reassign_or_swap_out_partitioned_parameters(self.index)


class ReplicatedLayout:
    """ZeRO-1 and 2: every rank holds the whole compute copy, in flat groups that are cut into equal partitions."""

    def __init__(self, optimizer: Any, names: Names, roles: Sequence[str]) -> None:
        self.optimizer, self.masters_are_shared = optimizer, False
        self.partitions = [
            Partition(_replicated_slots(parameters, names), roles, master, optimizer.optimizer.state[master])
            for parameters, master in zip(
                optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True
            )
        ]

    def share_masters(self) -> None:
        """bf16 masters become this rank's part of the compute copy itself: DeepSpeed has made a copy of it."""
        zero, self.masters_are_shared = self.optimizer, True
        for index, partition in enumerate(self.partitions):
            rank = dist.get_rank(group=zero.real_dp_process_group[index])
            partition.master.data = zero.parallel_partitioned_bit16_groups[index][rank].data
            for parameter in zero.bit16_groups[index]:
                if (mapping := parameter._hp_mapping) is not None:
                    address = mapping.hp_fragment_address
                    mapping.hp_fragment = partition.master.data.narrow(0, address.start, address.numel)

    def prepare_load(self) -> None:
        """Nothing is in the way."""

    def finish_load(self) -> None:
        """Every rank's share of the compute copy to every rank. Collective."""
        self.optimizer.update_lp_params()

    def memory(self) -> dict[str, int]:
        """Bytes by item; see `planning.zero_memory`."""
        zero = self.optimizer
        items = {"parameters": _bytes(zero.bit16_groups_flat)}
        if not zero.cpu_offload:
            return items | _state_bytes(self.partitions, shared=self.masters_are_shared)
        gradients = [master.grad for master in zero.single_partition_of_fp32_groups]
        gradients += [*zero.accumulated_grads_in_cpu.values(), zero.temp_grad_buffer_for_cpu_offload]
        return items | {
            "buckets": zero.temp_grad_buffer_for_gpu_offload.nbytes,
            "host_parameters": _bytes(zero.param_buffer_of_bit16_for_cpu_offload_groups),
            "host_gradients": _bytes(gradients),
            **_state_bytes(self.partitions, "host_"),
        }


def _replicated_slots(parameters: Iterable[nn.Parameter], names: Names) -> list[Slot]:
    slots = []
    for parameter in parameters:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:  # None: another rank's
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            slots.append(Slot(names[parameter], tuple(parameter.shape), low.start, low.numel, high.start))
    return slots


class ShardedLayout:
    """ZeRO-3: every parameter is cut into ``world_size`` equal parts, the last one padded."""

    def __init__(self, optimizer: Any, names: Names, roles: Sequence[str], rank: int) -> None:
        self.optimizer, self.names, self.masters_are_shared = optimizer, names, False
        self.partitions = [
            _ShardedPartition(optimizer, index, _sharded_slots(parameters, names, rank), roles)
            for index, parameters in enumerate(optimizer.fp16_groups)
        ]

    def share_masters(self) -> None:
        """bf16 masters become the partitions of the compute copy themselves: DeepSpeed has made a copy of them."""
        self.masters_are_shared = True
        for partition, part in zip(self.partitions, self.optimizer.fp16_partitioned_groups_flat, strict=True):
            partition.master.data = part.data

    def prepare_load(self) -> None:
        """Let go of gathered parameters: they would outlive the new values. Collective."""
        self.optimizer._partition_all_parameters()

    def finish_load(self) -> None:
        """Gather the small parameters that stay whole on every rank. Collective."""
        persistent = self.optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def memory(self) -> dict[str, int]:
        """Bytes by item; see `planning.zero_memory`."""
        zero = self.optimizer
        where = "host_" if zero.offload_optimizer else ""
        gradients = [p.master.grad for p in self.partitions if p.master.grad is not None]
        items = {
            "parameters": _bytes(p for p in self.names if p.data_ptr() != p.ds_tensor.data_ptr()),
            "buckets": _bytes(bucket.buffer for bucket in zero.ipg_buckets.values()),
            f"{where}gradients": _bytes([zero.grad_partitions_flat_buffer, *gradients]),
            **_state_bytes(self.partitions, where, shared=self.masters_are_shared),
        }
        if zero.offload_param:
            items["host_parameters"] = _bytes(p.ds_tensor for p in self.names if p.ds_tensor.status.name == "AVAILABLE")
        else:
            items["parameters"] += zero.lp_param_buffer.nbytes
        pools = _bytes(self._swap_pools())
        return items | ({"host_buckets": pools} if pools else {})

    def _swap_pools(self) -> Iterator[Tensor]:
        if self.optimizer.swap_optimizer:
            yield from self.optimizer.optimizer_swapper.swap_buffer_manager.all_buffers
        swapper = next(iter(self.names)).nvme_swapper
        if swapper is not None:
            yield from (swapper.buffers, swapper.partitioned_swap_buffer)


def _sharded_slots(parameters: Iterable[Any], names: Names, rank: int) -> list[Slot]:
    slots, offset = [], 0
    for parameter in parameters:
        elements = parameter.partition_numel()
        start = min(rank * elements, parameter.ds_numel)
        length = min(elements, parameter.ds_numel - start)
        if length:
            slots.append(Slot(names[parameter], tuple(parameter.ds_shape), start, length, offset))
        offset += elements
    return slots


def _state_bytes(partitions: Sequence[Partition], where: str = "", *, shared: bool = False) -> dict[str, int]:
    items = {} if shared else {f"{where}master": _bytes(p.master for p in partitions)}
    items[f"{where}moments"] = _bytes(p.state[role] for p in partitions for role in p.roles if role != "ema")
    if "ema" in partitions[0].roles:
        items[f"{where}ema"] = _bytes(p.state["ema"] for p in partitions)
    return items


def _bytes(tensors: Iterable[Tensor | Moment]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
