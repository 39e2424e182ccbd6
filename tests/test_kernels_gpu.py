"""The kernels on a GPU: against float64, against each other, under capture and compile, and what they do not take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from test_kernels_selective_scan import NAMES, check, leaves, make
from test_kernels_small import CONV_SHAPES, close, conv_case, conv_grads, loss_case, loss_truth, norm_truth
from zerofit.kernels import causal_conv, head_loss, nvrtc, rms_norm, selective_scan_cuda, selective_scan_torch
from zerofit.kernels import selective_scan as scan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

#: Largest relative error of output and gradients, norm over norm.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
DTYPES = list(ROUNDING)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "width", "states"),
    [(2, 100, 32, 16), (1, 333, 40, 16), (3, 65, 7, 16), (1, 1, 5, 16), (2, 130, 36, 8), (1, 70, 24, 32),
     (2, 70, 20, 64), (1, 90, 12, 24), (1, 77, 17, 10), (1, 128, 64, 1)],
)  # fmt: skip
def test_scan(batch: int, length: int, width: int, states: int, dtype: torch.dtype) -> None:
    check(make(batch, length, width, states, dtype, device="cuda"), ROUNDING[dtype])


@pytest.mark.parametrize(("width", "states"), [(32, 16), (17, 10)])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_scan_options(width: int, states: int, fixed: bool, gate: bool) -> None:
    inputs: dict[str, Any] = make(2, 100, width, states, torch.bfloat16, device="cuda")
    if not gate:
        inputs["z"] = None
    check(inputs, ROUNDING[torch.bfloat16], deterministic=fixed)


def test_scan_of_mixed_dtypes_and_odd_strides() -> None:
    inputs = make(2, 90, 24, 16, torch.bfloat16, device="cuda")
    inputs["delta"] = inputs["delta"].float()
    check(inputs, ROUNDING[torch.bfloat16])
    inputs = make(2, 90, 24, 16, torch.bfloat16, device="cuda")
    turned = {n: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 3 else x for n, x in inputs.items()}
    check(turned, ROUNDING[torch.bfloat16])


def _differences(inputs: dict[str, Tensor]) -> float:
    """Largest relative difference of output and gradients from the blocked PyTorch path in float64."""
    args = [inputs[n] for n in NAMES]
    u, delta, A, B, C, D, z, bias = args
    grad = torch.randn_like(u)
    out, states = selective_scan_cuda.forward(u, delta, A, B, C, D, z, bias)
    found = [out, *selective_scan_cuda.backward(grad, u, delta, A, B, C, D, z, bias, states, False)]
    wide = [x.double() for x in args]
    out, states, _ = selective_scan_torch.forward(*wide)
    true = [out, *selective_scan_torch.backward(grad.double(), *wide, states)]
    return max(float((x.double() - y).norm() / y.norm()) for x, y in zip(found, true, strict=True))


@pytest.mark.parametrize(("batch", "length", "width"), [(1, 640, 9728), (2, 640, 300), (1, 1024, 96), (1, 4096, 1536)])
def test_scan_cut_in_time(batch: int, length: int, width: int) -> None:
    inputs = make(batch, length, width, 16, torch.float32, device="cuda")
    assert selective_scan_cuda.chosen(inputs["u"], inputs["A"])[1].chunk < length
    assert _differences(inputs) < 2e-6


def test_scan_repeats_bit_for_bit_when_asked() -> None:
    inputs = make(2, 300, 200, 16, torch.bfloat16, device="cuda")
    runs = []
    for _ in range(3):
        given = leaves(inputs)
        scan.selective_scan(**given, deterministic=True).float().square().sum().backward()
        runs.append([given[n].grad for n in NAMES])
    for other in runs[1:]:
        assert all(bool((x == y).all()) for x, y in zip(runs[0], other, strict=True))


def test_scan_under_capture_and_compile() -> None:
    inputs = make(1, 200, 64, 16, torch.bfloat16, device="cuda")
    expected = scan.selective_scan(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = scan.selective_scan(**inputs)
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    compiled = torch.compile(scan.selective_scan, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), expected, rtol=0, atol=0)


def test_scan_falls_back_with_a_warning() -> None:
    selective_scan_cuda._warn.cache_clear()
    with pytest.warns(UserWarning, match="takes d_state up to 64, not 72.*10 to 50 times as long"):
        check(make(1, 40, 8, 72, torch.float32, device="cuda"), ROUNDING[torch.float32])


def test_final_state_and_steps() -> None:
    inputs = make(2, 130, 40, 16, device="cuda")
    true, last = scan.selective_scan_reference(**inputs)
    out, state = scan.selective_scan_final_state(**inputs)
    torch.testing.assert_close(out, true, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_bad_source_is_answered_in_the_compilers_words() -> None:
    with pytest.raises(nvrtc.Unavailable, match=r"(?s)could not compile.*nonsense"):
        nvrtc.compile_source("nonsense", {}, torch.cuda.get_device_capability())


@pytest.mark.parametrize("shape", [*CONV_SHAPES, (2, 300, 700, 4), (1, 20, 8, 6)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_convolution(shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool) -> None:
    x, weight, bias, grad = conv_case(shape, dtype, with_bias)
    true = conv_grads(x, weight, bias, grad)
    given = [t.cuda().detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = causal_conv.causal_conv_silu(given[0], given[1], given[2] if with_bias else None)
    out.backward(grad.cuda())
    for found, expected in zip([out.detach(), *(t.grad for t in given)], true, strict=True):
        close(found.cpu(), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 8), (600, 4864), (4, 20000)])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight, grad = (torch.randn(s, device="cuda", dtype=dtype) for s in (shape, shape, shape[-1:], shape))
    exact = [t.double().requires_grad_() for t in (x, residual, weight)]
    norm_truth((exact[0] + exact[1]).to(dtype).double(), exact[2], 1e-5).backward(grad.double())
    given = [t.clone().requires_grad_() for t in (x, residual, weight)]
    normed, _ = rms_norm.add_rms_norm(*given, 1e-5)
    normed.backward(grad)
    for one, other in zip(given, exact, strict=True):
        close(one.grad.cpu(), other.grad.cpu(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss(dtype: torch.dtype) -> None:
    x, weight, targets = (t.cuda() for t in loss_case(100, 64, 5056, 5003, dtype))
    loss, dx, dweight = loss_truth(x, weight, targets, 5003)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    found = head_loss.linear_cross_entropy(x, weight, targets, vocab_size=5003, chunk_tokens=32)
    (3 * found).backward()
    torch.testing.assert_close(found.detach(), loss, rtol=1e-5, atol=0)
    close(x.grad.cpu(), dx.cpu(), dtype)
    close(weight.grad.cpu(), dweight.cpu(), dtype)
    wrong = head_loss.linear_cross_entropy(x, weight, torch.full_like(targets, 5003), vocab_size=5003)
    assert bool(wrong.isnan())
