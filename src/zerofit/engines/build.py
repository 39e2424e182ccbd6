"""From a plan to an engine. The registry is a literal of lazy references: DeepSpeed loads only when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..models.base import ModelSpec
from ..planning.plan import Plan
from ..types import World
from .base import Engine

ENGINES = {
    "single": "zerofit.engines.ddp:DDPEngine",
    "ddp": "zerofit.engines.ddp:DDPEngine",
    "fsdp2": "zerofit.engines.fsdp:FSDPEngine",
    "zero1": "zerofit.engines.deepspeed:DeepSpeedEngine",
    "zero2": "zerofit.engines.deepspeed:DeepSpeedEngine",
    "zero3": "zerofit.engines.deepspeed:DeepSpeedEngine",
}


def build(plan: Plan, spec: ModelSpec[Any], world: World) -> Engine:
    """The plan's engine, without weights: call `load` next. Collective; the process group exists already.

    Raises:
        MissingDependency: the strategy needs a package that is not installed.
    """
    module, _, name = ENGINES[plan.strategy].partition(":")
    engine: Engine = getattr(import_module(module), name)(plan, spec, world)
    return engine
