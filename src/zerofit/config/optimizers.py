"""Optimizers, and under what they can run. Plain pydantic; the plan and the engines build on it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .models import Section

OptimizerKind = Literal["adamw", "lion", "sgd", "adafactor", "muon"]
StateType = Literal["fp32", "bf16", "8bit"]
MasterType = Literal["fp32", "bf16"]

#: What each optimizer has, and its usual values: AdamW as in nanoGPT, Lion's and Adafactor's papers, torch.optim's SGD
#: and Muon.
OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8},
    "lion": {"beta1": 0.9, "beta2": 0.99},
    "sgd": {"momentum": 0.9, "nesterov": False},
    "adafactor": {"beta2_decay": -0.8, "update_clip": 1.0},
    "muon": {
        "momentum": 0.95, "nesterov": True, "orthogonal_steps": 5, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8
    },
}  # fmt: skip
#: Those that update each element for itself, so that any cut of the weights is as good as another.
LOW_BIT_KINDS = ("adamw", "lion", "sgd")
#: Strategies that leave every tensor whole on every rank.
WHOLE = ("single", "ddp")


class OptimizerConfig(Section):
    """How gradients become weights. What a kind does not have is null, and setting it is refused."""

    kind: OptimizerKind = "adamw"
    """AdamW (Loshchilov & Hutter 2019), Lion (Chen et al. 2023), SGD with momentum, Adafactor (Shazeer & Stern 2018),
    or Muon (Jordan et al. 2024) for the matrices of the blocks with AdamW for all else."""
    learning_rate: Annotated[float, Field(gt=0)] = 6e-4
    """Peak learning rate. Lion wants a third to a tenth of AdamW's, Muon takes AdamW's (its updates have the same RMS),
    Adafactor about 1e-2 (of each tensor's own RMS), SGD 0.1 and more."""
    beta1: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the gradient's running mean: adamw, lion, muon (its AdamW part); 0.9 when unset."""
    beta2: Annotated[float, Field(ge=0, lt=1)] | None = None
    """adamw, muon: decay of the squared gradient's running mean, 0.95 when unset. lion: of the mean it keeps, 0.99."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """Added to the denominator: adamw, muon (its AdamW part); 1e-8 when unset."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """sgd (0.9 when unset) and muon (0.95)."""
    nesterov: bool | None = None
    """Look one step ahead with the momentum: sgd (false when unset) and muon (true)."""
    orthogonal_steps: Annotated[int, Field(ge=1, le=20)] | None = None
    """muon: Newton-Schulz iterations, 5 when unset."""
    beta2_decay: Annotated[float, Field(lt=0)] | None = None
    """adafactor: step t averages squares with decay 1 - t to this power, -0.8 when unset."""
    update_clip: Annotated[float, Field(gt=0)] | None = None
    """adafactor: largest RMS of a tensor's update before the learning rate, 1 when unset."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled decay, on matrices and embeddings only (tensors of two and more dimensions), for every kind."""
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest L2 norm of the whole gradient; 0 turns clipping off."""
    state: StateType | Literal["auto"] = "fp32"
    """Type of the running means (adamw, lion, sgd): fp32; bf16 with stochastic rounding; 8bit in blocks of 256 with an
    fp32 scale each. ``auto``: 8bit where fp32 does not fit."""
    master: MasterType | Literal["auto"] = "fp32"
    """Type of the weights that are updated: fp32 beside the compute copy, or bf16: the compute copy itself, with
    stochastic rounding (precision bf16; adamw, lion, sgd). ``auto``: bf16 where nothing else fits."""
    cpu_kernel: Literal["torch", "deepspeed"] = "torch"
    """With AdamW offloaded: torch's fused AdamW (nothing to compile) or DeepSpeedCPUAdam (compiled once)."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_kind(cls, given: Any) -> Any:
        """Fill in what the kind has and nothing sets."""
        if not isinstance(given, dict) or not isinstance(given.get("kind", "adamw"), str):
            return given
        usual = OPTIMIZER_DEFAULTS.get(given.get("kind", "adamw"), {})
        return given | {name: value for name, value in usual.items() if given.get(name) is None}

    @model_validator(mode="after")
    def _own_fields_only(self) -> OptimizerConfig:
        own = OPTIMIZER_DEFAULTS[self.kind]
        for name in dict.fromkeys(name for fields in OPTIMIZER_DEFAULTS.values() for name in fields):
            if name not in own and getattr(self, name) is not None:
                kinds = [kind for kind, fields in OPTIMIZER_DEFAULTS.items() if name in fields]
                raise ValueError(
                    f"optimizer.{name} {getattr(self, name)} with optimizer.kind {self.kind}: {self.kind} has no "
                    f"{name} (it belongs to {', '.join(kinds)}). Leave it out, or choose another optimizer.kind"
                )
        for name in ("state", "master"):
            if self.kind not in LOW_BIT_KINDS and getattr(self, name) != "fp32":
                raise ValueError(
                    f"optimizer.{name} {getattr(self, name)} with optimizer.kind {self.kind}: low-bit states are made "
                    f"for element-wise optimizers ({', '.join(LOW_BIT_KINDS)}). Use optimizer.{name} fp32, or one of "
                    f"those kinds"
                )
        if self.cpu_kernel == "deepspeed" and self.kind != "adamw":
            raise ValueError(
                f"optimizer.cpu_kernel deepspeed with optimizer.kind {self.kind}: DeepSpeed's CPU kernel is AdamW. Use "
                f"optimizer.cpu_kernel torch"
            )
        return self


def why_not(kind: str, state: str, master: str, strategy: str, offload: str) -> str | None:
    """Why a strategy cannot carry an optimizer; None when it can."""
    if kind not in LOW_BIT_KINDS and strategy not in (*WHOLE, "auto"):
        return (
            f"optimizer.kind {kind} under strategy {strategy}: {kind} updates whole matrices, and {strategy} gives "
            f"each rank a piece of them. Use strategy single or ddp, or optimizer.kind adamw, lion or sgd"
        )
    if offload == "none":
        return None
    if "8bit" in (state, master) or "bf16" in (state, master):
        return (
            f"optimizer.state {state} and optimizer.master {master} with offload {offload}: low-bit states are made to "
            f"stay on the GPU, and on the host their step would be many times slower than fp32's. Use offload none, or "
            f"fp32 for both"
        )
    if kind != "adamw" and offload == "nvme":
        return (
            f"optimizer.kind {kind} with offload nvme: DeepSpeed swaps AdamW's two moments. Use offload cpu, or "
            f"optimizer.kind adamw"
        )
    return None
