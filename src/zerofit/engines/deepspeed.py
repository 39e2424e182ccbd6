"""ZeRO-1, 2 and 3 with CPU and NVMe offload, through DeepSpeed (Rajbhandari et al. 2020, 2021; Ren et al. 2021).

DeepSpeed partitions, communicates, swaps and clips. Ours are: construction, the optimizer object, the accumulation
window, the divisor of the loss, the loss scale, and reading and writing states.
"""

from __future__ import annotations

import importlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import MissingDependency, TrainingFailed
from ..models.base import ModelSpec, named_unique_parameters
from ..planning.optimizer_states import MEANS
from ..planning.plan import Plan
from ..types import Batch, Fragment, PendingStep, PendingSums, Reader, Scalars, World
from . import common
from .buffers import Buffers
from .deepspeed_config import deepspeed_config
from .deepspeed_fragments import ReplicatedLayout, ShardedLayout
from .loss_scale import LossScaler
from .partition_optimizer import PartitionOptimizer


class DeepSpeedEngine:
    """See `engines.base.Engine`. One per process: DeepSpeed keeps state in its modules.

    Raises:
        MissingDependency: DeepSpeed, or what its NVMe swapping needs, is not there.
        TrainingFailed: DeepSpeed refuses the configuration.
    """

    def __init__(self, plan: Plan, spec: ModelSpec[Any], world: World) -> None:
        self.world = world
        self.held, self.inputs = common.HeldUpdates(), common.Inputs(world.device)
        self.deepspeed = import_deepspeed(plan, world)
        self.swap_folder = _new_swap_folder(plan)
        self.plan = plan if self.swap_folder is None else plan.model_copy(update={"nvme_path": self.swap_folder})
        with _translated(self.deepspeed), _peaks_kept():
            self.deepspeed.init_distributed()
            config = deepspeed_config(self.plan)
            self.model = self._build_model(spec, config)
            common.compile_units(plan, spec, self.model)
            self.parameters = named_unique_parameters(self.model)
            self.engine = _zero_engine(self.deepspeed, self.model, self._make_optimizer(spec), config)
        self.zero: Any = self.engine.optimizer
        self.buffers = Buffers(self.model, world, plan.optimizer.ema_decay)
        names = {parameter: name for name, parameter in self.parameters.items()}
        roles = (*MEANS[plan.optimizer.kind], *(("ema",) if plan.optimizer.ema_decay is not None else ()))
        self.layout: ReplicatedLayout | ShardedLayout = (
            ShardedLayout(self.zero, names, roles, world.rank)
            if plan.strategy == "zero3"
            else ReplicatedLayout(self.zero, names, roles)
        )
        if plan.optimizer.master == "bf16":
            self.layout.share_masters()
        # DeepSpeed reads back whether a gradient is finite in every step, so the scale may live on the host.
        self.scaler = LossScaler(plan.loss_scale, plan.precision == "fp16", torch.device("cpu"))
        self._apply_scale()

    def _build_model(self, spec: ModelSpec[Any], config: dict[str, Any]) -> nn.Module:
        """Under ZeRO-3 each module is partitioned as soon as it is made: no rank ever holds the whole model."""
        if self.plan.strategy != "zero3" or getattr(spec, "partitioned_when_built", False):
            return common.build_model(self.plan, spec, self.world.device)
        # PyTorch imports it as the first module is made, which fails once zero.Init has replaced Tensor's constructor.
        importlib.import_module("torch._dynamo")
        with self.deepspeed.zero.Init(config_dict_or_path=config):
            return common.build_model(self.plan, spec, self.world.device)

    def _make_optimizer(self, spec: ModelSpec[Any]) -> torch.optim.Optimizer:
        """The optimizer over the model's own parameters; DeepSpeed puts its flat partitions in their place."""
        plan = self.plan.optimizer
        groups = []
        for decays, weight_decay in ((True, plan.weight_decay), (False, 0.0)):
            members = [p for name, p in self.parameters.items() if spec.decays(self.plan.model, name) is decays]
            if members:
                groups.append({"params": members, "weight_decay": weight_decay})
        if not plan.is_plain:
            return PartitionOptimizer(groups, plan, self.world.rank)
        arguments: dict[str, Any] = {"lr": 0.0, "betas": (plan.beta1, plan.beta2), "eps": plan.eps}
        if plan.cpu_kernel == "deepspeed" and self.plan.offload != "none":
            return _cpu_adam(self.deepspeed, groups, arguments)
        return torch.optim.AdamW(groups, fused=True, **arguments)

    def train_step(self, window: Sequence[Batch], lr: float, step: int, wishes: int = 0) -> PendingStep:
        common.seed_step(self.plan, step, self.world.rank)
        self.buffers.change()
        agreed = common.open_step(window, wishes, self.world)
        factor = common.loss_factor(agreed, self.world)
        self.zero.set_lr(lr)
        loss_sum = torch.zeros((), device=self.world.device)
        with _translated(self.deepspeed):
            for index, batch in enumerate(window):
                loss = self.engine(**self.inputs(batch, training=True))["loss"]
                self.engine.backward(loss * factor, scale_wrt_gas=False)
                if index == len(window) - 1:
                    self.held.release()
                self.engine.step()  # only counts until the window is full
                loss_sum += loss.detach()
        if self.plan.optimizer.ema_decay is not None and not self.zero.overflow:
            for partition in self.layout.partitions:
                partition.average(self.plan.optimizer.ema_decay)
        return self._close(agreed, loss_sum)

    def _close(self, agreed: Tensor, loss_sum: Tensor) -> PendingStep:
        """Report what DeepSpeed did in the step that just ended, and let the scale follow it."""
        scale, skipped = self.scaler.scale.clone(), torch.tensor(self.zero.overflow)
        grad_norm = torch.as_tensor(self.zero._global_grad_norm, dtype=torch.float32)
        self.scaler.update(skipped)
        self._apply_scale()
        self.buffers.settle(skipped, torch.as_tensor(self.layout.partitions[0].state["step"], dtype=torch.float32))
        device = self.world.device
        return common.close_step(
            agreed, loss_sum, grad_norm.to(device), skipped.to(device), scale.to(device), self.world
        )

    def _apply_scale(self) -> None:
        if self.scaler.enabled:
            self.zero.override_loss_scale(self.scaler.scale.item())

    def eval_step(self, window: Sequence[Batch], *, compiled: bool = True) -> PendingSums:
        self.buffers.average()
        return common.evaluate_window(self.model, window, self.world, self.inputs, compiled=compiled)

    def predict(self, batch: Batch) -> Tensor:
        self.buffers.average()
        return common.predict(self.model, batch, self.inputs)

    def fragments(self) -> Iterator[Fragment]:
        partitions = (partition.fragments() for partition in self.layout.partitions)
        return chain(self.buffers.fragments(), chain.from_iterable(partitions))

    def hold_updates(self, wait: Callable[[], None]) -> None:
        self.held.hold(wait)

    def scalars(self) -> Scalars:
        own = {"optimizer_steps": float(self.layout.partitions[0].state["step"])}
        return {**own, **self.scaler.scalars()} if self.scaler.enabled else own

    def load(self, read: Reader, scalars: Scalars | None = None) -> None:
        scalars = scalars or {}
        steps = scalars.get("optimizer_steps", 0.0)
        self.layout.prepare_load()
        for index, partition in enumerate(self.layout.partitions):
            partition.load(read, steps, partial(self._begin_state, index))
        self.layout.finish_load()
        self.buffers.load(read)
        self.scaler.load(scalars)
        self._apply_scale()

    def _begin_state(self, index: int, steps: float, master: Tensor, state: dict[str, Any]) -> None:
        """The state that the optimizer would make in its first step, so that none need be taken."""
        optimizer = self.zero.optimizer
        if isinstance(optimizer, PartitionOptimizer):
            optimizer.make_state(master, index, steps)
            return
        for role in MEANS["adamw"]:
            if role not in state:
                state[role] = torch.zeros_like(master)
        on_device = isinstance(optimizer, torch.optim.AdamW)
        state["step"] = torch.tensor(steps, dtype=torch.float32, device=master.device) if on_device else int(steps)

    def memory(self) -> Mapping[str, int]:
        return self.layout.memory() | self.buffers.memory()

    def close(self) -> None:
        self.engine.destroy()
        _restore_linear()
        if self.swap_folder is not None:
            _remove_swap_files(self.swap_folder, self.world.rank)


def import_deepspeed(plan: Plan, world: World) -> ModuleType:
    """DeepSpeed, told which device to use and kept from compiling anything at start.

    Raises:
        MissingDependency: it is not installed or cannot be imported; names the remedy.
    """
    os.environ["DS_ACCELERATOR"] = plan.device
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    if plan.device == "cuda":
        # Lists such as "9.0;10.0a" end DeepSpeed's op builder with a ValueError.
        os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability(world.device))
    try:
        import deepspeed
        import deepspeed.ops
    except Exception as reason:  # a broken toolchain ends the import with errors of many kinds
        raise MissingDependency(
            f"Strategy {plan.strategy} runs through DeepSpeed, which cannot be imported here "
            f"({type(reason).__name__}: {reason}). Strategies single and ddp need PyTorch alone and still work. Run "
            f"`pip install 'zerofit[deepspeed]'`."
        ) from reason
    # DeepSpeed 0.19.8 calls collectives by the names they had before torch 2.13, thousands of times.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Without this table, initialisation probes the compiler for every op, and on a CPU then compiles a shared-memory
    # collective for a minute and a half.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    if plan.device == "cpu":
        # It asks oneDNN for native fp16 and refuses without; torch emulates it, which is good enough to try things out.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    module: ModuleType = deepspeed
    return module


def _zero_engine(deepspeed: ModuleType, model: nn.Module, optimizer: torch.optim.Optimizer, config: Any) -> Any:
    """DeepSpeed's engine with the ZeRO optimizer of the stage.

    Left alone, bf16 with fp32 gradients at stage 1 gets an optimizer class of its own with other memory and no
    skipped steps; the stage's own class does that combination as well.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION

    class ZeroEngine(deepspeed.DeepSpeedEngine):  # type: ignore[misc, name-defined]
        def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
            return str(ZERO_OPTIMIZATION)

    return ZeroEngine(args=None, model=model, optimizer=optimizer, config=config, config_class=DeepSpeedConfig(config))


def _cpu_adam(deepspeed: ModuleType, groups: Any, arguments: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        optimizer: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **arguments)
    except RuntimeError as reason:
        raise MissingDependency(
            f"optimizer.cpu_kernel deepspeed compiles DeepSpeedCPUAdam when it is first used, and that failed "
            f"({reason}). It needs a C++ compiler and ninja; or use optimizer.cpu_kernel torch, which compiles nothing."
        ) from reason
    return optimizer


@contextmanager
def _peaks_kept() -> Iterator[None]:
    """Inside, PyTorch's peaks of GPU memory are not reset.

    DeepSpeed resets them whenever it empties the cache (``runtime/utils.py``), and a run would report a peak without
    its start: with offload, flattening can be the peak.
    """
    reset = torch.cuda.reset_peak_memory_stats
    torch.cuda.reset_peak_memory_stats = lambda *_arguments, **_options: None
    try:
        yield
    finally:
        torch.cuda.reset_peak_memory_stats = reset


@contextmanager
def _translated(deepspeed: ModuleType) -> Iterator[None]:
    """DeepSpeed's complaints as ours; running out of memory and broken connections pass unchanged."""
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    try:
        yield
    except (AssertionError, ValueError, ZeRORuntimeException) as reason:
        raise TrainingFailed(
            f"DeepSpeed {deepspeed.__version__} ended with {type(reason).__name__}: {reason}. This combination was "
            f"believed to work; try another strategy, and report it with the run's plan.json."
        ) from reason


def _restore_linear() -> None:
    """``zero.Init`` replaces ``torch.nn.functional.linear`` for the whole process and leaves it so."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patch

    if hasattr(Patch, "linear_bk"):
        torch.nn.functional.linear = Patch.linear_bk


def _new_swap_folder(plan: Plan) -> Path | None:
    """A folder for NVMe offload that no other run uses (DeepSpeed's file names tell only ranks apart). Collective."""
    if plan.nvme_path is None or "nvme" not in (plan.offload, plan.offload_parameters):
        return None
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise MissingDependency(
            "Offload nvme swaps through DeepSpeed's async_io op, which needs libaio and its header. Install them "
            "(Debian, Ubuntu: `apt install libaio-dev`), or use offload cpu."
        )
    name = [uuid4().hex]
    dist.broadcast_object_list(name)
    return plan.nvme_path / f"zerofit-swap-{name[0]}"


def _remove_swap_files(folder: Path, rank: int) -> None:
    """This rank's files, and the folders that are empty then: other ranks may still be reading theirs."""
    for path in (Path(name) for name, _, _ in os.walk(folder, topdown=False)):
        if path.name == f"rank{rank}":
            shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            path.rmdir()
