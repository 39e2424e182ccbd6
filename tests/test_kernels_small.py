"""Short convolution, RMSNorm, head + loss: the PyTorch paths, the Triton kernels (interpreted here), the operators."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from zerofit.kernels import causal_conv, head_loss, rms_norm, triton_use

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def interpreted() -> Any:
    """The Triton kernels under the interpreter (conftest.py asks for it where there is no GPU)."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles for the GPU here; the tests marked gpu run its kernels")
    from zerofit.kernels import triton_kernels

    return triton_kernels


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(found: Tensor, true: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == true.shape
    error = (found.double() - true.double()).norm() / true.double().norm().clamp(min=1e-30)
    assert error < ROUNDING[dtype], float(error)


def conv_truth(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    taps = weight.shape[1]
    padded = F.pad(x.double().transpose(1, 2), (taps - 1, 0))
    pre = F.conv1d(padded, weight.double()[:, None], None if bias is None else bias.double(), groups=x.shape[2])
    return F.silu(pre).transpose(1, 2)


CONV_SHAPES = [(2, 37, 5, 4), (1, 1, 3, 4), (1, 34, 140, 2), (3, 3, 7, 1), (1, 32, 64, 3)]


def conv_case(
    shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    batch, length, channels, taps = shape
    x = normal(batch, length, 2 * channels, dtype=dtype)[..., :channels]  # rows of a wider projection
    bias = normal(channels, dtype=dtype, seed=2) if with_bias else None
    return x, normal(channels, taps, dtype=dtype, seed=1), bias, normal(batch, length, channels, dtype=dtype, seed=3)


def conv_grads(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    exact = [t.double().detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = conv_truth(exact[0], exact[1], exact[2] if bias is not None else None)
    out.backward(grad.double())
    return [out.detach(), *(t.grad for t in exact if t.grad is not None)]


@pytest.mark.parametrize("shape", CONV_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_convolution(shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool) -> None:
    x, weight, bias, grad = conv_case(shape, dtype, with_bias)
    given = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = causal_conv.causal_conv_silu(given[0], given[1], given[2] if with_bias else None)
    out.backward(grad)
    for found, true in zip([out.detach(), *(t.grad for t in given)], conv_grads(x, weight, bias, grad), strict=True):
        close(found, true, dtype)


@pytest.mark.parametrize("shape", CONV_SHAPES)
@pytest.mark.parametrize(
    ("dtype", "with_bias"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)]
)
def test_convolution_in_triton(
    interpreted: Any, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool
) -> None:
    monkeypatch.setattr(interpreted, "CONV_STEPS", 16)  # several spans and blocks of channels at small sizes
    monkeypatch.setattr(interpreted, "CONV_CHANNELS", 64)
    x, weight, bias, grad = conv_case(shape, dtype, with_bias)
    true = conv_grads(x, weight, bias, grad)
    close(interpreted.conv_forward(x, weight, bias), true[0], dtype)
    found = interpreted.conv_backward(grad, x, weight, bias)
    assert found[1].untyped_storage().data_ptr() != found[2].untyped_storage().data_ptr()
    for one, other in zip(found, true[1:], strict=False):
        close(one, other, dtype)


def test_convolution_steps_follow_the_whole() -> None:
    x, weight, bias, _ = conv_case((2, 9, 6, 4), torch.float32, True)
    out = causal_conv.causal_conv_silu(x, weight, bias)
    window = torch.zeros(2, 3, 6)
    for t in range(9):
        y, window = causal_conv.causal_conv_silu_step(window, x[:, t], weight, bias)
        torch.testing.assert_close(y, out[:, t])


def test_convolution_gradcheck_and_operator() -> None:
    args = [normal(2, 6, 3, dtype=torch.float64), normal(3, 4, dtype=torch.float64), normal(3, dtype=torch.float64)]
    args = [a.requires_grad_() for a in args]
    assert torch.autograd.gradcheck(causal_conv.causal_conv_silu, args)
    floats = [a.detach().float().requires_grad_() for a in args]
    torch.library.opcheck(torch.ops.zerofit.causal_conv_silu.default, tuple(floats))
    torch.library.opcheck(torch.ops.zerofit.causal_conv_silu.default, (*floats[:2], None))
    with pytest.raises(ValueError, match="takes x of"):
        causal_conv.causal_conv_silu(args[0], args[2][:, None].expand(3, 4)[:2], None)


def norm_truth(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


@pytest.mark.parametrize("shape", [(3, 5, 8), (7, 100), (1, 1, 1), (300, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["operator", "triton"])
def test_norms(interpreted: Any, shape: tuple[int, ...], dtype: torch.dtype, path: str) -> None:
    if path == "triton" and shape[0] == 300 and dtype != torch.float32:
        pytest.skip("one dtype shows that programs take several rows")
    eps, width = 1e-5, shape[-1]
    x, residual, weight = normal(*shape, dtype=dtype), normal(*shape, seed=1), normal(width, dtype=dtype, seed=2)
    grad, extra = normal(*shape, dtype=dtype, seed=3), normal(*shape, seed=4)
    exact = [t.double().requires_grad_() for t in (x, residual, weight)]
    total = exact[0] + exact[1]
    out = norm_truth(total, exact[2], eps)
    (out * grad + total * extra).sum().backward()
    alone = [t.double().requires_grad_() for t in (x, weight)]
    norm_truth(alone[0], alone[1], eps).backward(grad.double())
    if path == "operator":
        given = [t.clone().requires_grad_() for t in (x, residual, weight)]
        found, new = rms_norm.add_rms_norm(*given, eps)
        torch.autograd.backward([found, new], [grad, extra])
        d_residual, d_weight = given[1].grad, given[2].grad
        single = [t.clone().requires_grad_() for t in (x, weight)]
        first = rms_norm.rms_norm(*single, eps)
        first.backward(grad)
        d_alone, dw_alone = (t.grad for t in single)
    else:
        found, new = interpreted.norm_forward(x, residual, weight, eps)
        d_residual, d_weight = interpreted.norm_backward(grad, new, weight, eps, extra)
        first, _ = interpreted.norm_forward(x, None, weight, eps)
        d_alone, dw_alone = interpreted.norm_backward(grad, x, weight, eps, None)
    close(found.detach(), out.detach(), dtype)
    close(new.detach(), total.detach(), torch.float32)
    close(d_residual, exact[1].grad, torch.float32)
    close(d_weight, exact[2].grad, dtype)
    close(first.detach(), norm_truth(x, weight, eps), dtype)
    close(dw_alone, alone[1].grad, dtype)
    if width > 1:  # of a row of one the norm is a sign: its gradient is rounding
        close(d_alone, alone[0].grad, dtype)


def test_norms_gradcheck_and_operators() -> None:
    x, residual, weight = (
        normal(*s, dtype=torch.float64, seed=i).requires_grad_() for i, s in enumerate([(2, 3, 5)] * 2 + [(5,)])
    )
    assert torch.autograd.gradcheck(lambda *a: rms_norm.rms_norm(*a, 1e-6), (x, weight))
    assert torch.autograd.gradcheck(lambda *a: rms_norm.add_rms_norm(*a, 1e-6), (x, residual, weight))
    x, residual, weight = (t.detach().float().requires_grad_() for t in (x, residual, weight))
    torch.library.opcheck(torch.ops.zerofit.rms_norm.default, (x, weight, 1e-6))
    torch.library.opcheck(torch.ops.zerofit.add_rms_norm.default, (x, residual, weight, 1e-6))
    only = [t.detach().requires_grad_() for t in (x, residual, weight)]
    rms_norm.add_rms_norm(*only, 1e-6)[1].sum().backward()
    assert only[0].grad is not None
    assert only[2].grad is None
    with pytest.raises(ValueError, match="residual is"):
        rms_norm.add_rms_norm(x, residual[:1], weight, 1e-6)


def loss_case(tokens: int, width: int, rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(5))
    targets[1::3] = -100
    return normal(tokens, width, dtype=dtype), 0.3 * normal(rows, width, dtype=dtype, seed=1), targets


def loss_truth(x: Tensor, weight: Tensor, targets: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the separate operations do it: half logits, fp32 softmax."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    logits = F.linear(x, weight)[:, :vocab]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(wide, targets, ignore_index=-100, reduction="sum")
    (3 * loss).backward()
    assert x.grad is not None
    assert weight.grad is not None
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_loss(dtype: torch.dtype, chunk: int) -> None:
    x, weight, targets = loss_case(10, 12, 40, 33, dtype)
    loss, dx, dweight = loss_truth(x, weight, targets, 33)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    found = head_loss.linear_cross_entropy(x, weight, targets, vocab_size=33, chunk_tokens=chunk)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (3 * found).backward()
    close(found.detach(), loss, torch.float32)
    close(x.grad, dx, dtype)
    close(weight.grad, dweight, dtype)
    assert float(weight.grad[33:].abs().sum()) == 0
    with torch.no_grad():
        close(head_loss.linear_cross_entropy(x, weight, targets, vocab_size=33), loss, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "vocab"), [(40, 33), (5000, 4999), (8, 8)])
def test_loss_in_triton(interpreted: Any, dtype: torch.dtype, columns: int, vocab: int) -> None:
    logits = normal(7, columns, dtype=dtype)
    targets = torch.tensor([0, vocab - 1, -100, 3, 2, -100, 1])
    wide = logits[:, :vocab].float().requires_grad_()
    true = F.cross_entropy(wide, targets, ignore_index=-100, reduction="sum")
    true.backward()
    assert wide.grad is not None
    close(interpreted.softmax_loss_(logits, targets, vocab, False), true.detach(), torch.float32)
    close(interpreted.softmax_loss_(logits, targets, vocab, True), true.detach(), torch.float32)
    close(logits[:, :vocab], wide.grad, dtype)
    assert float(logits[:, vocab:].abs().sum()) == 0
    logits = normal(7, columns, dtype=dtype)
    interpreted.softmax_loss_(logits, targets, vocab, True, torch.tensor(3.5))
    close(logits[:, :vocab], 3.5 * wide.grad, dtype)
    wrong = interpreted.softmax_loss_(normal(1, columns, dtype=dtype), torch.tensor([vocab]), vocab, True)
    assert bool(wrong.isnan())


def test_fp16_gradients_neither_overflow_nor_vanish_before_they_are_scaled() -> None:
    """What a mean over many equal targets, and a loss scale, mean for sums that are rounded to fp16."""
    x = torch.full((16_384, 4), 8.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(8, 4, dtype=torch.float16, requires_grad=True)
    targets = torch.zeros(16_384, dtype=torch.int64)
    at_once = torch.ops.zerofit.linear_cross_entropy(x, weight, targets, 8, 2048, True)
    assert bool(at_once[2].isinf().any())  # as bf16 does it: 16,384 x 8 x 7/8
    loss = head_loss.linear_cross_entropy(x, weight, targets, vocab_size=8)
    (loss / 16_384).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0], torch.full((4,), -7.0, dtype=torch.float16))
    torch.testing.assert_close(weight.grad[1:], torch.full((7, 4), 1.0, dtype=torch.float16))
    # A word of probability 1e-9 under a loss scale of 2^16.
    x = torch.ones(3, 1, dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[20.7], [0.0]], dtype=torch.float16, requires_grad=True)
    loss = head_loss.linear_cross_entropy(x, weight, torch.zeros(3, dtype=torch.int64), vocab_size=2)
    (2.0**16 * loss).backward()
    true = 3 * 2.0**16 / (1 + float(weight[0].detach().double().exp()))
    assert weight.grad is not None
    assert float(weight.grad[1]) == pytest.approx(true, rel=1e-2)
    assert float(torch.ops.zerofit.linear_cross_entropy(x, weight, targets[:3], 2, 8, True)[2][1]) == 0


def test_fp16_loss_operators_and_memory() -> None:
    x, weight, targets = loss_case(6, 4, 8, 8, torch.float16)
    args = (x.requires_grad_(), weight.requires_grad_(), targets, 8, 4)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.zerofit.linear_cross_entropy_late.default, args, test_utils=tests)
    gradients = (x.detach(), weight.detach(), targets, 8, 4, torch.tensor(2.0))
    torch.library.opcheck(torch.ops.zerofit.linear_cross_entropy_gradients.default, gradients)
    frozen = head_loss.linear_cross_entropy(x, weight.detach(), targets, vocab_size=8)
    frozen.backward(retain_graph=True)
    frozen.backward()
    assert x.grad is not None
    assert weight.grad is None


def test_loss_extremes_bad_targets_and_second_backward() -> None:
    x, weight, targets = loss_case(6, 4, 8, 8, torch.float32)
    big = head_loss.linear_cross_entropy(1e4 * x, weight, targets, vocab_size=8)
    torch.testing.assert_close(big, loss_truth(1e4 * x, weight, targets, 8)[0])
    nothing = head_loss.linear_cross_entropy(x, weight, torch.full_like(targets, -100), vocab_size=8)
    assert float(nothing) == 0
    with pytest.raises(IndexError, match=r"outside 0\.\.6"):
        head_loss.linear_cross_entropy(x, weight, torch.full_like(targets, 7), vocab_size=7)
    with pytest.raises(ValueError, match=r"vocab_size 9 must lie in 1\.\.8"):
        head_loss.linear_cross_entropy(x, weight, targets, vocab_size=9)
    loss = head_loss.linear_cross_entropy(x.requires_grad_(), weight, targets, vocab_size=8)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_loss_operator_and_memory() -> None:
    x, weight, targets = loss_case(6, 4, 8, 8, torch.float32)
    args = (x.requires_grad_(), weight.requires_grad_(), targets, 8, 4, True)
    torch.library.opcheck(
        torch.ops.zerofit.linear_cross_entropy.default, args, test_utils=("test_schema", "test_faketensor")
    )
    saved = []
    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = torch.empty(8192, 256, dtype=torch.bfloat16, requires_grad=True)
        table = torch.empty(50304, 256, dtype=torch.bfloat16, requires_grad=True)
        loss = head_loss.linear_cross_entropy(x, table, torch.zeros(8192, dtype=torch.int64), vocab_size=50257)
        loss.backward()
        assert table.grad is not None
    assert sum(t.numel() for t in saved) == x.numel() + table.numel()  # the two gradients, no logits


def test_a_kernel_that_computes_something_else_is_not_used() -> None:
    right, wrong = [torch.ones(8)], [torch.full((8,), 1.1)]
    assert triton_use.agrees("x", lambda: right, lambda: right, "y")
    with pytest.warns(UserWarning, match="off by 1.0e-01 of its size here, and is not used"):
        assert not triton_use.agrees("x", lambda: wrong, lambda: right, "y")

    def refused() -> list[Tensor]:
        raise RuntimeError("no such instruction")

    with pytest.warns(UserWarning, match="ends with RuntimeError: no such instruction"):
        assert not triton_use.agrees("x", refused, lambda: right, "y")


def test_the_convolutions_kernels_are_compared_before_their_first_use(
    interpreted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = causal_conv._kernels_agree.__wrapped__
    assert check(torch.device("cpu"), torch.bfloat16, 4)
    true = interpreted.conv_backward

    def without_the_last_tap(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        dx, dweight, dbias = true(*args)
        return dx, dweight * torch.tensor([1.0, 1.0, 1.0, 0.0]), dbias

    monkeypatch.setattr(interpreted, "conv_backward", without_the_last_tap)
    with pytest.warns(UserWarning, match="short convolution"):
        assert not check(torch.device("cpu"), torch.bfloat16, 4)


def test_the_optimizers_kernel_is_compared_before_its_first_use(interpreted: Any) -> None:
    from zerofit.kernels import optimizer_step, optimizer_step_triton

    check, rule = optimizer_step._kernel_agrees.__wrapped__, optimizer_step.Rule("adamw")
    kinds = torch.float32, torch.bfloat16, torch.uint8
    assert check(optimizer_step_triton.step, rule, torch.device("cpu"), *kinds)
    with pytest.warns(UserWarning, match="the optimizer's step"):
        assert not check(lambda *_: None, rule, torch.device("cpu"), *kinds)


def test_shapes_that_a_kernel_does_not_take_fall_back_and_the_cost_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where `use_triton` is true; the reference computes them."""
    monkeypatch.setattr(causal_conv, "use_triton", lambda x: True)
    monkeypatch.setattr(rms_norm, "use_triton", lambda x: True)
    triton_use.falls_back.cache_clear()
    x, weight, bias, _ = conv_case((1, 9, 3, 6), torch.float32, True)
    with pytest.warns(UserWarning, match="convolution takes up to 4 taps, not 6: .* several times slower"):
        close(causal_conv.causal_conv_silu(x, weight, bias), conv_truth(x, weight, bias), torch.float32)
    x, weight, bias, _ = conv_case((65_536, 1, 1, 1), torch.float32, True)
    with pytest.warns(UserWarning, match="takes up to 65535 samples: .* several times slower"):
        close(causal_conv.causal_conv_silu(x, weight, bias), conv_truth(x, weight, bias), torch.float32)
    wide = normal(1, 16_385)
    with pytest.warns(UserWarning, match="takes rows up to 16384 wide, not 16385: .* several times slower"):
        close(rms_norm.rms_norm(wide, torch.ones(16_385), 1e-6), F.rms_norm(wide, (16_385,)), torch.float32)
    rms_norm.rms_norm(wide, torch.ones(16_385), 1e-6)  # said once
