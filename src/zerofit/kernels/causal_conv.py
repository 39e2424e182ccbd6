"""Depthwise causal convolution + SiLU over (B, L, C), channel-last, in one pass (Mamba's short convolution).

Shape legend: B samples, L steps, C channels, W taps.

::

    pre[b,t,c] = bias[c] + sum_k weight[c,k] x[b,t-(W-1)+k,c]          x before the first step is 0
    out        = pre sigmoid(pre)

Only the inputs are kept for the backward pass. On a GPU both passes are one Triton kernel each (up to four
taps); elsewhere PyTorch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..config.models import CONV_MAX_TAPS
from .triton_use import agrees, falls_back, use_triton

#: Largest batch that the Triton kernels take: the third dimension of a grid.
MAX_BATCH = 65535
_COST = "PyTorch's operations take its place, several times slower, in fp32 copies of their inputs"


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of the depthwise causal convolution; fp32 inside, differentiable in all three.

    Args:
        x: (B, L, C), any float dtype; rows may be strided.
        weight: (C, W), the last tap falls on the step itself (as in ``nn.Conv1d`` with left padding).
        bias: (C,) or None.

    Returns: (B, L, C), contiguous, in x's dtype.

    Raises: ValueError when the shapes do not belong together.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] == 0:
        raise ValueError(
            f"causal_conv_silu takes x of (batch, length, channels) and weight of (channels, taps); "
            f"x is {tuple(x.shape)} and weight is {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (x.shape[2],):
        raise ValueError(f"causal_conv_silu: bias is {tuple(bias.shape)}, for {x.shape[2]} channels")
    out: Tensor = torch.ops.zerofit.causal_conv_silu(x, weight, bias)
    return out


def causal_conv_silu_step(window: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step of generation.

    Args: window: (B, W - 1, C), the inputs before; x: (B, C).

    Returns: the output (B, C) in x's dtype, and the next window.
    """
    window = torch.cat([window, x[:, None].to(window.dtype)], dim=1)
    pre = torch.einsum("bwc,cw->bc", window.float(), weight.float())
    if bias is not None:
        pre = pre + bias.float()
    return torch.nn.functional.silu(pre).to(x.dtype), window[:, 1:]


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the Triton kernels run this: up to four taps (Mamba's), and a batch that a grid takes."""
    if x.numel() == 0 or not use_triton(x):
        return False
    taps, batch = weight.shape[1], x.shape[0]
    if taps > CONV_MAX_TAPS or batch > MAX_BATCH:
        reason = (
            f"takes up to {CONV_MAX_TAPS} taps, not {taps}"
            if taps > CONV_MAX_TAPS
            else f"takes up to {MAX_BATCH} samples"
        )
        falls_back("the short convolution", reason, _COST)
        return False
    return _kernels_agree(x.device, x.dtype, taps)


@functools.cache
def _kernels_agree(device: torch.device, dtype: torch.dtype, taps: int) -> bool:
    """Both Triton kernels against PyTorch, once."""
    from . import triton_kernels

    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device).to(dtype)

    x, weight, bias, grad = normal(2, 70, 40), normal(40, taps), normal(40), normal(2, 70, 40)
    return agrees(
        "the short convolution",
        lambda: [triton_kernels.conv_forward(x, weight, bias), *triton_kernels.conv_backward(grad, x, weight, bias)],
        lambda: [torch_forward(x, weight, bias), *torch_backward(grad, x, weight, bias)],
        _COST,
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _preactivation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, L, C) in the dtype of the computation, from x in that dtype."""
    length, taps = x.shape[1], weight.shape[1]
    pre = x * weight[:, taps - 1]
    for back in range(1, min(taps, length)):
        pre[:, back:].addcmul_(x[:, : length - back], weight[:, taps - 1 - back])
    return pre if bias is None else pre.add_(bias)


def torch_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The PyTorch path."""
    dtype = _wide(x)
    pre = _preactivation(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return torch.nn.functional.silu(pre).to(x.dtype).contiguous()


def torch_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of x (in its dtype), weight and bias (both fp32; the latter is computed without a bias too)."""
    dtype, length, taps = _wide(x), x.shape[1], weight.shape[1]
    xf, wf = x.to(dtype), weight.to(dtype)
    pre = _preactivation(xf, wf, None if bias is None else bias.to(dtype))
    sigma = torch.sigmoid(pre)
    d = grad.to(dtype) * sigma * (1 + pre * (1 - sigma))
    dx = d * wf[:, taps - 1]
    dweight = torch.zeros_like(wf)
    dweight[:, taps - 1] = (d * xf).sum(dim=(0, 1))
    for back in range(1, min(taps, length)):
        dx[:, : length - back].addcmul_(d[:, back:], wf[:, taps - 1 - back])
        dweight[:, taps - 1 - back] = (d[:, back:] * xf[:, : length - back]).sum(dim=(0, 1))
    return dx.to(x.dtype).contiguous(), dweight, d.sum(dim=(0, 1))


@torch.library.custom_op("zerofit::causal_conv_silu", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _fits(x, weight):
        from . import triton_kernels

        return triton_kernels.conv_forward(x, weight, bias)
    return torch_forward(x, weight, bias)


@_forward.register_fake
def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("zerofit::causal_conv_silu_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if _fits(x, weight):
        from . import triton_kernels

        dx, dweight, dbias = triton_kernels.conv_backward(grad, x, weight, bias)
    else:
        dx, dweight, dbias = torch_backward(grad, x, weight, bias)
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype if bias is None else bias.dtype)


@_backward.register_fake
def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        (weight if bias is None else bias).new_empty(x.shape[2]),
    )


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.zerofit.causal_conv_silu_backward(grad, x, weight, bias)
    return dx, dweight, None if bias is None else dbias


_forward.register_autograd(_differentiate, setup_context=_keep)
