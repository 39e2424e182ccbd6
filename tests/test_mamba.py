"""Mamba: published sizes, initial values, what its loss means, recomputation, and generation with a state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zerofit.config.load import load_config
from zerofit.config.models import GPT2Config, MambaConfig, Recomputation
from zerofit.config.presets import preset_text
from zerofit.errors import ConfigError
from zerofit.kernels.selective_scan import selective_scan_reference
from zerofit.models.base import named_unique_parameters
from zerofit.models.mamba import NORM_EPS, SPEC, Mamba
from zerofit.models.mamba_stepping import MambaStepper

IGNORE = -100
SMALL = MambaConfig(n_layers=3, d_model=16, d_state=8, vocab_size=11, max_seq_length=12)


@pytest.mark.parametrize(
    ("n_layers", "d_model", "vocab_size", "parameters"),
    [
        # The published checkpoints: their 50277 tokens are padded to 50280 rows.
        (24, 768, 50277, 129_135_360),
        (48, 1024, 50277, 371_516_416),
        (48, 1536, 50277, 793_204_224),
        (48, 2048, 50277, 1_372_178_432),
        (64, 2560, 50277, 2_768_345_600),
        # This project's own shapes, on GPT-2's tokens.
        (34, 2048, 50257, 1_001_961_472),
        (54, 2816, 50257, 2_834_751_744),
        (45, 4864, 50257, 6_922_736_640),
    ],
)
def test_parameter_counts(n_layers: int, d_model: int, vocab_size: int, parameters: int) -> None:
    config = MambaConfig(n_layers=n_layers, d_model=d_model, vocab_size=vocab_size, pad_vocab_to=8)
    assert config.parameter_count() == parameters


@pytest.mark.parametrize(
    ("alias", "preset", "parameters", "steps"),
    [
        ("7b_mamba", "mamba_7b", 6_922_736_640, 200_000),
        ("3b-mamba", "mamba_3b", 2_834_751_744, 150_000),
        ("1b_mamba", "mamba_1b", 1_001_961_472, 100_000),
        ("mamba-2.8b", "mamba_2_8b", 2_768_345_600, 55_000),
    ],
)
def test_presets_by_their_other_names(alias: str, preset: str, parameters: int, steps: int) -> None:
    config = load_config(None, alias).config
    assert config.model == load_config(None, preset).config.model
    assert f"{parameters:,} parameters" in preset_text(preset)
    assert (config.model.parameter_count(), config.max_steps) == (parameters, steps)


def test_the_7b_is_as_asked() -> None:
    config = load_config(None, "mamba_7b").config
    assert (config.micro_batch, config.accumulation_steps, config.optimizer.learning_rate) == (1, 8, 1e-4)
    assert isinstance(config.model, MambaConfig)
    assert (config.model.max_seq_length, config.model.d_state, config.model.d_conv, config.model.expand) == (
        4096,
        16,
        4,
        2,
    )


def test_a_sample_longer_than_the_scan_counts_is_refused() -> None:
    longest = load_config(None, "mamba_130m", [("max_seq_length", str(2**30))]).config
    assert longest.model.sequence_length == 2**30
    with pytest.raises(ConfigError, match="max_seq_length: a sample of 1,073,741,825 tokens is longer than the scan's"):
        load_config(None, "mamba_130m", [("max_seq_length", str(2**30 + 1))])


def test_partial_recomputation_is_refused_where_it_is_not() -> None:
    with pytest.raises(ConfigError, match="activation_checkpointing selective with model kind gpt2"):
        load_config(None, "gpt2", [("activation_checkpointing", "selective")])
    with pytest.raises(ConfigError, match="partitioner"):
        load_config(None, "mamba_7b", [("activation_checkpointing", "light"), ("compile", "true")])


def test_the_2_8b_without_padding_has_the_number_that_is_quoted_for_it() -> None:
    assert MambaConfig(n_layers=64, d_model=2560, vocab_size=50257).parameter_count() == 2_768_286_720


@pytest.mark.parametrize("changes", [{}, {"pad_vocab_to": 8}, {"dt_rank": 3, "expand": 3, "d_conv": 2}], ids=str)
def test_shapes_without_torch_are_those_of_the_module(changes: dict[str, Any]) -> None:
    config = SMALL.model_copy(update=changes)
    with torch.device("meta"):
        model = SPEC.build(config)
    assert {n: tuple(p.shape) for n, p in named_unique_parameters(model).items()} == config.parameter_shapes()


def _model(config: MambaConfig = SMALL, **settings: Any) -> Mamba:
    model = SPEC.build(config, **settings)
    assert isinstance(model, Mamba)
    with torch.no_grad():
        for name, parameter in named_unique_parameters(model).items():
            parameter.copy_(SPEC.init(config, name, seed=1))
    return model


def _tokens(samples: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(0, 11, (samples, 12), generator=torch.Generator().manual_seed(seed))


def test_initial_values_are_those_published() -> None:
    config = MambaConfig(n_layers=4, d_model=64, d_state=16, vocab_size=100)
    name = "layers.1.mixer."
    first = {n: SPEC.init(config, n, 1) for n in config.parameter_shapes()}
    torch.testing.assert_close(first[name + "A_log"].exp(), torch.arange(1.0, 17).expand(128, 16))
    assert bool((first[name + "D"] == 1).all())
    step = F.softplus(first[name + "dt_proj.bias"])
    assert 0.000999 <= float(step.min()) < 0.003
    assert 0.03 < float(step.max()) <= 0.1001
    bounds = {"in_proj": 64**-0.5, "x_proj": 128**-0.5, "dt_proj": 4**-0.5, "conv1d": 4**-0.5}
    bounds["out_proj"] = 128**-0.5 / math.sqrt(4)
    for part, bound in bounds.items():
        largest = float(first[f"{name}{part}.weight"].abs().max())
        assert 0.9 * bound < largest <= bound
    assert float(first["embedding.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert bool((first["layers.0.norm.weight"] == 1).all())
    assert bool((first["norm_f.weight"] == 1).all())


def test_initial_values_are_a_function_of_seed_and_name() -> None:
    name = "layers.1.mixer.in_proj.weight"
    assert torch.equal(SPEC.init(SMALL, name, 1), SPEC.init(SMALL, name, 1))
    assert not torch.equal(SPEC.init(SMALL, name, 1), SPEC.init(SMALL, name, 2))
    assert not torch.equal(SPEC.init(SMALL, name, 1), SPEC.init(SMALL, name.replace("1", "2"), 1))


def _by_the_paper(model: Mamba, tokens: Tensor) -> Tensor:
    """Logits, written with PyTorch's own operators and the scan's definition."""
    weights = dict(model.named_parameters())
    config = model.config

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt() * weight

    x = weights["embedding.weight"][tokens]
    for layer in range(config.n_layers):
        w = {n.removeprefix(f"layers.{layer}."): p for n, p in weights.items() if n.startswith(f"layers.{layer}.")}
        u, z = (norm(x, w["norm.weight"]) @ w["mixer.in_proj.weight"].t()).chunk(2, -1)
        u = F.conv1d(
            F.pad(u.transpose(1, 2), (config.d_conv - 1, 0)),
            w["mixer.conv1d.weight"], w["mixer.conv1d.bias"], groups=config.d_inner,
        )  # fmt: skip
        u = F.silu(u.transpose(1, 2))
        projected = u @ w["mixer.x_proj.weight"].t()
        low, b, c = projected.split([config.step_rank, config.d_state, config.d_state], -1)
        delta = low @ w["mixer.dt_proj.weight"].t()
        a, skip, bias = -w["mixer.A_log"].exp(), w["mixer.D"], w["mixer.dt_proj.bias"]
        y, _ = selective_scan_reference(u, delta, a, b, c, skip, z, bias)
        x = x + y @ w["mixer.out_proj.weight"].t()
    return norm(x, weights["norm_f.weight"]) @ weights["embedding.weight"][: config.vocab_size].t()


def test_logits_are_those_of_the_paper() -> None:
    model = _model()
    torch.testing.assert_close(model(_tokens()), _by_the_paper(model, _tokens()), atol=1e-5, rtol=1e-4)


def test_the_loss_is_a_sum_over_valid_targets_without_padding() -> None:
    config = SMALL.model_copy(update={"pad_vocab_to": 8})
    model, tokens, targets = _model(config), _tokens(), _tokens(seed=1)
    targets[0, :5] = IGNORE
    logits = _by_the_paper(model, tokens)
    assert logits.shape[-1] == 11
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    loss = model(tokens, targets)["loss"]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_no_token_sees_the_future() -> None:
    model, tokens = _model().eval(), _tokens(1)
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 11
    torch.testing.assert_close(model(tokens)[0, :7], model(changed)[0, :7], atol=1e-6, rtol=0)
    assert not torch.allclose(model(tokens)[0, 7:], model(changed)[0, 7:], atol=1e-4)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("recomputation", MambaConfig.recomputations)
def test_recomputation_changes_nothing(recomputation: Recomputation, every: int, precision: torch.dtype) -> None:
    tokens = _tokens()
    kept = _model().to(precision)
    other = _model(checkpoint_every=every, recomputation=recomputation).to(precision)
    losses = [model(tokens, tokens)["loss"] for model in (kept, other)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, one), two in zip(kept.named_parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        tight = {"atol": 1e-5, "rtol": 1e-5} if precision == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
        torch.testing.assert_close(one.grad, two.grad, **tight, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("recomputation", "products", "scans"),
    [(None, 0, 0), ("light", 1, 0), ("selective", 1, 1), ("full", 3, 1)],
)
def test_what_is_computed_again(recomputation: Recomputation | None, products: int, scans: int) -> None:
    """A block has four products before its end: in, x, dt (recomputed always: its rank is small) and out (never)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    counts = {"scan": 0, "product": 0, "scan backward": 0}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.__name__
            counts["scan"] += name.startswith("selective_scan.")
            counts["scan backward"] += name.startswith("selective_scan_backward.")
            counts["product"] += name in ("mm.default", "addmm.default")
            return func(*args, **(kwargs or {}))

    every = {} if recomputation is None else {"checkpoint_every": 1, "recomputation": recomputation}
    model = _model(**every)
    with Counting():
        model(_tokens(), _tokens())["loss"].backward()
    layers = SMALL.n_layers
    assert counts["scan"] == layers * (1 + scans)
    assert counts["scan backward"] == layers
    assert counts["product"] == layers * (4 + products + 8)


def test_weight_decay_is_on_matrices_only_and_not_on_the_dynamics() -> None:
    decaying = {name for name in SMALL.parameter_shapes() if SPEC.decays(SMALL, name)}
    assert decaying == {
        "embedding.weight",
        *(
            f"layers.{layer}.mixer.{part}.weight"
            for layer in range(3)
            for part in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
        ),
    }


@pytest.mark.parametrize("prompt", [1, 2, 3, 7])
def test_a_state_tells_the_same_as_all_tokens(prompt: int) -> None:
    model, tokens = _model().eval(), _tokens()
    stepper, whole = MambaStepper(model), model(tokens)
    assert stepper.context_length is None
    logits, state = stepper.step(tokens[:, :prompt], stepper.initial_state(2))
    torch.testing.assert_close(logits, whole[:, prompt - 1], atol=1e-5, rtol=1e-4)
    sizes = [part.numel() for layer in state for part in layer]
    assert sizes == [part.numel() for layer in stepper.initial_state(2) for part in layer]
    for position in range(prompt, tokens.shape[1]):
        logits, state = stepper.step(tokens[:, position : position + 1], state)
        torch.testing.assert_close(logits, whole[:, position], atol=1e-5, rtol=1e-4)
    assert [part.numel() for layer in state for part in layer] == sizes


def test_greedy_texts_are_those_without_a_state() -> None:
    model, tokens = _model().eval(), _tokens()[:1, :4]
    stepper = MambaStepper(model)
    logits, state = stepper.step(tokens, stepper.initial_state(1))
    text = tokens[0].tolist()
    for _ in range(30):
        text.append(int(logits.argmax()))
        logits, state = stepper.step(torch.tensor([text[-1:]]), state)
    plain = tokens[0].tolist()
    for _ in range(30):
        plain.append(int(model(torch.tensor([plain]))[0, -1].argmax()))
    assert text == plain


def test_padding_leaves_no_trace() -> None:
    model, tokens = _model().eval(), _tokens()
    stepper = MambaStepper(model)
    padding = torch.tensor([3, 0])
    logits, state = stepper.step(tokens, stepper.initial_state(2), padding)
    alone, lone_state = stepper.step(tokens[:1, 3:], stepper.initial_state(1))
    torch.testing.assert_close(logits[:1], alone, atol=1e-6, rtol=1e-5)
    for layer, lone in zip(state, lone_state, strict=True):
        for mine, theirs in zip(layer, lone, strict=True):
            torch.testing.assert_close(mine[:1], theirs, atol=1e-6, rtol=1e-5)


def test_the_residual_stream_is_fp32_where_it_is_asked_for() -> None:
    for wanted, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = _model(SMALL.model_copy(update={"residual_in_fp32": wanted})).bfloat16()
        seen: list[torch.dtype] = []
        model.layers[2].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].dtype))
        assert model(_tokens()).dtype == torch.bfloat16
        assert seen == [dtype]


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_every_block_compiles_without_a_graph_break() -> None:
    model, tokens = _model(), _tokens()
    expected = model(tokens, tokens)["loss"]
    for unit in SPEC.compiled_units(model):
        unit.compile(fullgraph=True, backend="aot_eager")
    loss = model(tokens, tokens)["loss"]
    torch.testing.assert_close(loss, expected)
    loss.backward()


def test_other_models_have_no_partial_recomputation() -> None:
    assert GPT2Config.recomputations == ("full",)
