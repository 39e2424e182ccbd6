"""Classifiers whose blocks are compiled one by one: many kinds of one class, and recomputation around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from processes import run
from test_timm import make_plan, model_of, needs_timm, window
from zerofit.checkpoint.model import initial_reader
from zerofit.config.models import ModelConfig, ResNetConfig
from zerofit.engines.build import build
from zerofit.models import model_spec
from zerofit.planning.plan import Plan
from zerofit.types import World


def in_graphs(world: World, plan: Plan) -> tuple[list[float], int]:
    """Losses, and how many graphs were made; AOTAutograd without code generation, which takes a minute."""
    import torch._dynamo as dynamo
    from torch._dynamo.backends.debugging import aot_eager

    dynamo.config.recompile_limit = 2  # as if a model had more kinds of blocks than the usual 8
    graphs, compile = [], torch.compile

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def compile_module(self: Any, **_: Any) -> None:
        self._compiled_call_impl = compile(self._call_impl, backend=counted, dynamic=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", compile_module)
        patch.setattr(torch, "compile", lambda function, **_: compile(function, backend=counted, dynamic=False))
        engine: Any = build(plan, model_spec(plan.model.kind), world)
    engine.load(initial_reader(model_spec(plan.model.kind), plan.model, plan.seed))
    losses = [engine.train_step(window(plan, step, world.rank), 1e-3, step).read().loss for step in range(2)]
    engine.close()
    return losses, len(graphs)


def _plans(model: ModelConfig, strategy: str, every: int) -> tuple[Plan, Plan]:
    plain = make_plan("", strategy, 1, model=model, activation_checkpointing_every=every)
    return plain, plain.model_copy(update={"compile": True})


@pytest.mark.parametrize(("strategy", "every"), [("single", 1), ("fsdp2", 1), ("fsdp2", 0)])
def test_every_kind_of_block_is_compiled(strategy: str, every: int) -> None:
    """Beyond the limit blocks ran as written, and recomputing them ended the run."""
    plain, compiled = _plans(ResNetConfig(layers=18, num_classes=5, input_size=32), strategy, every)
    ((reference, _),) = run(1, in_graphs, plain)
    ((found, graphs),) = run(1, in_graphs, compiled)
    assert found == pytest.approx(reference, rel=1e-3)
    assert graphs >= 7  # kinds of blocks


@needs_timm
@pytest.mark.parametrize("strategy", ["single", "fsdp2"])
def test_blocks_of_timm_are_compiled_inside_their_recomputation(strategy: str) -> None:
    plain, compiled = _plans(model_of("test_vit"), strategy, 1)
    ((reference, _),) = run(1, in_graphs, plain)
    ((found, graphs),) = run(1, in_graphs, compiled)
    assert found == pytest.approx(reference, rel=1e-3)
    assert graphs >= 1
