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
from torch import Tensor, nn

from ..errors import TrainingFailed
from ..types import Fragment, Reader

MOMENTS = ("exp_avg", "exp_avg_sq")
#: Parameter -> canonical name.
Names = Mapping[Any, str]
#: Applied steps -> what the optimizer counts them with (a tensor or an int) for a master.
Counter = Callable[[float, Tensor], Any]


@dataclass(frozen=True)
class Slot:
    """``length`` elements of parameter `name` from `start` on; they lie at `offset` of the flat partition."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    offset: int


class Partition:
    """A flat fp32 master of this rank with its moments, and what lies where. Padding has no slot.

    Args:
        slots: disjoint intervals.
        master: 1-D fp32; holds no elements while it is swapped out.
        state: what the optimizer keeps for `master`; empty until the first `load`.
    """

    swaps = False

    def __init__(self, slots: Sequence[Slot], master: nn.Parameter, state: dict[str, Any]) -> None:
        self.slots, self.master, self.state = slots, master, state

    @contextmanager
    def opened(self, write: bool) -> Iterator[None]:
        """Inside, master and moments are in memory; `write` keeps what was changed."""
        yield

    def refresh(self) -> None:
        """Copy the master to this rank's share of the compute copy; call it inside `opened`."""

    def tensors(self) -> dict[str, Tensor]:
        """Role -> flat tensor, inside `opened`."""
        return {"parameter": self.master.detach(), **{role: self.state[role] for role in MOMENTS}}

    def fragments(self) -> Iterator[Fragment]:
        """Every slot in every role: views of the engine's memory, or copies of what was swapped in."""
        with self.opened(write=False):
            for role, flat in self.tensors().items():
                for slot in self.slots:
                    data = flat[slot.offset : slot.offset + slot.length]
                    yield Fragment(slot.name, role, slot.shape, slot.start, data.clone() if self.swaps else data)

    @torch.no_grad()
    def load(self, read: Reader, steps: float, counter: Counter) -> None:
        """Take master and moments from `read` (missing moments are 0) and refresh the compute copy.

        Raises:
            TrainingFailed: the source lacks a parameter.
        """
        with self.opened(write=True):
            self._make_state(steps, counter)
            for role, flat in self.tensors().items():
                flat.zero_()
                for slot in self.slots:
                    values = read(slot.name, role, slot.start, slot.start + slot.length)
                    if values is not None:
                        flat[slot.offset : slot.offset + slot.length].copy_(values)
                    elif role == "parameter":
                        raise TrainingFailed(f"Parameter {slot.name} was asked for, and its source does not hold it.")
            self.refresh()

    def _make_state(self, steps: float, counter: Counter) -> None:
        """The state that AdamW would make in its first step, so that none need be taken."""
        for role in MOMENTS:
            if role not in self.state:
                self.state[role] = torch.zeros_like(self.master)
        self.state["step"] = counter(steps, self.master)


class _ShardedPartition(Partition):
    """One sub-group of ZeRO-3; may be swapped to NVMe."""

    def __init__(self, optimizer: Any, index: int, slots: Sequence[Slot]) -> None:
        master = optimizer.fp32_partitioned_groups_flat[index]
        super().__init__(slots, master, optimizer.optimizer.state[master])
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

    def __init__(self, optimizer: Any, names: Names) -> None:
        self.optimizer = optimizer
        self.partitions = [
            Partition(_replicated_slots(parameters, names), master, optimizer.optimizer.state[master])
            for parameters, master in zip(
                optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True
            )
        ]

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
            return items | _state_bytes(self.partitions)
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

    def __init__(self, optimizer: Any, names: Names, rank: int) -> None:
        self.optimizer, self.names = optimizer, names
        self.partitions = [
            _ShardedPartition(optimizer, index, _sharded_slots(parameters, names, rank))
            for index, parameters in enumerate(optimizer.fp16_groups)
        ]

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
            **_state_bytes(self.partitions, where),
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


def _state_bytes(partitions: Sequence[Partition], where: str = "") -> dict[str, int]:
    return {
        f"{where}master": _bytes(p.master for p in partitions),
        f"{where}moments": _bytes(p.state[role] for p in partitions for role in MOMENTS),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
