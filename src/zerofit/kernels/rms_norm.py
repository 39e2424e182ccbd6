"""RMSNorm (Zhang & Sennrich 2019), alone and behind the addition of a residual stream.

Shape legend: rows of width C, any leading dimensions.

::

    normed = x / sqrt(mean(x^2) + eps) * weight            statistics and products in fp32, rounded once

Only the normalised input is kept for the backward pass; the statistics are computed again. On a GPU each pass is one
Triton kernel (the weight's gradient adds a small sum over partial sums, in a fixed order); elsewhere PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_use import falls_back, use_triton

#: Widest row that one Triton program holds in registers; wider ones take the PyTorch path.
MAX_TRITON_WIDTH = 16384


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Args: x: (..., C), any float dtype; weight: (C,).

    Returns: (..., C) in x's dtype, contiguous.

    Raises: ValueError when the widths differ.
    """
    _check(x, weight)
    normed: Tensor = torch.ops.zerofit.rms_norm(x, weight, eps)
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``new_residual = residual + x`` and its norm, in one pass.

    Args: x: (..., C); residual: the same shape, possibly of a wider dtype; weight: (C,).

    Returns: (normed in x's dtype, new_residual in residual's dtype). The statistics are those of new_residual as
    it is stored.

    Raises: ValueError when the shapes differ.
    """
    _check(x, weight)
    if residual.shape != x.shape:
        raise ValueError(f"add_rms_norm: x is {tuple(x.shape)} and residual is {tuple(residual.shape)}")
    normed, new_residual = torch.ops.zerofit.add_rms_norm(x, residual, weight, eps)
    return normed, new_residual


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight is {tuple(weight.shape)} for x of {tuple(x.shape)}")


def _fits(x: Tensor) -> bool:
    if x.numel() == 0 or not use_triton(x):
        return False
    if x.shape[-1] > MAX_TRITON_WIDTH:
        reason = f"takes rows up to {MAX_TRITON_WIDTH} wide, not {x.shape[-1]}"
        falls_back("RMSNorm", reason, "PyTorch's operations take its place, several times slower, in fp32 copies")
        return False
    return True


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def torch_forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The PyTorch path."""
    xf = x.to(_wide(x))
    scale = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    return (xf * scale * weight.to(xf.dtype)).to(dtype).contiguous()


def torch_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, extra: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> the gradient of x plus ``extra`` (both in x's dtype), and the weight's (C,) in fp32."""
    dtype = _wide(x)
    xf, g = x.to(dtype), grad.to(dtype)
    scale = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    normal = xf * scale
    dweight = (g * normal).flatten(0, -2).sum(0) if x.dim() > 1 else g * normal
    g = g * weight.to(dtype)
    dx = scale * (g - normal * (g * normal).mean(-1, keepdim=True))
    if extra is not None:
        dx = dx + extra.to(dtype)
    return dx.to(x.dtype).contiguous(), dweight


@torch.library.custom_op("zerofit::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if _fits(x):
        from . import triton_kernels

        return triton_kernels.norm_forward(x, None, weight, eps)[0]
    return torch_forward(x, weight, eps, x.dtype)


@_forward.register_fake
def _forward_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("zerofit::add_rms_norm", mutates_args=())
def _add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if _fits(x):
        from . import triton_kernels

        return triton_kernels.norm_forward(x, residual, weight, eps)
    total = (residual + x).to(residual.dtype).contiguous()
    return torch_forward(total, weight, eps, x.dtype), total


@_add_forward.register_fake
def _add_forward_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), residual.new_empty(residual.shape)


@torch.library.custom_op("zerofit::rms_norm_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, extra: Tensor | None) -> tuple[Tensor, Tensor]:
    if _fits(x):
        from . import triton_kernels

        dx, dweight = triton_kernels.norm_backward(grad, x, weight, eps, extra)
    else:
        dx, dweight = torch_backward(grad, x, weight, eps, extra)
    return dx, dweight.to(weight.dtype)


@_backward.register_fake
def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, eps: float, extra: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    dx, dweight = torch.ops.zerofit.rms_norm_backward(grad, x, weight, ctx.eps, None)
    return dx, dweight, None


def _keep_sum(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, _, weight, ctx.eps = inputs
    ctx.dtype = x.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)


def _differentiate_sum(ctx, grad, extra):  # type: ignore[no-untyped-def]
    total, weight = ctx.saved_tensors
    if grad is None:
        return None if extra is None else extra.to(ctx.dtype), extra, None, None
    d, dweight = torch.ops.zerofit.rms_norm_backward(grad, total, weight, ctx.eps, extra)
    return d.to(ctx.dtype), d, dweight, None


_forward.register_autograd(_differentiate, setup_context=_keep)
_add_forward.register_autograd(_differentiate_sum, setup_context=_keep_sum)
