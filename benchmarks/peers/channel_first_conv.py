# mypy: ignore-errors
# (Triton's decorator and its tensors have no types.)
"""Depthwise causal convolution + SiLU over (D, L), channels first: stands in for causal_conv1d's CUDA kernels.

mamba_ssm calls that package, which needs a compiler; PyTorch's own depthwise convolution and SiLU take ten times as
long as a fused kernel (docs/kernels.md), so a peer with them would lose for a reason that is not its own. Four taps,
one sample. Each program takes one channel and a span of time; neighbouring steps are loaded again (they lie in the L1
cache) instead of being handed on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPAN = 1024


@triton.jit
def _forward(x, w, bias, out, length, BLOCK: tl.constexpr):
    d = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = x + d * length
    pre = tl.zeros((BLOCK,), tl.float32) + tl.load(bias + d).to(tl.float32)
    for k in tl.static_range(4):
        at = t - 3 + k
        tap = tl.load(w + d * 4 + k).to(tl.float32)
        pre += tap * tl.load(row + at, mask=(at >= 0) & (at < length), other=0.0).to(tl.float32)
    tl.store(out + d * length + t, (pre * tl.sigmoid(pre)).to(out.dtype.element_ty), mask=t < length)


@triton.jit
def _backward(grad, x, w, bias, dx, partial, length, BLOCK: tl.constexpr):
    """dx[t] = sum over j of w[3-j] d[t+j], d the gradient of the pre-activation; partial (D, spans, 5) holds each
    span's sums for the four taps and the bias."""
    d = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = x + d * length
    b = tl.load(bias + d).to(tl.float32)
    sums = partial + (d * tl.num_programs(1) + tl.program_id(1)) * 5
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(4):
        pre = tl.zeros((BLOCK,), tl.float32) + b
        for k in tl.static_range(4):
            at = t + j - 3 + k
            tap = tl.load(w + d * 4 + k).to(tl.float32)
            pre += tap * tl.load(row + at, mask=(at >= 0) & (at < length), other=0.0).to(tl.float32)
        sigma = tl.sigmoid(pre)
        g = tl.load(grad + d * length + t + j, mask=t + j < length, other=0.0).to(tl.float32)
        slope = g * sigma * (1 + pre * (1 - sigma))
        total += tl.load(w + d * 4 + 3 - j).to(tl.float32) * slope
        if j == 0:
            for k in tl.static_range(4):
                at = t - 3 + k
                value = tl.load(row + at, mask=(at >= 0) & (at < length), other=0.0).to(tl.float32)
                tl.store(sums + k, tl.sum(slope * value, axis=0))
            tl.store(sums + 4, tl.sum(slope, axis=0))
    tl.store(dx + d * length + t, total.to(dx.dtype.element_ty), mask=t < length)


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x: (D, L), contiguous; weight: (D, 4); bias: (D,). -> (D, L)."""
    channels, length = x.shape
    out = torch.empty_like(x)
    block = min(SPAN, triton.next_power_of_2(length))
    _forward[(channels, triton.cdiv(length, block))](x, weight, bias, out, length, BLOCK=block, num_warps=4)
    return out


def conv_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Writes dx (D, L); -> gradients of weight (D, 4) and bias (D,), fp32."""
    channels, length = x.shape
    block = min(SPAN, triton.next_power_of_2(length))
    spans = triton.cdiv(length, block)
    partial = torch.empty(channels, spans, 5, dtype=torch.float32, device=x.device)
    _backward[(channels, spans)](grad, x, weight, bias, dx, partial, length, BLOCK=block, num_warps=4)
    sums = partial.sum(1)
    return sums[:, :4], sums[:, 4]
