"""A loss that stops being a number is traced to its layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from processes import run
from test_conformance import make_plan, start, window
from test_mamba_engines import MODEL
from zerofit.planning.plan import Plan
from zerofit.training.not_finite import first_bad_layer
from zerofit.types import World


def poisoned(world: World, plan: Plan, name: str, value: float, only_rank: int) -> str | None:
    engine = start(world, plan)
    if plan.strategy == "zero3":
        import deepspeed

        parameter = dict(engine.model.named_parameters())[name]
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.view(-1)[0] = value
    elif world.rank == only_rank:
        dict(engine.model.named_parameters())[name].data.view(-1)[0] = value
    return first_bad_layer(engine, window(plan, 0, world.rank), world)


CASES: list[tuple[str, float, str]] = [
    ("layers.1.mixer.A_log", float("nan"), "parameter layers.1.mixer.A_log holds"),
    ("layers.1.mixer.dt_proj.weight", float("inf"), "parameter layers.1.mixer.dt_proj.weight holds"),
]


@pytest.mark.parametrize(("name", "value", "words"), CASES, ids=lambda value: str(value))
def test_the_layer_is_named(name: str, value: float, words: str) -> None:
    plan = make_plan(model=MODEL, parameters=MODEL.parameter_count())
    (found,) = run(1, poisoned, plan, name, value, 0)
    assert words in found


@pytest.mark.parametrize("variant", ["ddp", "zero3"])
def test_every_rank_learns_it(variant: str) -> None:
    plan: Any = make_plan(variant, model=MODEL, parameters=MODEL.parameter_count())
    found = run(2, poisoned, plan, "layers.1.mixer.D", float("nan"), 1)
    assert found == ["the parameter layers.1.mixer.D holds values that are not finite"] * 2


def test_nothing_is_found_where_all_is_finite() -> None:
    plan = make_plan(model=MODEL, parameters=MODEL.parameter_count())
    assert run(1, poisoned, plan, "layers.1.mixer.D", 1.0, 0) == [None]


def test_the_step_size_is_told_by_name() -> None:
    from zerofit.models.mamba import StepProjection
    from zerofit.training.not_finite import _watched

    module = torch.nn.ModuleDict({"dt_proj": StepProjection(2, 3)})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1e38)
    with _watched(module) as found:
        module["dt_proj"](torch.full((1, 2), 1e30))
    assert found == ["dt_proj (the step size delta) returns values that are not finite for a finite input"]
