"""Fully sharded data parallelism through PyTorch's FSDP2 (``torch.distributed.fsdp.fully_shard``; Zhao et al. 2023).

Every block and the rest of the model is one group: its parameters are gathered in one collective before its passes and
let go after them, its gradients are reduce-scattered in one collective after every backward pass. Each rank holds an
equal share of the rows of every parameter, in the compute dtype, and the fp32 masters and moments of that share
(`flat_optimizer`): with N ranks 2P/N + 4P/N + 8P/N bytes, and 2P/N of gradients within a step; with a bf16 master,
which is the share itself, and 8-bit moments 2P/N + 2.03P/N. With ``gradient_dtype: fp32`` gradients are reduced and
accumulated in fp32, which costs 4P/N more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ..errors import TrainingFailed
from ..models.base import ModelSpec, named_unique_parameters
from ..planning.plan import Plan
from ..types import Batch, Fragment, PendingStep, PendingSums, Reader, Scalars, World
from . import common
from .buffers import Buffers
from .flat_optimizer import FlatOptimizer
from .loss_scale import LossScaler


class FSDPEngine:
    """See `engines.base.Engine`.

    With accumulation, gradients are reduce-scattered in every micro-step, as under ZeRO-2: FSDP2's ``no_sync`` would
    keep them whole on every rank.

    Raises:
        TrainingFailed: a rank would hold no row of any parameter.
    """

    def __init__(self, plan: Plan, spec: ModelSpec[Any], world: World) -> None:
        self.plan, self.world = plan, world
        self.held, self.inputs = common.HeldUpdates(), common.Inputs(world.device)
        self.mesh = init_device_mesh(world.device.type, (world.world_size,))
        self.model = _meta_model(plan, spec, world.device)
        self.compiled = _compile_forwards(plan, spec, self.model)
        _shard(plan, spec, self.model, self.mesh)
        self.shards = _Shards(self.model, self.mesh, world)
        self.fp32_gradients: _Fp32Gradients | None = None
        self.optimizer = FlatOptimizer(
            self.shards.local, lambda name: spec.decays(plan.model, name), plan.optimizer, self._gradient_of, world.rank
        )
        # After the optimizer: where it updates the shards themselves, it moves them into its flat master.
        self.shards.give_to_model()
        if plan.mixed and plan.gradient_dtype == "fp32":
            self.fp32_gradients = _Fp32Gradients(self.model, self.shards)
        self.buffers = Buffers(self.model, world, plan.optimizer.ema_decay)
        self.scaler = LossScaler(plan.loss_scale, plan.precision == "fp16", world.device)

    def train_step(self, window: Sequence[Batch], lr: float, step: int, wishes: int = 0) -> PendingStep:
        common.seed_step(self.plan, step, self.world.rank)
        self.buffers.change()
        agreed = common.open_step(window, wishes, self.world)
        factor = common.loss_factor(agreed, self.world)
        loss_sum = torch.zeros((), device=self.world.device)
        for batch in window:
            loss = self.model(**self.inputs(batch, training=True))["loss"]
            (loss * (factor * self.scaler.scale).float()).backward()
            loss_sum += loss.detach()
        grad_norm, skipped, scale = self._apply(lr)
        self.buffers.settle(skipped, self.optimizer.steps)
        return common.close_step(agreed, loss_sum, grad_norm, skipped, scale, self.world)

    def _apply(self, lr: float) -> tuple[Tensor, Tensor, Tensor]:
        """Clip and step. Returns the unscaled norm, whether the step was skipped, and the scale it ran under."""
        if self.fp32_gradients is not None:
            self.fp32_gradients.finish()
        self.held.release()
        outcome = self.optimizer.clip_and_step(lr, self._gradient_norm(), self.scaler)
        self.shards.refresh()
        if self.fp32_gradients is not None:
            self.fp32_gradients.flat.zero_()
        self.shards.drop_gradients()
        return outcome

    def _gradient_norm(self) -> Tensor:
        """L2 norm over all ranks' shards, a scalar fp32 tensor, the same on every rank. Collective."""
        square = self.optimizer.gradient_norm().double().square()
        dist.all_reduce(square)
        return square.sqrt().float()

    def _gradient_of(self, local: nn.Parameter) -> Tensor | None:
        if self.fp32_gradients is not None:
            return self.fp32_gradients.views[self.shards.names[local]]
        return self.shards.gradient(self.shards.names[local])

    def eval_step(self, window: Sequence[Batch], *, compiled: bool = True) -> PendingSums:
        with nullcontext() if compiled else self._uncompiled():
            self.buffers.average()
            return common.evaluate_window(self.model, window, self.world, self.inputs)

    def predict(self, batch: Batch) -> Tensor:
        with self._uncompiled():  # inputs of any length: each would be compiled anew
            self.buffers.average()
            return common.predict(self.model, batch, self.inputs)

    @contextmanager
    def _uncompiled(self) -> Iterator[None]:
        """Inside, compiled units run as they were written."""
        for unit, (written, _) in self.compiled.items():
            unit.__dict__["forward"] = written
        try:
            yield
        finally:
            for unit, (_, compiled) in self.compiled.items():
                unit.__dict__["forward"] = compiled

    def _reshard(self) -> None:
        """Let go of what a forward pass without a backward pass keeps gathered, before it gets new values."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def fragments(self) -> Iterator[Fragment]:
        return chain(self.buffers.fragments(), self._own_fragments())

    def _own_fragments(self) -> Iterator[Fragment]:
        for fragment in self.optimizer.fragments(0, 1):
            shape, start = self.shards.shapes[fragment.name], self.shards.starts[fragment.name]
            yield replace(fragment, shape=shape, start=start + fragment.start)

    def hold_updates(self, wait: Callable[[], None]) -> None:
        self.held.hold(wait)

    def scalars(self) -> Scalars:
        own = {"optimizer_steps": self.optimizer.applied_steps}
        return {**own, **self.scaler.scalars()} if self.scaler.enabled else own

    def load(self, read: Reader, scalars: Scalars | None = None) -> None:
        """See `engines.base.Engine`; each rank reads the rows that it holds."""
        scalars, starts = scalars or {}, self.shards.starts
        self._reshard()
        try:
            self.optimizer.load(
                lambda name, role, start, stop: read(name, role, starts[name] + start, starts[name] + stop),
                scalars.get("optimizer_steps", 0.0),
            )
        except KeyError as missing:
            raise TrainingFailed(f"parameter {missing} was asked for and its source does not hold it") from None
        self.shards.refresh()
        self.buffers.load(read)
        self.scaler.load(scalars)

    def memory(self) -> Mapping[str, int]:
        """Bytes by item; see `planning.memory_fsdp`."""
        items = {"parameters": self.shards.held_bytes(), **self.optimizer.memory(), **self.buffers.memory()}
        if self.fp32_gradients is not None:
            items["gradients"] = self.fp32_gradients.flat.nbytes
        return items

    def close(self) -> None:
        self._reshard()


def _meta_model(plan: Plan, spec: ModelSpec[Any], device: torch.device) -> nn.Module:
    """The model with parameters that have no memory yet, and its buffers on `device`."""
    model = common.build_model(plan, spec, torch.device("meta"))
    buffers = dict(model.named_buffers())
    if buffers:
        # Their values are made by the constructor. Untouched host memory of parameters costs nothing.
        donor = common.build_model(plan, spec, torch.device("cpu"))
        for name, buffer in donor.named_buffers():
            path, _, attribute = name.rpartition(".")
            model.get_submodule(path)._buffers[attribute] = buffer.to(device)
    return model


def _compile_forwards(plan: Plan, spec: ModelSpec[Any], model: nn.Module) -> dict[nn.Module, Any]:
    """Compile what each unit computes; FSDP2's hooks, which gather and let go, stay around it whatever a version of
    PyTorch makes of hooks in ``Module.compile``. Returns unit -> its forward as it was (a class's, or the module's own:
    timm's models take targets by one), and compiled."""
    if not plan.compile:
        return {}
    mode = None if plan.compile_mode == "default" else plan.compile_mode
    common.allow_kinds(len(spec.blocks(model)))
    compiled = {
        unit: (unit.forward, torch.compile(unit.forward, mode=mode, dynamic=False))
        for unit in spec.compiled_units(model)
    }
    for unit, (_, forward) in compiled.items():
        unit.__dict__["forward"] = forward
    return compiled


def _shard(plan: Plan, spec: ModelSpec[Any], model: nn.Module, mesh: DeviceMesh) -> None:
    """One group a block, and one for the rest, whose parameters stay gathered from forward to backward."""
    # Parameters have the compute dtype already: FSDP2 casts none.
    fp32 = plan.mixed and plan.gradient_dtype == "fp32"
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if fp32 else None, cast_forward_inputs=False)
    for block in spec.blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=plan.fsdp.reshard_after_forward, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    # The next block's all-gather starts before this block computes: left to its own hook it starts when the launching
    # thread gets there, which in a forward pass is hardly ahead of the GPU.
    blocks = list(spec.blocks(model))
    for group, following in zip([model, *blocks], blocks, strict=False):
        assert isinstance(group, FSDPModule)
        assert isinstance(following, FSDPModule)
        group.set_modules_to_forward_prefetch([following])


class _Shards:
    """This rank's rows of every parameter: as plain tensors for the optimizer, as DTensors in the model.

    FSDP2 cuts dimension 0 into N pieces of ceil(rows / N), so that the last ranks may hold less, or nothing; it gathers
    equal pieces, so that those ranks' pieces are padded.

    Attributes:
        local: name -> rows of this rank, for the optimizer; none without elements.
        names: the same backwards.
        shapes: name -> shape of the whole parameter.
        starts: name -> where the rank's rows begin in the flattened whole parameter.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, world: World) -> None:
        self.model, self.mesh = model, mesh
        self.sharded = {name: _sharded(p) for name, p in named_unique_parameters(model).items()}
        self.shapes = {name: tuple(p.shape) for name, p in self.sharded.items()}
        self.starts, self.local = {}, {}
        for name, parameter in self.sharded.items():
            rows, row = parameter.shape[0], math.prod(parameter.shape[1:])
            self.starts[name] = min(world.rank * math.ceil(rows / world.world_size), rows) * row
            part = torch.empty(_local(parameter).shape, dtype=parameter.dtype, device=world.device)
            if part.numel():
                self.local[name] = nn.Parameter(part, requires_grad=parameter.requires_grad)
        if not self.local:
            raise TrainingFailed(
                f"rank {world.rank} of {world.world_size} holds no row of any parameter: FSDP2 shards rows, and this "
                f"model's largest parameter has {max(shape[0] for shape in self.shapes.values())}. Use fewer ranks, or "
                f"strategy zero3, which shards elements."
            )
        self.names = {parameter: name for name, parameter in self.local.items()}
        #: (rows within the optimizer's flat master, FSDP2's padded copy of them).
        self.copies: list[tuple[Tensor, Tensor]] = []
        self._first_addresses = {name: parameter.data_ptr() for name, parameter in self.local.items()}

    def give_to_model(self) -> None:
        """Make `local` the shards that FSDP2 gathers from; where it pads, it holds a copy."""
        replaced = {id(p): self._parameter(name, p) for name, p in self.sharded.items()}
        state = {name: replaced[id(p)] for name, p in self.model.named_parameters(remove_duplicate=False)}
        self.model.load_state_dict(state, strict=False, assign=True)
        self.sharded = {name: _sharded(p) for name, p in named_unique_parameters(self.model).items()}
        for name, local in self.local.items():
            held = _local(self.sharded[name])
            if held.data_ptr() == local.data_ptr():
                continue
            if local.data_ptr() == self._first_addresses[name]:
                local.data = held  # the optimizer writes there
            else:
                self.copies.append((local.data, held))
        self.refresh()

    def _parameter(self, name: str, like: DTensor) -> nn.Parameter:
        none = torch.empty((0, *like.shape[1:]), dtype=like.dtype, device=self.mesh.device_type)
        local = self.local[name].data if name in self.local else none
        whole = DTensor.from_local(
            local, self.mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride()
        )
        return nn.Parameter(whole, requires_grad=like.requires_grad)

    @torch.no_grad()
    def refresh(self) -> None:
        """After the optimizer wrote: padded copies follow."""
        if self.copies:
            torch._foreach_copy_([copy for _, copy in self.copies], [rows for rows, _ in self.copies])

    @torch.no_grad()
    def gradient(self, name: str) -> Tensor | None:
        """This rank's reduced gradient of a parameter; None when it got none."""
        gradient = self.sharded[name].grad
        return None if gradient is None else _local(gradient)

    def drop_gradients(self) -> None:
        for parameter in self.sharded.values():
            parameter.grad = None

    def held_bytes(self) -> int:
        """Of what FSDP2 gathers from, padding included."""
        storages = {s.data_ptr(): s.nbytes() for s in map(_storage, (*self.local.values(), *self.sharded.values()))}
        return sum(storages.values())


class _Fp32Gradients:
    """Gradients that are reduced and accumulated in fp32.

    FSDP2 reduces in fp32 and then rounds to the parameters' dtype. Its hook on the reduced tensor (the group's shards
    one after another) and its hook on each gradient (a view of the rounded tensor, at the same place) let the fp32
    values be added up, and the rounded ones go.

    Attributes:
        flat: 1-D fp32, all local shards.
        views: name -> its part.
    """

    def __init__(self, model: nn.Module, shards: _Shards) -> None:
        sizes = [parameter.numel() for parameter in shards.local.values()]
        device = next(iter(shards.local.values())).device
        self.flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        parts = zip(shards.local.items(), self.flat.split(sizes), strict=True)
        self.views: dict[str, Tensor] = {name: part.view(parameter.shape) for (name, parameter), part in parts}
        self._reduced: Tensor | None = None
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_all_reduce_hook(self._remember)
        for name, sharded in shards.sharded.items():
            sharded.register_post_accumulate_grad_hook(lambda parameter, name=name: self._add(name, parameter))

    def _remember(self, reduced: Tensor) -> None:
        """`reduced` is fp32 and lives in the stream that reduced it; this runs in another one."""
        if reduced.is_cuda:
            reduced.record_stream(torch.cuda.current_stream())
        self._reduced = reduced

    @torch.no_grad()
    def _add(self, name: str, parameter: Any) -> None:
        rounded = _local(parameter.grad)
        parameter.grad = None
        if name in self.views:
            assert self._reduced is not None  # `_remember` ran before, for the whole group
            start = rounded.storage_offset()
            self.views[name].view(-1).add_(self._reduced[start : start + rounded.numel()])

    def finish(self) -> None:
        """After the last backward pass of a window."""
        self._reduced = None


def _sharded(value: Any) -> DTensor:
    if not isinstance(value, DTensor):
        raise TrainingFailed(f"FSDP2 was expected to hold a sharded tensor, and holds a {type(value).__name__}.")
    return value


def _local(value: Any) -> Tensor:
    local: Tensor = _sharded(value).to_local()
    return local


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (_local(tensor) if isinstance(tensor, DTensor) else tensor).untyped_storage()
