"""The element-wise optimizers in the shape that DeepSpeed steps: a torch optimizer over the rank's flat partitions.

DeepSpeed divides and clips the gradient, and does not call `step` when the gradient is not finite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.optimizer_step import Figures, Moment
from ..kernels.optimizer_step import step as elementwise_step
from ..planning.plan import OptimizerPlan
from .flat_optimizer import STREAMS
from .updates import make_means, rule_of


class PartitionOptimizer(torch.optim.Optimizer):
    """AdamW, Lion or SGD with states of the plan's types.

    ``state[partition]`` holds ``step`` (a scalar tensor), ``stream``, and a `Moment` for each mean; `make_state` makes
    it before the first step.

    Args:
        groups: torch's, with ``weight_decay``.
        plan: an element-wise kind.
        rank: of this process: random numbers differ between ranks.
    """

    def __init__(self, groups: list[dict[str, Any]], plan: OptimizerPlan, rank: int) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.plan, self.rank = plan, rank

    def make_state(self, partition: Tensor, index: int, steps: float) -> None:
        """Zero means for a partition, the rank's `index`-th, after `steps` applied steps."""
        state = self.state[partition]
        if "stream" not in state:
            state |= make_means(self.plan, self.plan.kind, partition.numel(), partition.device)
        state["stream"] = self.rank * STREAMS + index
        state["step"] = torch.tensor(steps, dtype=torch.float32, device=partition.device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step over the partitions of `param_groups` that have a gradient."""
        for group in self.param_groups:
            for partition in group["params"]:
                if partition.grad is not None:
                    self._step(partition, group["lr"], group["weight_decay"])

    def _step(self, partition: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[partition]
        state["step"] += 1
        assert self.plan.kind in ("adamw", "lion", "sgd")
        rule = rule_of(self.plan, self.plan.kind)
        one = torch.ones((), device=partition.device)
        elementwise_step(
            rule,
            partition.grad,  # type: ignore[arg-type]
            partition.data,
            tuple(value for value in state.values() if isinstance(value, Moment)),
            Figures.of(rule, state["step"], one, torch.zeros_like(one)),
            lr=lr,
            weight_decay=weight_decay,
            seed=self.plan.seed,
            stream=state["stream"],
        )
