"""The plan: facts that a run is built from. Nothing in it is ``auto``; nobody downstream reads a wish."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..config.models import ModelConfig, Recomputation, Section
from ..config.optimizers import MasterType, OptimizerKind, StateType
from ..config.schema import FsdpConfig, LossScaleConfig, Offload, Precision, Strategy


class OptimizerPlan(Section):
    """What the engine builds its optimizer from, after partitioning."""

    kind: OptimizerKind = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = False
    orthogonal_steps: int = 5
    beta2_decay: float = -0.8
    update_clip: float = 1.0
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    """0: no clipping."""
    state: StateType = "fp32"
    """Of the moments."""
    master: MasterType = "fp32"
    """bf16: the compute copy is what is updated."""
    cpu_kernel: Literal["torch", "deepspeed"] = "torch"
    seed: int = 1337
    """Of stochastic rounding."""
    ema_decay: float | None = None
    """Of the average of the weights; None: none is kept."""

    @property
    def is_plain(self) -> bool:
        """AdamW with fp32 states: torch's fused kernel does it."""
        return self.kind == "adamw" and self.state == "fp32" and self.master == "fp32"


class ZeroPlan(Section):
    """DeepSpeed's knobs, decided. Sizes in elements, as DeepSpeed counts."""

    overlap_comm: bool = True
    reduce_bucket_elements: int = 50_000_000
    prefetch_bucket_elements: int = 50_000_000
    persistence_threshold_elements: int = 100_000
    max_live_elements: int = 1_000_000_000
    max_reuse_distance_elements: int = 1_000_000_000
    sub_group_elements: int = 1_000_000_000
    pin_memory: bool = True


class Prediction(Section):
    """What the plan expects of itself; the run's scorecard compares it. None where nothing is predicted."""

    gpu_peak_bytes: int
    """Allocated by PyTorch on the busiest rank; on a CPU, of the process's tensors."""
    gpu_reserved_bytes: int
    gpu_driver_bytes: int
    """What the driver shows: reserved, context and NCCL."""
    gpu_items: dict[str, int]
    """The parts of `gpu_peak_bytes`."""
    peak_phase: str
    memory_basis: str
    host_peak_bytes: int
    """Of a node."""
    step_seconds: float | None = None
    step_parts: dict[str, float] | None = None
    tokens_per_second: float | None = None


class PicturesAhead(Section):
    """What a rank that trains on pictures reads ahead."""

    picture_bytes: int
    """Of a canvas into which every picture fits, uint8."""
    prefetch_factor: int
    processes: int
    """That copy pictures out of the cache."""


class Plan(Section):
    """Everything an engine needs to know, and why it was chosen."""

    model: ModelConfig
    parameters: int
    """Distinct parameters of the model; of a frozen phase those that are trained."""
    strategy: Strategy
    offload: Offload = "none"
    offload_parameters: Offload = "none"
    nvme_path: Path | None = None
    device: Literal["cuda", "cpu"]
    world_size: int
    ranks_per_node: int | None = None
    """Ranks that share a node's memory and buses; None: all of them."""
    micro_batch: int
    accumulation_steps: int
    precision: Precision
    gradient_dtype: Literal["compute", "fp32"] = "compute"
    activation_checkpointing_every: int = 0
    """0: none; 1: every block; n: every n-th block."""
    recomputation: Recomputation = "full"
    """What of those blocks is recomputed."""
    activation_offload: Literal["none", "cpu"] = "none"
    """``cpu``: inputs of recomputed blocks lie in host memory; with every block recomputed."""
    compile: bool = False
    compile_mode: str = "default"
    cuda_graphs: bool = False
    """Forward and backward pass are replayed from a recording; see `engines.cuda_graphs`."""
    deterministic: bool = False
    seed: int = 1337
    optimizer: OptimizerPlan = OptimizerPlan()
    frozen: bool = False
    """The head alone is trained; see `frozen_phase`."""
    pictures: PicturesAhead | None = None
    """For its share of the memory; None for other data."""
    loss_scale: LossScaleConfig = LossScaleConfig()
    zero: ZeroPlan = ZeroPlan()
    fsdp: FsdpConfig = FsdpConfig()
    collective_timeout_seconds: int = 600
    state_bytes: dict[str, int] = Field(default_factory=dict)
    """Predicted bytes of model states of the busiest rank while idle, by item: `planning.memory.state_bytes`."""
    prediction: Prediction | None = None
    """None in plans that were not chosen by the planner."""
    reason: str = ""
    """Why this strategy, in a sentence with numbers."""

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step."""
        return self.micro_batch * self.accumulation_steps * self.world_size

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the parameters that are trained, in the model's order."""
        shapes = self.model.parameter_shapes()
        head = self.model.head_parameters() if self.frozen else shapes.keys()
        return {name: shape for name, shape in shapes.items() if name in head}

    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the parameters that keep their values."""
        trained = self.trained_shapes()
        return {name: shape for name, shape in self.model.parameter_shapes().items() if name not in trained}

    def frozen_phase(self) -> Plan:
        """The plan of the steps in which the head alone is trained.

        Whatever the strategy, every rank holds the whole network: gradients and optimizer states, which sharding and
        offload are for, are the head's and small. Nothing is kept for the backbone's backward pass, so nothing of it is
        recomputed.
        """
        frozen = self.model_copy(update={
            "frozen": True, "strategy": "single" if self.world_size == 1 else "ddp", "offload": "none",
            "offload_parameters": "none", "activation_checkpointing_every": 0, "recomputation": "full",
            "activation_offload": "none", "cuda_graphs": False, "state_bytes": {}, "prediction": None,
        })  # fmt: skip
        count = sum(math.prod(shape) for shape in frozen.trained_shapes().values())
        return frozen.model_copy(update={"parameters": count})

    @property
    def mixed(self) -> bool:
        """True when the compute copy is half precision and the masters are fp32."""
        return self.precision != "fp32"


def input_bytes(plan: Plan) -> list[int]:
    """Each block's input in one micro-step of a rank, in bytes: what ``activation_offload`` moves."""
    model = plan.model
    wide = getattr(model, "residual_in_fp32", False) or not plan.mixed
    return [(4 if wide else 2) * plan.micro_batch * elements for elements in model.block_inputs_per_sample()]
