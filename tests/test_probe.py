"""The probe leaves what is compiled alone."""

from __future__ import annotations

import pytest
import torch

from zerofit.config.models import GPT2Config
from zerofit.engines.common import Inputs, evaluate_window
from zerofit.models.gpt2 import SPEC
from zerofit.training.probe import differs
from zerofit.types import Batch, World


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch.compile looks at gradients while it traces
def test_a_batch_of_another_shape_does_not_compile() -> None:
    model = SPEC.build(GPT2Config(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11))
    compiled = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compiled.append(graph)
        return graph

    for unit in SPEC.compiled_units(model):
        unit.compile(backend=count, dynamic=False)
    tokens = torch.arange(8)[None]
    model(tokens, tokens)["loss"].backward()
    before = len(compiled)
    assert before > 0
    world, batch = World(0, 1, 0, torch.device("cpu")), Batch({"tokens": tokens[:, :4], "targets": tokens[:, :4]}, 4)
    inputs = Inputs(world.device)
    plain = evaluate_window(model, [batch], world, inputs, compiled=False).read()["loss"].mean
    assert len(compiled) == before
    assert all(unit._compiled_call_impl is not None for unit in SPEC.compiled_units(model))
    model(tokens, tokens)["loss"].backward()
    assert len(compiled) == before
    assert abs(plain - evaluate_window(model, [batch], world, inputs).read()["loss"].mean) < 1e-5
    assert len(compiled) > before  # as it would have without


def test_the_coarser_of_two_precisions_explains_a_difference() -> None:
    """A loss of bf16 weights is compared with fp32's when a run goes on in another precision."""
    assert differs(3.0, 3.01, "fp32", "fp32")
    assert not differs(3.0, 3.01, "fp32", "bf16")
    assert not differs(3.0, 3.01, "bf16", "fp32")
    assert differs(3.0, 3.2, "bf16", "fp32")
