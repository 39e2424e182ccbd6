"""The optimizer's step in one pass over a group: its kernel (interpreted here) against plain PyTorch, and the flat
optimizer with it against the path that gathers gradients first."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from zerofit.engines import flat_optimizer
from zerofit.engines.flat_optimizer import FlatOptimizer
from zerofit.kernels import optimizer_group
from zerofit.kernels.optimizer_group import Flat, GroupStep, Places, Tables, reference
from zerofit.kernels.optimizer_step import BLOCK, Figures, Moment, Rule
from zerofit.planning.optimizer_states import gathers_gradients, state_groups
from zerofit.planning.plan import OptimizerPlan

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Triton's interpreter cuts off where a GPU rounds to the nearest: compute copies in bf16 lie a step beside.
STEP_OF_BF16 = 2**-7
#: Whole tiles; one element; less than a tile; an odd end; a tile and one element.
SIZES = (2 * 1024, 1, 300, 2 * 1024 + 77, 1025)


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    """conftest.py asks for the interpreter where there is no GPU."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles for the GPU here; the tests marked gpu run its kernels")


def spans_of(state: str, sizes: tuple[int, ...] = SIZES) -> list[tuple[int, int]]:
    """As `flat_optimizer.Group` lays parameters out: in 8 bits with gaps, else starts are odd."""
    spans, end = [], 0
    for size in sizes:
        spans.append((end, size))
        end += BLOCK * -(-size // BLOCK) if state == "8bit" else size
    return spans


def differences(
    rule: Rule, state: Any, master: str, gradient: str, copy: str | None, average: bool
) -> list[tuple[float, float]]:
    """Three steps of the kernel beside plain PyTorch, the second one skipped, with a parameter that gets no gradient in
    the last; of each tensor that is written, as `distance` has it."""
    spans, results = spans_of(state), []
    end = spans[-1][0] + BLOCK * -(-SIZES[-1] // BLOCK)
    for kernel in (True, False):
        random = torch.Generator().manual_seed(5)
        weights = torch.zeros(end)
        for start, size in spans:
            weights[start : start + size] = torch.randn(size, generator=random)
        weights = weights.to(DTYPES[master])
        moments = tuple(Moment(end, state, signed, CPU) for signed in rule.signed_moments)
        flat = Flat(weights, moments, weights.float() if average else None)
        copies = None if copy is None else [torch.zeros(size, dtype=DTYPES[copy]) for size in SIZES]
        own = GroupStep(rule, spans)
        for t in range(3):
            gradients: list[Tensor | None] = [
                (torch.randn(size, generator=random) * torch.logspace(-4, 0, size)).to(DTYPES[gradient])
                for size in SIZES
            ]
            if t == 2:
                gradients[3] = None
            figures = Figures.of(rule, torch.tensor(t + 1.0), torch.tensor(2.0), torch.tensor(float(t == 1)))
            places, weight = Places(gradients, copies), torch.tensor(0.3 + 0.3 * t) if average else None
            given: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "seed": (5 << 33) + 7, "stream": 3}
            if kernel:
                own(flat, places, figures, weight, **given)
            else:
                reference(rule, spans, flat, places, figures, weight, **given)
        averages = [] if flat.average is None else [flat.average]
        results.append([weights.float(), *(moment.read(0, end) for moment in moments), *(copies or ()), *averages])
    return [distance(a, b) for a, b in zip(*results, strict=True)]


def distance(found: Tensor, true: Tensor) -> tuple[float, float]:
    """Share of values that differ by more than rounding explains, and the largest difference."""
    assert found.dtype == true.dtype
    far, size = (found.double() - true.double()).abs(), true.double().abs()
    rounding = STEP_OF_BF16 if true.dtype == torch.bfloat16 else 1e-3 if true.dtype == torch.float16 else 1e-6
    return (far > rounding * size + 1e-6).double().mean().item(), far.max().item()


def cases() -> list[tuple[Any, ...]]:
    """Every rule, state and master; gradients' and copies' types and the average take turns."""
    others = itertools.cycle([("fp32", None, False), ("bf16", "bf16", True), ("fp16", "fp16", False),
                              ("bf16", "bf16", False), ("fp32", "bf16", True)])  # fmt: skip
    rules = (Rule(), Rule("lion", beta2=0.99), Rule("sgd"), Rule("sgd", nesterov=True))
    found = []
    for rule, state, master in itertools.product(rules, ("fp32", "bf16", "8bit"), ("fp32", "bf16")):
        gradient, copy, average = next(others)
        found.append((rule, state, master, gradient, None if master == "bf16" else copy, average))
    return found


@pytest.mark.parametrize("case", cases(), ids=lambda c: f"{c[0].kind}-{'-'.join(map(str, c[1:]))}")
def test_the_kernel_does_what_the_reference_does(case: tuple[Any, ...]) -> None:
    for share, largest in differences(*case):
        # A last bit may decide another way before a value is rounded at random: then by one code or one step of bf16.
        assert share <= (0 if case[1] == case[2] == "fp32" else 1e-3)
        assert largest <= 0.05


def test_programs_take_every_tile_once() -> None:
    tables = Tables(spans_of("fp32", (10_000, 0, 1, 5 * 1024)), CPU, programs=3)
    assert tables.tiles == 8  # 16 tiles
    found = [(p, first + k) for p, first in tables.programs.tolist() for k in range(tables.tiles)]
    assert [(p, t) for p, t in found if t * 1024 < (10_000, 0, 1, 5 * 1024)[p]] == [
        *((0, t) for t in range(10)), (2, 0), *((3, t) for t in range(5)),
    ]  # fmt: skip
    rule, spans = Rule(), spans_of("fp32", (10_000, 5))
    results = []
    for kernel in (True, False):
        flat = Flat(torch.ones(10_005), tuple(Moment(10_005, "fp32", s, CPU) for s in rule.signed_moments))
        figures = Figures.of(rule, torch.ones(()), torch.ones(()), torch.zeros(()))
        places = Places([torch.linspace(-1, 1, 10_000), torch.ones(5)], None)
        given: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "seed": 1, "stream": 0}
        if kernel:
            GroupStep(rule, spans, programs=3)(flat, places, figures, None, **given)
        else:
            reference(rule, spans, flat, places, figures, None, **given)
        results.append(flat.weights)
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


def test_addresses_are_sent_when_they_change() -> None:
    tables = Tables([(0, 4), (4, 4)], CPU)
    a, b, copy = torch.ones(4), torch.ones(4), torch.ones(4)
    tables.send(Places([a, None], [copy, copy]).addresses())
    assert tables.addresses.tolist() == [[a.data_ptr(), copy.data_ptr()], [0, copy.data_ptr()]]
    tables.send(Places([a, b], None).addresses())
    assert tables.addresses.tolist() == [[a.data_ptr(), 0], [b.data_ptr(), 0]]


# ------------------------------------------------------------------------------------------- the flat optimizer

OPTIMIZERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "adamw": ({}, "fp32", "fp32"),
    "adamw, bf16 copy": ({}, "bf16", "bf16"),
    "adamw, fp16 copy, average": ({"ema_decay": 0.9}, "fp16", "fp16"),
    "adamw, bf16 copy, fp32 gradients": ({"beta2": 0.999}, "bf16", "fp32"),
    "adamw bf16": ({"state": "bf16"}, "bf16", "bf16"),
    "adamw 8bit": ({"state": "8bit"}, "fp32", "fp32"),
    "adamw 8bit, bf16 master, average": ({"state": "8bit", "master": "bf16", "ema_decay": 0.9}, "bf16", "bf16"),
    "lion 8bit, bf16 master": ({"kind": "lion", "beta2": 0.99, "state": "8bit", "master": "bf16"}, "bf16", "bf16"),
    "lion": ({"kind": "lion", "beta2": 0.99}, "fp32", "fp32"),
    "sgd": ({"kind": "sgd", "nesterov": True}, "bf16", "bf16"),
    "muon": ({"kind": "muon", "momentum": 0.95, "nesterov": True}, "bf16", "bf16"),
    "adafactor": ({"kind": "adafactor"}, "fp32", "fp32"),
}

#: Odd sizes, so that starts are unaligned; two groups; more than a chunk, which a test makes small.
SHAPES = {"h.0.w": (37, 41), "h.0.b": (41,), "h.1.w": (64, 32), "h.1.b": (7,), "out": (1500,)}


def stepped(case: str, in_one_pass: bool) -> tuple[FlatOptimizer, dict[str, Tensor]]:
    """Four steps over two groups, one skipped; a parameter without gradient in one of them. What was left behind."""
    optimizer, copy, gradient_dtype = OPTIMIZERS[case]
    random = torch.Generator().manual_seed(3)
    weights = {
        name: torch.nn.Parameter(torch.randn(shape, generator=random).to(DTYPES[copy]))
        for name, shape in SHAPES.items()
    }
    gradients: dict[torch.nn.Parameter, Tensor | None] = {}
    own = FlatOptimizer(weights, lambda name: name.endswith("w"), OptimizerPlan(**optimizer), gradients.__getitem__)
    own.in_one_pass = in_one_pass
    initial = {name: torch.randn(weights[name].numel(), generator=random) for name in SHAPES}
    own.load(lambda name, role, start, stop: initial[name][start:stop] if role == "parameter" else None, 0)
    for t in range(4):
        for name, parameter in weights.items():
            gradient = torch.randn(parameter.shape, generator=random).to(DTYPES[gradient_dtype])
            gradients[parameter] = None if (t, name) in {(1, "h.1.w"), (3, "h.0.b")} else gradient
        own.step(1e-2, torch.tensor(2.0), torch.tensor(float(t == 2)))
    states = {f"{f.name}.{f.role}": f.data.clone() for f in own.fragments(0, 1)}
    return own, states | {f"{name}.copy": p.detach().clone().view(-1) for name, p in weights.items()}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_one_pass_is_the_path_that_gathers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_optimizer, "CHUNK_ELEMENTS", 1024)
    optimizer = OPTIMIZERS[case][0]
    (before, expected), (own, found) = stepped(case, False), stepped(case, True)
    assert own.applied_steps == before.applied_steps == 3
    kinds = [group.kind for group in state_groups(own.plan.kind, SHAPES, {name: name.endswith("w") for name in SHAPES})]
    assert [g.one_pass is None for g in own.groups] == [gathers_gradients(kind, "cuda") for kind in kinds]
    assert expected.keys() == found.keys()
    exact = optimizer.get("state", "fp32") == "fp32" and optimizer.get("master", "fp32") == "fp32"
    for name, true in expected.items():
        share, largest = distance(found[name], true)
        assert share <= (0 if exact else 3e-3), name
        assert largest <= 0.05, name


def test_one_pass_gathers_nothing_and_the_other_way_does(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []
    true = FlatOptimizer._gather

    def counted(self: FlatOptimizer, group: Any, start: int, stop: int, gradient: Tensor) -> None:
        gathered.append(gradient.numel())
        true(self, group, start, stop, gradient)

    monkeypatch.setattr(FlatOptimizer, "_gather", counted)
    stepped("adamw, bf16 copy", True)
    assert not gathered
    stepped("adamw, bf16 copy", False)
    assert len(gathered) == 8
    gathered.clear()
    stepped("muon", True)  # its matrices one by one; AdamW's share in one pass
    assert gathered == 4 * [37 * 41, 64 * 32]


def test_where_the_kernel_is_wrong_or_missing_gradients_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    from zerofit.kernels import optimizer_step_triton

    expected = stepped("adamw 8bit", False)[1]
    monkeypatch.setattr(optimizer_step_triton, "step_group", lambda *_: None)
    optimizer_group._kernel_agrees.cache_clear()
    try:
        with pytest.warns(UserWarning, match="the optimizer's step is off by .* gathered in fp32 first"):
            found = stepped("adamw 8bit", True)[1]
    finally:
        optimizer_group._kernel_agrees.cache_clear()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gradients_of_two_types_are_gathered() -> None:
    kernel, flat = GroupStep(Rule("lion"), [(0, 2), (2, 2)]), Flat(torch.ones(4), (Moment(4, "fp32", True, CPU),))
    assert kernel.runs(flat, Places([torch.ones(2), None], None))
    with pytest.warns(UserWarning, match="takes gradients of one type"):
        assert not kernel.runs(flat, Places([torch.ones(2), torch.ones(2).bfloat16()], None))
