"""A run whose backbone is frozen for its first epochs: two engines, one after the other.

The groups of ZeRO and the buckets of DDP are fixed when an engine is built, so the whole network gets an engine of its
own: the frozen phase ends in a checkpoint, and the next phase starts from that checkpoint, as a resumed run would. The
optimizer and the average of the weights start afresh then: Adam's bias correction counts steps for all parameters at
once, and those of the backbone have had none.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from ..checkpoint.model import parameters_only
from ..checkpoint.source import Source
from ..engines.base import Engine
from ..engines.build import build
from ..models.base import ModelSpec
from ..planning.plan import Plan
from ..types import World

#: In a checkpoint's state: whether the backbone was frozen in the steps that made it.
STATE = "frozen"


class PhasedEngine:
    """The engine of the phase that a run is in; everything else that an `engines.base.Engine` has is that one's.

    Args:
        plan: of the whole network.
        step: of the next step.
        thaw_step: from which the whole network is trained.
    """

    def __init__(self, plan: Plan, spec: ModelSpec[Any], world: World, step: int, thaw_step: int) -> None:
        self.plan, self.spec, self.world, self.thaw_step = plan, spec, world, thaw_step
        self.frozen = step < thaw_step
        self.current: Engine = build(plan.frozen_phase() if self.frozen else plan, spec, world)

    def __getattr__(self, name: str) -> Any:
        if name == "current":  # between two engines there is none
            raise AttributeError(name)
        return getattr(self.current, name)

    def close(self) -> None:
        """Nothing is left to close where the second engine could not be built."""
        if "current" in vars(self):
            self.current.close()

    def thaw(self, source: Source) -> None:
        """Go on with the whole network from the checkpoint that the frozen phase ended in. Collective."""
        transform, self.frozen = self.current.inputs.transform, False
        self.current.close()
        del self.current
        gc.collect()  # hooks and reducers hold their modules in cycles
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        self.current = build(self.plan, self.spec, self.world)
        self.current.inputs.transform = transform
        load_source(self.current, source, frozen=False)


def load_source(engine: Engine, source: Source, *, frozen: bool) -> None:
    """Take a checkpoint with its optimizer, which starts afresh where the checkpoint's backbone was frozen and is not
    any more. Collective.

    Args:
        frozen: whether the backbone is frozen now.
    """
    if source.state.get(STATE) and not frozen:
        engine.load(parameters_only(source.read), {**source.scalars, "optimizer_steps": 0.0})
    else:
        engine.load(source.read, source.scalars)
