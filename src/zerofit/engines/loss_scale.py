"""Dynamic loss scale on the device, by DeepSpeed's law (``DynamicLossScaler``), so that engines agree."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.schema import LossScaleConfig
from ..types import Scalars


class LossScaler:
    """Scale, iteration, iteration of the last overflow and remaining hysteresis as one fp64 tensor.

    On an overflow the hysteresis is used up first, then the scale halves (never below ``min_scale``); ``window``
    steps after the last overflow it doubles and the hysteresis is refilled. Nothing waits for the device.
    """

    def __init__(self, config: LossScaleConfig, enabled: bool, device: torch.device) -> None:
        self.config, self.enabled = config, enabled
        scale = 2.0**config.initial_power if enabled else 1.0
        self.state = torch.tensor([scale, 0, -1, config.hysteresis], dtype=torch.float64, device=device)

    @property
    def scale(self) -> Tensor:
        """Factor on the loss, a scalar fp64 tensor; 1 when not enabled."""
        return self.state[0]

    def update(self, overflow: Tensor) -> None:
        """Account for one attempted step. `overflow`: scalar bool tensor on the device."""
        if not self.enabled:
            return
        scale, iteration, last, hysteresis = self.state.unbind()
        full, floor = float(self.config.hysteresis), self.config.min_scale
        halve = overflow & (hysteresis <= 1)
        stable_steps = iteration - last - 1
        grow = ~overflow & (stable_steps > 0) & (stable_steps % self.config.window == 0)
        new_scale = torch.where(halve, (scale / 2).clamp(min=floor), torch.where(grow, scale * 2, scale))
        spent = torch.where(overflow & (hysteresis > 1), hysteresis - 1, hysteresis)
        new_hysteresis = torch.where(grow, torch.full_like(spent, full), spent)
        self.state = torch.stack([new_scale, iteration + 1, torch.where(overflow, iteration, last), new_hysteresis])

    def scalars(self) -> Scalars:
        """State for a checkpoint; waits for the device."""
        scale, iteration, last, hysteresis = self.state.tolist()
        return {
            "loss_scale": scale,
            "loss_scale_iteration": iteration,
            "loss_scale_last_overflow": last,
            "loss_scale_hysteresis": hysteresis,
        }

    def load(self, scalars: Scalars) -> None:
        """Continue where `scalars` stopped; values that it lacks (another precision wrote it) keep their start."""
        names = ("loss_scale", "loss_scale_iteration", "loss_scale_last_overflow", "loss_scale_hysteresis")
        if self.enabled and all(name in scalars for name in names):
            self.state.copy_(torch.tensor([scalars[name] for name in names], dtype=torch.float64))
