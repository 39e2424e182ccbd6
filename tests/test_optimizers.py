"""Optimizers and low-bit states: the kernel, every kind under every engine that carries it, saving and resuming."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from processes import run
from test_conformance import (
    STEPS,
    States,
    Trained,
    assert_same_states,
    make_plan,
    resume,
    train,
)
from zerofit.config.models import GPT2Config
from zerofit.config.optimizers import OPTIMIZER_DEFAULTS
from zerofit.engines import decoding
from zerofit.engines.flat_optimizer import FlatOptimizer
from zerofit.engines.updates import orthogonalized
from zerofit.kernels.optimizer_step import BLOCK, Figures, Moment, Rule, philox, round_stochastically, step
from zerofit.planning import optimizer_states
from zerofit.planning.memory import state_bytes
from zerofit.planning.plan import OptimizerPlan
from zerofit.types import StepResult

CPU = torch.device("cpu")
CLIP = {"grad_clip": 0.5}
#: Optimizer, and how far its losses may lie from those of the same optimizer in fp32 on one process. Low-bit states
#: change the losses of ten steps by a thousandth or less here; ten times that is allowed.
CASES: dict[str, tuple[dict[str, Any], str, float]] = {
    "lion": ({"kind": "lion", "beta2": 0.99}, "fp32", 1e-5),
    "sgd": ({"kind": "sgd", "momentum": 0.9, "nesterov": True}, "fp32", 1e-5),
    "adamw bf16": ({"state": "bf16"}, "fp32", 1e-2),
    "adamw 8bit": ({"state": "8bit"}, "fp32", 1e-2),
    "adamw 8bit, bf16 master": ({"state": "8bit", "master": "bf16"}, "bf16", 1e-2),
    "adamw fp32, bf16 master": ({"master": "bf16"}, "bf16", 1e-2),
    "lion 8bit, bf16 master": ({"kind": "lion", "beta2": 0.99, "state": "8bit", "master": "bf16"}, "bf16", 1e-2),
    "average": ({"ema_decay": 0.9}, "fp32", 1e-5),
    "average 8bit, bf16 master": ({"ema_decay": 0.9, "state": "8bit", "master": "bf16"}, "bf16", 1e-2),
    "muon": ({"kind": "muon", "momentum": 0.95, "nesterov": True}, "fp32", 1e-3),
    "adafactor": ({"kind": "adafactor"}, "fp32", 1e-5),
}
#: Each case under the engines that are likeliest to get it wrong; what is left out here runs in the others.
PAIRS = [
    *(("lion", variant) for variant in ("ddp", "zero2-cpu")),
    ("sgd", "zero3"),
    ("adamw bf16", "ddp"),
    *(("adamw 8bit", variant) for variant in ("single", "zero2")),
    *(("adamw 8bit, bf16 master", variant) for variant in ("ddp", "fsdp2", "zero1", "zero2", "zero3")),
    *(("adamw fp32, bf16 master", variant) for variant in ("fsdp2", "zero3")),
    ("lion", "fsdp2"),
    ("lion 8bit, bf16 master", "ddp"),
    *(("average", variant) for variant in ("ddp", "zero3-cpu")),
    *(("average 8bit, bf16 master", variant) for variant in ("fsdp2", "zero2")),
    ("muon", "ddp"),
    ("adafactor", "ddp"),
]


def plan_of(case: str, variant: str) -> Any:
    optimizer, precision, _ = CASES[case]
    return make_plan(variant, precision=precision, optimizer={**CLIP, **optimizer})


@functools.cache
def trained(case: str, variant: str) -> list[Trained]:
    plan = plan_of(case, variant)
    ranks: list[Trained] = run(plan.world_size, train, plan, STEPS, 3)
    return ranks


@functools.cache
def in_fp32(kind: str) -> list[StepResult]:
    """The losses of an optimizer with fp32 states on one process."""
    optimizer = next(o for o, _, _ in CASES.values() if o.get("kind", "adamw") == kind)
    optimizer = {name: value for name, value in optimizer.items() if name not in ("state", "master")}
    ranks: list[Trained] = run(1, train, make_plan(optimizer={**CLIP, **optimizer}), STEPS)
    return ranks[0].steps


@pytest.mark.parametrize(("case", "variant"), PAIRS)
def test_every_engine_trains_the_same(case: str, variant: str) -> None:
    optimizer, _, tolerance = CASES[case]
    expected = in_fp32(optimizer.get("kind", "adamw"))
    for mine, theirs in zip(trained(case, variant)[0].steps, expected, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=tolerance)
    assert len({result.loss for result in expected}) == STEPS
    assert trained(case, variant)[0].steps == trained(case, variant)[-1].steps


@pytest.mark.parametrize(("case", "variant"), PAIRS)
def test_load_after_save_changes_nothing_and_later_steps_are_the_same(case: str, variant: str) -> None:
    plan, before = plan_of(case, variant), trained(case, variant)
    saved = put_together(before)
    again: list[Trained] = run(plan.world_size, resume, plan, saved, before[0].scalars)
    assert_same_states(put_together(again), saved)
    assert {role for _, role in saved} == {"parameter", *expected_roles(case)}
    assert again[0].later == before[0].later


def put_together(ranks: list[Trained]) -> States:
    """Whole tensors by name and role; Adafactor's factors have shapes of their own."""
    parts: dict[tuple[str, str], list[Any]] = {}
    for piece in sorted((piece for rank in ranks for piece in rank.pieces), key=lambda piece: piece.start):
        parts.setdefault((piece.name, piece.role), []).append(piece)
    for (_, role), pieces in parts.items():
        assert sum(len(piece.data) for piece in pieces) == np.prod(pieces[0].shape), role
    return {key: np.concatenate([piece.data for piece in pieces]) for key, pieces in parts.items()}


def expected_roles(case: str) -> set[str]:
    optimizer = CASES[case][0]
    kind = optimizer.get("kind", "adamw")
    roles = set(optimizer_states.MEANS[kind]) | ({"exp_avg", "exp_avg_sq"} if kind == "muon" else set())
    roles |= {*optimizer_states.FACTORS, "exp_avg_sq"} if kind == "adafactor" else set()
    return roles | ({"ema"} if "ema_decay" in optimizer else set())


@pytest.mark.parametrize(("case", "variant"), PAIRS)
def test_memory_is_what_the_plan_says(case: str, variant: str) -> None:
    busiest = max((rank.memory for rank in trained(case, variant)), key=lambda items: sum(items.values()))
    assert busiest == state_bytes(plan_of(case, variant))


def test_low_bit_states_are_small() -> None:
    """Bytes a parameter: 2 compute copy and master, 2 gradient bucket, 2.03 moments; 16 otherwise."""
    model = GPT2Config(n_layer=2, n_head=2, n_embd=256, block_size=64, vocab_size=256)
    small, usual = (
        sum(state_bytes(make_plan("ddp", **of_model(model), precision="bf16", optimizer=optimizer)).values())
        / model.parameter_count()
        for optimizer in ({"state": "8bit", "master": "bf16"}, {})
    )
    assert usual == pytest.approx(16)
    assert small == pytest.approx(6.03, rel=0.01)


def of_model(model: GPT2Config) -> dict[str, Any]:
    return {"model": model, "parameters": model.parameter_count()}


def test_a_skipped_step_changes_nothing() -> None:
    for case in CASES:
        optimizer, precision, _ = CASES[case]
        plan = OptimizerPlan(**optimizer)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        weights = {
            "h.0.w": torch.nn.Parameter(torch.randn(6, 300).to(dtype)),
            "b": torch.nn.Parameter(torch.ones(5, dtype=dtype)),
        }
        gradients = {p: torch.randn_like(p) for p in weights.values()}
        own = FlatOptimizer(weights, lambda name: name != "b", plan, gradients.__getitem__)
        one = torch.ones(())
        own.step(1e-2, one, torch.zeros(()))
        before = [fragment.data.clone() for fragment in own.fragments(0, 1)]
        for gradient in gradients.values():
            gradient.fill_(float("nan"))
        own.step(1e-2, one, one)
        assert own.applied_steps == 1
        for old, new in zip(before, own.fragments(0, 1), strict=True):
            assert torch.equal(old, new.data), (case, new.role)


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd", "muon", "adafactor"])
def test_each_optimizer_is_the_published_one(kind: str) -> None:
    """Against torch's own; Lion, and SGD with decoupled decay, against their two lines."""
    torch.manual_seed(1)
    matrix, vector = torch.randn(24, 40), torch.randn(40)
    ours = {"h.0.w": torch.nn.Parameter(matrix.clone()), "h.0.b": torch.nn.Parameter(vector.clone())}
    theirs = [torch.nn.Parameter(matrix.clone()), torch.nn.Parameter(vector.clone())]
    fields = OPTIMIZER_DEFAULTS[kind] | ({"nesterov": True} if kind == "sgd" else {})
    own = FlatOptimizer(ours, lambda name: name == "h.0.w", OptimizerPlan(kind=kind, **fields), lambda p: p.grad)
    initial = {"h.0.w": matrix.view(-1), "h.0.b": vector}
    own.load(lambda name, role, start, stop: initial[name] if role == "parameter" else None, 0)
    lr, momentum = 0.01, [torch.zeros(24, 40), torch.zeros(40)]
    adamw = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8}
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    others: list[torch.optim.Optimizer] = {
        "adamw": lambda: [torch.optim.AdamW(groups, **adamw)],
        "adafactor": lambda: [torch.optim.Adafactor(groups, lr=lr)],
        "muon": lambda: [
            torch.optim.Muon(theirs[:1], lr=lr, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(theirs[1:], weight_decay=0.0, **adamw),
        ],
    }.get(kind, list)()
    for _ in range(5):
        for mine, other in zip(ours.values(), theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone() / 2
        own.step(lr, torch.tensor(2.0), torch.zeros(()))
        for optimizer in others:
            optimizer.step()
        if kind in ("lion", "sgd"):
            for index, other in enumerate(theirs):
                decay, g = 0.1 if index == 0 else 0.0, other.grad
                if kind == "lion":
                    update = (0.9 * momentum[index] + 0.1 * g).sign()
                    momentum[index] = 0.99 * momentum[index] + 0.01 * g
                else:
                    momentum[index] = 0.9 * momentum[index] + g
                    update = g + 0.9 * momentum[index]
                with torch.no_grad():
                    other.mul_(1 - lr * decay).sub_(update, alpha=lr)
    for mine, other in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_orthogonalized() -> None:
    for shape in ((20, 50), (50, 20)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape), 5))
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_the_average_follows_the_weights() -> None:
    """Without one in the checkpoint it starts at the weights; young averages decay faster."""
    weight = {"w": torch.nn.Parameter(torch.randn(300))}
    own = FlatOptimizer(weight, lambda name: True, OptimizerPlan(ema_decay=0.5), lambda p: torch.zeros_like(p))
    own.load(lambda name, role, start, stop: torch.ones(stop - start) if role == "parameter" else None, 0)
    assert {f.role: f.data[0].item() for f in own.fragments(0, 1)}["ema"] == 1.0
    for _ in range(3):
        own.step(1.0, torch.ones(()), torch.zeros(()))  # decay only: weights 0.9, 0.81, 0.729
    states = {f.role: f.data[0].item() for f in own.fragments(0, 1)}
    expected = 1.0
    for t, value in ((1, 0.9), (2, 0.81), (3, 0.729)):
        share = min(0.5, (1 + t) / (10 + t))
        expected = share * expected + (1 - share) * value
    assert states["ema"] == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------------------------ the kernel


@pytest.mark.parametrize("signed", [True, False])
def test_requantising_a_decoded_block_gives_the_same_codes(signed: bool) -> None:
    values = torch.randn(40 * BLOCK + 17) ** 3 * torch.logspace(-30, 3, 40 * BLOCK + 17)
    values[:BLOCK] = 0
    values = values if signed else values.square().clamp(max=1e30)
    moment = Moment(values.numel(), "8bit", signed, CPU)
    moment.write(0, values)
    decoded, codes = moment.read(0, values.numel()), moment.values.clone()
    assert len(codes.unique()) > 200
    moment.write(0, decoded)
    assert torch.equal(moment.values, codes)
    assert torch.equal(moment.read(0, values.numel()), decoded)
    assert torch.equal(moment.read(300, 700), decoded[300:700])
    largest = values[BLOCK : 2 * BLOCK].abs().max()
    assert decoded[BLOCK : 2 * BLOCK].abs().max() in (largest, 0.0)


@pytest.mark.parametrize("state", ["fp32", "bf16", "8bit"])
def test_states_are_shown_in_pieces(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every interval once, in order, none longer than a piece where it is a copy; an fp32 state is a view, whole."""
    monkeypatch.setattr(decoding, "DECODED_ELEMENTS", 1000)
    moment = Moment(5000, state, True, CPU)
    moment.write(0, torch.randn(5000))
    whole = moment.read(0, 5000)
    intervals = [("a", 3, 10), ("b", 10, 2900), ("c", 3000, 3001), ("d", 4096, 5000)]
    found = list(decoding.in_fp32(moment, intervals))
    together: dict[str, list[torch.Tensor]] = {}
    starts = {owner: start for owner, start, _ in intervals}
    for owner, offset, values in found:
        start = starts[owner] + offset
        assert torch.equal(values, whole[start : start + values.numel()])
        assert sum(part.numel() for part in together.setdefault(owner, [])) == offset
        together[owner].append(values)
    assert {owner: sum(p.numel() for p in parts) for owner, parts in together.items()} == {
        owner: stop - start for owner, start, stop in intervals
    }
    if state == "fp32":
        assert len(found) == 4
        assert all(values.untyped_storage().data_ptr() == moment.values.data_ptr() for _, _, values in found)
    else:
        assert max(values.numel() for _, _, values in found) <= 1000
        assert len({values.untyped_storage().data_ptr() for _, _, values in found}) == 4


def test_stochastic_rounding_keeps_the_expectation() -> None:
    n = 200_000
    words = philox(7, torch.arange(n), torch.tensor(3), 1)
    for word in words:
        assert word.double().mean().item() / 2**32 == pytest.approx(0.5, abs=5e-3)
    value = torch.full((n,), 1.001)
    rounded = round_stochastically(value, words[0])
    assert set(rounded.float().unique().tolist()) == {1.0, 1.0078125}
    assert rounded.double().mean().item() == pytest.approx(1.001, abs=1e-4)
    again = philox(7, torch.arange(n), torch.tensor(4), 1)
    assert not torch.equal(words[0], again[0])


@pytest.mark.parametrize("state", ["bf16", "8bit"])
def test_a_slow_mean_does_not_stand_still(state: Any) -> None:
    """With decay 0.999 a step changes a mean by a thousandth, less than half a step of either type."""
    rule, n = Rule(beta2=0.999), 50 * BLOCK
    means = tuple(Moment(n, state, signed, CPU) for signed in rule.signed_moments)
    means[1].write(0, torch.full((n,), 4.0))
    weights = torch.zeros(n)
    for t in range(200):
        figures = Figures.of(rule, torch.tensor(t + 1.0), torch.ones(()), torch.zeros(()))
        step(rule, torch.ones(n), weights, means, figures, lr=0.0, weight_decay=0.0, seed=1, stream=0)
    expected = 1 + 3 * 0.999**200
    assert means[1].read(0, n).double().mean().item() == pytest.approx(expected, rel=0.03)


def test_tritons_kernel_does_what_the_reference_does() -> None:
    pytest.importorskip("triton")
    # A process of its own: Triton decides when it is imported whether it interprets.
    code = "import json, test_optimizers; print(json.dumps(test_optimizers.both_kernels()))"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 12
    for case, weights, means in differences:
        assert weights <= 1e-6, case
        assert means <= 1e-6, case


def both_kernels() -> list[tuple[str, float, float]]:
    """Case, and the largest difference in weights and in means; with Triton's interpreter."""
    from zerofit.kernels import optimizer_step_triton

    found = []
    n, seed, first = 5 * BLOCK + 100, (5 << 33) + 7, 2**33
    gradients, initial = torch.randn(3, n) * torch.logspace(-6, 0, n), torch.randn(n)
    cases = [(k, s, w) for k in ("adamw", "lion") for s in ("fp32", "bf16", "8bit") for w in ("fp32", "bf16")]
    for kind, state, master in cases:
        rule, results = Rule(kind), []  # type: ignore[arg-type]
        for kernel in (False, True):
            weights = initial.to({"fp32": torch.float32, "bf16": torch.bfloat16}[master]).clone()
            means = tuple(Moment(n, state, signed, CPU) for signed in rule.signed_moments)  # type: ignore[arg-type]
            for t, gradient in enumerate(gradients):
                skipped = torch.tensor(float(t == 1))
                figures = Figures.of(rule, torch.tensor(t + 1.0), torch.tensor(2.0), skipped)
                if kernel:
                    optimizer_step_triton.step(rule, gradient, weights, means, figures, 1e-2, 0.1, seed, 3, first)
                else:
                    step(rule, gradient, weights, means, figures, lr=1e-2, weight_decay=0.1, seed=seed, stream=3,
                         first=first)  # fmt: skip
            results.append((weights.float(), torch.cat([mean.read(0, n) for mean in means])))
        (a, x), (b, y) = results
        found.append((f"{kind} {state} {master}", distance(a, b), distance(x, y)))
    return found


def distance(a: Tensor, b: Tensor) -> float:
    return float(np.max(np.abs((a - b).numpy())))
