"""What all engines share: building the model, opening and closing a step, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..models.base import ModelSpec
from ..models.freezing import freeze
from ..models.offload import InputOffload
from ..planning.plan import Plan
from ..types import WISHES, Batch, LossSum, Pending, PendingStep, PendingSums, StepResult, World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _NoInitialisation(TorchFunctionMode):
    """Lets constructors allocate, and skips the values of parameters, which `load` would overwrite. Buffers are filled:
    nothing loads those that are in no checkpoint."""

    _FILLS = (Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._FILLS and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def construction(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, modules are built on `device` in `dtype`, uninitialised."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, _NoInitialisation():
            yield
    finally:
        torch.set_default_dtype(before)


def build_model(plan: Plan, spec: ModelSpec[Any], device: torch.device) -> nn.Module:
    """The model in its compute dtype on `device`, uninitialised."""
    with construction(device, DTYPES[plan.precision]):
        model = spec.build(
            plan.model, checkpoint_every=plan.activation_checkpointing_every, recomputation=plan.recomputation
        )
        if plan.frozen:
            freeze(model, plan.trained_shapes())
        if plan.activation_offload == "cpu" and plan.device == "cuda":
            keep_inputs_on_host(spec, model)
        return model


def keep_inputs_on_host(spec: ModelSpec[Any], model: nn.Module) -> None:
    """Blocks that are checkpointed keep their inputs in host memory; see `models.offload`."""
    offload = InputOffload()
    for block in spec.blocks(model):
        vars(block)["input_offload"] = offload


def allow_kinds(kinds: int) -> None:
    """Let ``torch.compile`` make so many versions of one function, trained and evaluated: blocks of one class share
    their code and may all have shapes of their own, and past the limit (8) they would run as written. Where blocks are
    recomputed that ends the run: a version that was compiled is recomputed by code that was not."""
    import torch._dynamo as dynamo

    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(dynamo.config, name, max(getattr(dynamo.config, name), 8 + 2 * kinds))


def compile_units(plan: Plan, spec: ModelSpec[Any], model: nn.Module) -> None:
    """``torch.compile`` each unit in place (names of parameters stay). Outside ``zero.Init``, which patches tensors."""
    if plan.compile:
        allow_kinds(len(spec.blocks(model)))
        for unit in spec.compiled_units(model):
            unit.compile(mode=None if plan.compile_mode == "default" else plan.compile_mode, dynamic=False)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside, compiled units run as they were written: for a batch of another shape than training's.

    Not ``torch.compiler.set_stance``, after which the next step of 48 blocks took 9 ms longer (docs/experiments.md).
    """
    calls = {unit: unit._compiled_call_impl for unit in model.modules() if unit._compiled_call_impl is not None}
    for unit in calls:
        unit._compiled_call_impl = None
    try:
        yield
    finally:
        for unit, call in calls.items():
            unit._compiled_call_impl = call


def seed_step(plan: Plan, step: int, rank: int) -> None:
    """Make everything random in a step (dropout) a function of (seed, step, rank): nothing to save, exact resume."""
    mixed = (plan.seed * 1_000_003 + step) * 1_000_003 + rank
    torch.manual_seed(mixed % (1 << 63))


class Inputs:
    """From a batch to the arguments of the model's ``forward`` on `device`; asynchronous from pinned memory.

    Attributes:
        transform: what a task does there first (decoding, augmentation): ``(inputs, training) -> inputs``. Its
            randomness is a function of its inputs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.transform: Callable[[dict[str, Tensor], bool], dict[str, Tensor]] | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch, *, training: bool) -> dict[str, Tensor]:
        inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.inputs.items()}
        return inputs if self.transform is None else self.transform(inputs, training)


class HeldUpdates:
    """Keeps an optimizer from changing states that somebody is still copying."""

    def __init__(self) -> None:
        self._waits: list[Callable[[], None]] = []

    def hold(self, wait: Callable[[], None]) -> None:
        """`release` will call `wait`, once."""
        self._waits.append(wait)

    def release(self) -> None:
        """Call before every update."""
        while self._waits:
            self._waits.pop()()


def open_step(window: Sequence[Batch], wishes: int, world: World) -> Tensor:
    """Agree on the window: all-reduce ``[weight, stop, save]``, int64, on the device. Collective."""
    weight = sum(batch.weight for batch in window)
    agreed = torch.tensor([weight, *(int(bool(wishes & bit)) for bit in WISHES)], dtype=torch.int64)
    agreed = agreed.to(world.device, non_blocking=True)
    if world.world_size > 1:
        dist.all_reduce(agreed)
    return agreed


def loss_factor(agreed: Tensor, world: World) -> Tensor:
    """``world_size / weight``, fp32: what a rank's loss sum is multiplied with before the backward pass, so that
    the average of gradients over ranks is the gradient of the mean over all valid items."""
    return world.world_size / agreed[0].clamp(min=1).float()


def close_step(
    agreed: Tensor, loss_sum: Tensor, grad_norm: Tensor, skipped: Tensor, loss_scale: Tensor, world: World
) -> PendingStep:
    """Add up the ranks' losses and start copying the step's figures to the host. Collective; does not wait.

    Args:
        agreed: from `open_step`.
        loss_sum: this rank's loss sum over the window.
        grad_norm, skipped, loss_scale: scalars on the device, equal on all ranks.
    """
    total = loss_sum.detach().double()
    if world.world_size > 1:
        dist.all_reduce(total)
    figures = torch.stack([total, *agreed.double(), grad_norm.double(), skipped.double(), loss_scale.double()])
    copied = _on_host(figures)

    def finish() -> StepResult:
        loss, weight, *wished, norm, was_skipped, scale = copied.read()
        return StepResult(
            loss=loss / max(weight, 1),
            grad_norm=norm,
            weight=int(weight),
            wishes=sum(bit for bit, count in zip(WISHES, wished, strict=True) if count),
            skipped=bool(was_skipped),
            loss_scale=scale,
        )

    return PendingStep(finish)


def _on_host(figures: Tensor) -> Pending[list[float]]:
    """The numbers of a 1-D tensor, on their way to the host."""
    if not figures.is_cuda:
        return Pending(figures.tolist)
    host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    host.copy_(figures, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()

    def finish() -> list[float]:
        ready.synchronize()
        numbers: list[float] = host.tolist()
        return numbers

    return Pending(finish)


@torch.no_grad()
def evaluate_window(
    model: nn.Module, window: Iterable[Batch], world: World, inputs: Inputs, *, compiled: bool = True
) -> PendingSums:
    """Loss sums over the window and all ranks. Collective; does not wait. Leaves the model in training mode."""
    with nullcontext() if compiled else uncompiled(model):
        return _evaluate(model, window, world, inputs)


def _evaluate(model: nn.Module, window: Iterable[Batch], world: World, inputs: Inputs) -> PendingSums:
    sums: dict[str, Tensor] = {}
    weight_here = 0
    model.eval()
    for batch in window:
        weight_here += batch.weight
        for name, value in model(**inputs(batch, training=False)).items():
            sums[name] = sums[name] + value.double() if name in sums else value.double()
    model.train()
    weight = torch.tensor(float(weight_here), dtype=torch.float64, device=world.device)
    figures = torch.stack([weight, *sums.values()])
    if world.world_size > 1:
        dist.all_reduce(figures)
    copied, names = _on_host(figures), list(sums)

    def finish() -> Mapping[str, LossSum]:
        weight_total, *totals = copied.read()
        return {name: LossSum(total, int(weight_total)) for name, total in zip(names, totals, strict=True)}

    return Pending(finish)


def add_over_ranks(tensor: Tensor, world: World) -> Tensor:
    """The sum of the ranks' tensors, on the CPU. Collective."""
    if world.world_size == 1:
        return tensor.cpu()
    total = tensor.to(world.device, copy=True)
    dist.all_reduce(total)
    return total.cpu()


@torch.no_grad()
def predict(model: nn.Module, batch: Batch, inputs: Inputs) -> Tensor:
    """The model's output without targets, in evaluation mode. Leaves the model in training mode.

    As it was written: a text that is being sampled has another length with every token, and would be compiled anew.
    """
    model.eval()
    arguments = inputs(batch, training=False)
    with uncompiled(model):
        output: Tensor = model(**{name: tensor for name, tensor in arguments.items() if name != "targets"})
    model.train()
    return output
