"""The model: published sizes, shapes counted without torch, and what its loss means."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zerofit.config.models import GPT2Config
from zerofit.models.base import named_unique_parameters
from zerofit.models.gpt2 import IGNORE, SPEC

SMALL = GPT2Config(n_layer=3, n_head=2, n_embd=16, block_size=8, vocab_size=11)


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "parameters"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_published_parameter_counts(n_layer: int, n_head: int, n_embd: int, parameters: int) -> None:
    config = GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=50257)
    assert config.parameter_count() == parameters


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pad", [1, 64])
def test_shapes_without_torch_are_those_of_the_module(bias: bool, pad: int) -> None:
    config = SMALL.model_copy(update={"bias": bias, "pad_vocab_to": pad})
    with torch.device("meta"):
        model = SPEC.build(config)
    assert {n: tuple(p.shape) for n, p in named_unique_parameters(model).items()} == config.parameter_shapes()


def _model(config: GPT2Config, checkpoint_every: int = 0) -> torch.nn.Module:
    model = SPEC.build(config, checkpoint_every=checkpoint_every)
    with torch.no_grad():
        for name, parameter in named_unique_parameters(model).items():
            parameter.copy_(SPEC.init(config, name, seed=1))
    return model


def test_initial_values_are_a_function_of_seed_and_name() -> None:
    name = "h.1.attn.c_attn.weight"
    assert torch.equal(SPEC.init(SMALL, name, 1), SPEC.init(SMALL, name, 1))
    assert not torch.equal(SPEC.init(SMALL, name, 1), SPEC.init(SMALL, name, 2))
    assert not torch.equal(SPEC.init(SMALL, name, 1), SPEC.init(SMALL, "h.2.attn.c_attn.weight", 1))
    wide = GPT2Config(n_layer=8, n_head=2, n_embd=128, vocab_size=11)
    assert SPEC.init(wide, "h.0.mlp.c_fc.weight", 1).std().item() == pytest.approx(0.02, rel=0.02)
    assert SPEC.init(wide, "h.0.mlp.c_proj.weight", 1).std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert (SPEC.init(wide, "h.0.ln_1.weight", 1) == 1).all()


def test_the_loss_is_the_sum_over_valid_targets_and_ignores_vocabulary_padding() -> None:
    config = SMALL.model_copy(update={"pad_vocab_to": 64})
    model = _model(config)
    tokens = torch.randint(0, 11, (2, 8))
    targets = torch.randint(0, 11, (2, 8))
    targets[0, :5] = IGNORE
    logits = model(tokens)
    assert logits.shape == (2, 8, 11)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    assert torch.allclose(model(tokens, targets)["loss"], expected)


def test_no_token_sees_the_future() -> None:
    model = _model(SMALL).eval()
    tokens = torch.randint(0, 11, (1, 8))
    changed = tokens.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 11
    assert torch.allclose(model(tokens)[0, :5], model(changed)[0, :5], atol=1e-6)
    assert not torch.allclose(model(tokens)[0, 5:], model(changed)[0, 5:], atol=1e-3)


@pytest.mark.parametrize(("every", "forwards"), [(0, 3), (1, 6), (2, 5)])
def test_checkpointing_recomputes_every_nth_block_and_changes_nothing(every: int, forwards: int) -> None:
    tokens = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(0))
    reference, model = _model(SMALL), _model(SMALL, checkpoint_every=every)
    calls = []
    for block in SPEC.blocks(model):
        block.mlp.c_fc.register_forward_hook(lambda *_: calls.append(1))
    for net in (reference, model):
        net(tokens, tokens)["loss"].backward()
    assert len(calls) == forwards
    for one, other in zip(reference.parameters(), model.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad)


def test_weight_decay_is_on_matrices_only() -> None:
    decaying = {name for name in SMALL.parameter_shapes() if SPEC.decays(SMALL, name)}
    assert "wte.weight" in decaying
    assert "h.0.mlp.c_fc.weight" in decaying
    assert not any(name.endswith(".bias") or "ln_" in name for name in decaying)


def test_flops_of_xl_per_token() -> None:
    xl = GPT2Config(n_layer=48, n_head=25, n_embd=1600, vocab_size=50257)
    assert SPEC.flops_per_item(xl) == 6 * (1_557_611_200 - 1024 * 1600) + 12 * 48 * 1600 * 1024


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="n_embd 16"):
        GPT2Config(n_layer=1, n_head=3, n_embd=16)
