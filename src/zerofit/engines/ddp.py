"""Single and data-parallel training with PyTorch alone.

DDP reduces gradients in the compute dtype, overlapped with the backward pass; masters and moments are whole on every
rank (`flat_optimizer`). ``gradient_dtype: fp32`` accumulates and reduces in fp32 instead, after the backward pass.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import TrainingFailed
from ..models.base import ModelSpec, named_unique_parameters
from ..planning.plan import Plan
from ..types import Batch, Fragment, PendingStep, PendingSums, Reader, Scalars, World
from . import common
from .buffers import Buffers
from .cuda_graphs import RecordedPasses
from .flat_optimizer import FlatOptimizer
from .frozen import Frozen
from .loss_scale import LossScaler


class DDPEngine:
    """See `engines.base.Engine`. With a world of one it is the strategy ``single``: no process group is used.

    A plan's frozen phase runs here under every strategy (`Plan.frozen_phase`).
    """

    def __init__(self, plan: Plan, spec: ModelSpec[Any], world: World) -> None:
        self.plan, self.world = plan, world
        self.held, self.inputs = common.HeldUpdates(), common.Inputs(world.device)
        self.model = common.build_model(plan, spec, world.device)
        common.compile_units(plan, spec, self.model)
        self.parameters = named_unique_parameters(self.model)
        self.fp32_gradients = self._accumulate_in_fp32() if plan.mixed and plan.gradient_dtype == "fp32" else None
        self.optimizer = FlatOptimizer(
            self.parameters, lambda name: spec.decays(plan.model, name), plan.optimizer, self._gradient_of
        )
        # After the optimizer: where it updates the parameters themselves, it moves them into its flat master.
        self.replica: nn.Module = self.model
        if world.world_size > 1 and self.fp32_gradients is None:
            # It warns of 1 x 1 convolutions' weights, whose two layouts are the same bytes in the same order.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
            device_ids = [world.device.index] if world.device.type == "cuda" else None
            self.replica = DistributedDataParallel(
                self.model,
                device_ids=device_ids,
                gradient_as_bucket_view=True,
                init_sync=False,
                **each_rank_its_own_buffers(DistributedDataParallel),
            )
        self.frozen = Frozen(plan, self.model, world)
        self.buffers = Buffers(self.model, world, plan.optimizer.ema_decay, self.frozen.tensors)
        self.recorded = RecordedPasses(self._passes, self.parameters) if plan.cuda_graphs else None
        self.scaler = LossScaler(plan.loss_scale, plan.precision == "fp16", world.device)

    def train_step(self, window: Sequence[Batch], lr: float, step: int, wishes: int = 0) -> PendingStep:
        common.seed_step(self.plan, step, self.world.rank)
        self.buffers.change()
        agreed = common.open_step(window, wishes, self.world)
        factor = common.loss_factor(agreed, self.world)
        loss_sum = torch.zeros((), device=self.world.device)
        for index, batch in enumerate(window):
            with self._communication(last=index == len(window) - 1):
                inputs, scaled = self.inputs(batch, training=True), (factor * self.scaler.scale).float()
                loss_sum += (
                    self._passes(inputs, scaled) if self.recorded is None else self.recorded(inputs, scaled, index)
                )
        grad_norm, skipped, scale = self._apply(lr)
        self.buffers.settle(skipped, self.optimizer.steps)
        return common.close_step(agreed, loss_sum, grad_norm, skipped, scale, self.world)

    def _passes(self, inputs: dict[str, Tensor], factor: Tensor) -> Tensor:
        """Forward and backward; the loss."""
        loss: Tensor = self.replica(**inputs)["loss"]
        (loss * factor).backward()
        return loss.detach()

    def _communication(self, last: bool) -> Any:
        """Gradients are reduced in the last backward pass of a window only."""
        if isinstance(self.replica, DistributedDataParallel) and not last:
            return self.replica.no_sync()
        return nullcontext()

    def _apply(self, lr: float) -> tuple[Tensor, Tensor, Tensor]:
        """Clip and step. Returns the unscaled norm, whether the step was skipped, and the scale it ran under."""
        if self.fp32_gradients is not None and self.world.world_size > 1:
            dist.all_reduce(self.fp32_gradients)
            self.fp32_gradients /= self.world.world_size
        self.held.release()
        outcome = self.optimizer.clip_and_step(lr, self.optimizer.gradient_norm(), self.scaler)
        if self.fp32_gradients is not None:
            self.fp32_gradients.zero_()
        else:
            self.model.zero_grad(set_to_none=True)
        return outcome

    def _accumulate_in_fp32(self) -> Tensor:
        """One flat fp32 gradient; each half-precision gradient is added to it and freed as soon as it is made."""
        flat = torch.zeros(sum(p.numel() for p in self.parameters.values()), device=self.world.device)
        self._fp32_views: dict[nn.Parameter, Tensor] = {}
        offset = 0
        for parameter in self.parameters.values():
            self._fp32_views[parameter] = flat[offset : offset + parameter.numel()].view(parameter.shape)
            offset += parameter.numel()

            def add(p: Tensor, view: Tensor = self._fp32_views[parameter]) -> None:
                if p.grad is not None:
                    view.add_(p.grad)
                    p.grad = None

            parameter.register_post_accumulate_grad_hook(add)
        return flat

    def _gradient_of(self, parameter: nn.Parameter) -> Tensor | None:
        return parameter.grad if self.fp32_gradients is None else self._fp32_views[parameter]

    def eval_step(self, window: Sequence[Batch], *, compiled: bool = True) -> PendingSums:
        self.buffers.average()
        return common.evaluate_window(self.model, window, self.world, self.inputs, compiled=compiled)

    def predict(self, batch: Batch) -> Tensor:
        self.buffers.average()
        return common.predict(self.model, batch, self.inputs)

    def fragments(self) -> Iterator[Fragment]:
        own = self.optimizer.fragments(self.world.rank, self.world.world_size)
        return chain(self.buffers.fragments(), self.frozen.fragments(), own)

    def hold_updates(self, wait: Callable[[], None]) -> None:
        self.held.hold(wait)

    def scalars(self) -> Scalars:
        own = {"optimizer_steps": self.optimizer.applied_steps}
        return {**own, **self.scaler.scalars()} if self.scaler.enabled else own

    def load(self, read: Reader, scalars: Scalars | None = None) -> None:
        scalars = scalars or {}
        try:
            self.optimizer.load(read, scalars.get("optimizer_steps", 0.0))
        except KeyError as missing:
            raise TrainingFailed(f"parameter {missing} was asked for and its source does not hold it") from None
        self.frozen.load(read)
        self.buffers.load(read)
        self.scaler.load(scalars)

    def memory(self) -> Mapping[str, int]:
        copy = sum(p.nbytes for p in self.parameters.values())
        items = {
            "parameters": self.optimizer.parameter_bytes or copy,
            **self.optimizer.memory(),
            **self.buffers.memory(),
            **self.frozen.memory(),
        }
        if self.fp32_gradients is not None:
            items["gradients"] = self.fp32_gradients.nbytes
        elif self.recorded is not None:
            items["gradients"] = self.recorded.gradient_bytes()
        elif isinstance(self.replica, DistributedDataParallel):
            items["gradients"] = _bucket_bytes(self.replica)
        return items

    def close(self) -> None:
        self.replica, self.recorded = self.model, None


def each_rank_its_own_buffers(replica: Callable[..., nn.Module]) -> dict[str, Any]:
    """DDP's argument that keeps it from copying rank 0's buffers to all before each forward pass (see `buffers`).

    torch 2.13 has renamed it, and warns of the older name. The newer one leaves the copy at the start alone, which
    ``init_sync=False`` turns off.
    """
    names = inspect.signature(replica).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


def _bucket_bytes(replica: DistributedDataParallel) -> int:
    """Bytes of DDP's gradient buckets, which live as long as the replica."""
    sizes = str(replica._get_ddp_logging_data().get("bucket_sizes", ""))
    return sum(int(size) for size in sizes.split(",") if size.strip())
