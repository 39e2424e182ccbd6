"""The selective scan: the PyTorch path and the operators against the step-by-step definition in float64."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from zerofit.kernels import nvrtc, selective_scan_cuda, selective_scan_torch
from zerofit.kernels import selective_scan as scan

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
#: Largest relative error, norm over norm, of outputs and gradients that are rounded to the dtype.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float64: 1e-12}


def make(
    batch: int,
    length: int,
    width: int,
    states: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Inputs as a Mamba block makes them: u and z halves of one projection, B and C slices of another."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    wide = dtype if dtype == torch.float64 else torch.float32
    both = normal(batch, length, 2 * width).to(device, dtype)
    projection = normal(batch, length, 8 + 2 * states).to(device, dtype)
    return {
        "u": both[..., :width],
        "delta": (0.5 * normal(batch, length, width)).to(device, dtype),
        "A": (-2 * torch.rand(width, states, generator=g, dtype=torch.float64) - 0.1).to(device, wide),
        "B": projection[..., 8 : 8 + states],
        "C": projection[..., 8 + states :],
        "D": normal(width).to(device, wide),
        "z": both[..., width:],
        "delta_bias": (0.5 * normal(width) - 1).to(device, wide),
    }


def leaves(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Copies that want gradients, with the strides of the originals."""
    out = {}
    for name, x in inputs.items():
        if x is not None:
            copy = torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device=x.device)
            out[name] = copy.copy_(x).requires_grad_()
        else:
            out[name] = None
    return out


def truth(inputs: dict[str, Any], grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the definition in float64 on the same (rounded) inputs."""
    exact = leaves(inputs, torch.float64)
    out, _ = scan.selective_scan_reference(**exact)
    out.backward(grad.double())
    return out.detach(), {n: x.grad for n, x in exact.items() if x is not None}


def error(found: Tensor, true: Tensor) -> float:
    assert found.shape == true.shape
    return float((found.double() - true).norm() / true.norm().clamp(min=1e-30))


def check(inputs: dict[str, Any], tolerance: float, **options: Any) -> None:
    grad = torch.randn(inputs["u"].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grad = grad.to(inputs["u"].device, inputs["u"].dtype)
    true, true_grads = truth(inputs, grad)
    given = leaves(inputs)
    out = scan.selective_scan(**given, **options)
    out.backward(grad)
    assert out.dtype == inputs["u"].dtype
    errors = {"out": error(out.detach(), true)}
    for name, x in given.items():
        if x is not None:
            assert x.grad.dtype == x.dtype, name
            errors[name] = error(x.grad, true_grads[name])
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize(
    ("batch", "length", "width", "states"),
    [(2, 64, 8, 16), (1, 1, 3, 16), (2, 67, 5, 8), (1, 200, 7, 16), (1, 130, 6, 64), (2, 33, 4, 24), (3, 65, 1, 1)],
)
@pytest.mark.parametrize("gate", [True, False])
def test_blocks_follow_the_definition(batch: int, length: int, width: int, states: int, gate: bool) -> None:
    inputs: dict[str, Any] = make(batch, length, width, states)
    if not gate:
        inputs["z"] = None
    check(inputs, ROUNDING[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    check(make(2, 100, 12, 16, dtype), ROUNDING[dtype])


def test_half_parameters_are_used_as_fp32() -> None:
    inputs = make(1, 70, 8, 16, torch.bfloat16)
    for name in ("A", "D", "delta_bias"):
        inputs[name] = inputs[name].bfloat16()
    check(inputs, ROUNDING[torch.bfloat16])


@pytest.mark.parametrize(
    ("name", "value"),
    [("delta", 60.0), ("delta", -60.0), ("A", -1e4), ("A", -1e-8), ("z", -200.0), ("z", 0.0), ("u", 0.0), ("u", 1e4)],
)
def test_extreme_inputs(name: str, value: float) -> None:
    inputs = make(2, 90, 6, 16)
    inputs[name] = torch.full_like(inputs[name], value)
    grad = torch.ones(inputs["u"].shape)
    true, true_grads = truth(inputs, grad)
    given = leaves(inputs)
    out = scan.selective_scan(**given)
    out.backward(grad)
    torch.testing.assert_close(out.detach().double(), true, rtol=2e-5, atol=1e-30 + 2e-6 * float(true.abs().max()))
    for key, x in given.items():
        scale = float(true_grads[key].abs().max())
        torch.testing.assert_close(x.grad.double(), true_grads[key], rtol=1e-4, atol=1e-30 + 1e-5 * scale, msg=key)


def test_an_empty_sequence() -> None:
    given = leaves(make(2, 0, 4, 16))
    out = scan.selective_scan(**given)
    assert out.shape == (2, 0, 4)
    out.sum().backward()
    assert float(given["A"].grad.abs().sum()) == 0


def test_gradients_of_the_definition_and_of_the_blocks() -> None:
    inputs = leaves(make(1, 5, 2, 3, torch.float64))
    order = tuple(inputs[n] for n in NAMES)
    assert torch.autograd.gradcheck(lambda *x: scan.selective_scan_reference(*x)[0], order)
    assert torch.autograd.gradcheck(lambda *x: scan.selective_scan(*x), order)


def test_linear_scan_both_ways() -> None:
    g = torch.Generator().manual_seed(0)
    for steps, reverse in itertools.product((1, 2, 7, 12, 64), (False, True)):
        decay, value = (torch.rand(2, steps, 3, generator=g, dtype=torch.float64) for _ in range(2))
        carry = torch.rand(2, 3, generator=g, dtype=torch.float64)
        expected, state = value.clone(), carry
        for t in reversed(range(steps)) if reverse else range(steps):
            state = expected[:, t] + decay[:, t] * state
            expected[:, t] = state
        found = selective_scan_torch.linear_scan_(decay.clone(), value.clone(), carry, reverse=reverse)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("split", [1, 63, 64, 65, 128])
def test_a_prompt_in_two_parts_and_steps(split: int) -> None:
    inputs = make(2, 130, 6, 16)
    true, last = scan.selective_scan_reference(**inputs)

    def part(steps: slice) -> dict[str, Tensor]:
        return {n: x[:, steps] if n in ("u", "delta", "B", "C", "z") else x for n, x in inputs.items()}

    out, state = scan.selective_scan_final_state(**part(slice(0, split)))
    rest, after = scan.selective_scan_final_state(**part(slice(split, None)), initial_state=state)
    torch.testing.assert_close(torch.cat([out, rest], dim=1), true, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, last, rtol=1e-4, atol=1e-5)
    for t in range(split, min(split + 3, 130)):
        step = {n: x[:, 0] if x.dim() == 3 else x for n, x in part(slice(t, t + 1)).items()}
        y, state = scan.selective_scan_step(state, **step)
        torch.testing.assert_close(y, true[:, t], rtol=1e-4, atol=1e-5)


def test_shapes_that_do_not_belong_together_are_named() -> None:
    inputs = make(2, 8, 4, 16)
    with pytest.raises(ValueError, match=r"B is \(2, 7, 16\).*want \(2, 8, 16\)"):
        scan.selective_scan(**{**inputs, "B": inputs["B"][:, :7]})
    with pytest.raises(ValueError, match="takes u of"):
        scan.selective_scan(**{**inputs, "u": inputs["u"][0]})


def test_a_kernel_that_is_refused_falls_back_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either pass may be the one: what both paths keep is the same."""

    def refused(*_: Any, **__: Any) -> Any:
        raise nvrtc.Unavailable("the driver is too old")

    monkeypatch.setattr(selective_scan_cuda, "_refused", [])
    monkeypatch.setattr(selective_scan_cuda, "takes", lambda u, A: not selective_scan_cuda._refused)
    monkeypatch.setattr(selective_scan_cuda, "forward", lambda *x: selective_scan_torch.forward(*x)[:2])
    monkeypatch.setattr(selective_scan_cuda, "backward", refused)
    with pytest.warns(UserWarning, match="driver is too old.*10 to 50 times"):
        check(make(1, 70, 4, 16), ROUNDING[torch.float32])
    monkeypatch.setattr(selective_scan_cuda, "forward", refused)
    check(make(1, 70, 4, 16), ROUNDING[torch.float32])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"states": 72}, "d_state up to 64, not 72"),
        ({"shape": (65_536, 8, 4)}, "a batch up to 65535, not 65536"),
        ({"shape": (1, 2**30 + 1, 4)}, "up to 1073741824 steps, not 1073741825"),
        ({"dtype": torch.int8}, "takes fp32, bf16 and fp16, not torch.int8"),
        ({}, None),
    ],
    ids=str,
)
def test_shapes_that_the_kernel_does_not_take_are_said_with_their_cost(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str | None
) -> None:
    monkeypatch.setattr(selective_scan_cuda, "_machine", lambda device: None)
    selective_scan_cuda._warn.cache_clear()
    shape = changes.get("shape", (2, 8, 4))
    u: Any = SimpleNamespace(
        is_cuda=True, shape=shape, numel=lambda: 64, device=torch.device("cuda", 0),
        dtype=changes.get("dtype", torch.bfloat16),
    )  # fmt: skip
    states = torch.empty(shape[2], changes.get("states", 16))
    if words is None:
        assert selective_scan_cuda.takes(u, states)
        return
    with pytest.warns(UserWarning, match=f"{words}.*10 to 50 times as long"):
        assert not selective_scan_cuda.takes(u, states)


def test_operators_are_registered_whole() -> None:
    inputs = leaves(make(2, 70, 4, 8))
    args = (*(inputs[n] for n in NAMES), False)
    torch.library.opcheck(torch.ops.zerofit.selective_scan.default, args)
    without = [None if n == "z" else inputs[n] for n in NAMES]
    torch.library.opcheck(torch.ops.zerofit.selective_scan.default, (*without, True))


def test_nothing_as_large_as_all_states_is_kept() -> None:
    """Fake tensors, the planner's view: 7B's block keeps its inputs and one state every STATE_INTERVAL steps."""
    length, width, states = 4096, 9728, 16
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[id(x.untyped_storage())] = x.untyped_storage().nbytes()
        return x

    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        both = torch.empty(1, length, 2 * width, dtype=torch.bfloat16, requires_grad=True)
        u, z = both.chunk(2, dim=-1)
        delta = torch.empty(1, length, width, dtype=torch.bfloat16, requires_grad=True)
        B, C = torch.empty(1, length, 2 * states, dtype=torch.bfloat16, requires_grad=True).chunk(2, dim=-1)
        A = torch.empty(width, states, requires_grad=True)
        vectors = [torch.empty(width, requires_grad=True) for _ in range(2)]
        out = scan.selective_scan(u, delta, A, B, C, vectors[0], z, vectors[1])
        assert out.dtype == torch.bfloat16
        out.sum().backward()
        assert both.grad is not None
    token = length * width
    every_state = token * states * 4
    assert sum(kept.values()) < 6 * token + token * states * 4 // scan.STATE_INTERVAL + every_state // 100


def test_under_compile_and_checkpointing() -> None:
    inputs = make(1, 70, 8, 8)

    def loss(given: dict[str, Tensor], how: str) -> Tensor:
        if how == "checkpoint":
            return checkpoint(lambda *x: scan.selective_scan(*x), *(given[n] for n in NAMES), use_reentrant=False).sum()
        f = (
            torch.compile(scan.selective_scan, backend="aot_eager", fullgraph=True)
            if how == "compile"
            else scan.selective_scan
        )
        return f(**given).sum()

    grads = []
    for how in ("eager", "checkpoint", "compile"):
        given = leaves(inputs)
        loss(given, how).backward()
        grads.append([given[n].grad for n in NAMES])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0])
