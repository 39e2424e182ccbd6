# mypy: ignore-errors
# (Triton's decorator and its tensors have no types; the callers, which do, are checked.)
"""Triton kernels of the short convolution, the norms and the loss. Imported only where Triton is installed.

Each launcher takes and returns tensors as its PyTorch twin in `causal_conv`, `rms_norm` and `head_loss` does; the tests
run both on the same inputs (under Triton's interpreter where there is no GPU). All sums are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# --- depthwise causal convolution + SiLU ------------------------------------------------------------------------------


#: Channels a program takes, and steps of time it walks through with the last inputs in registers.
CONV_CHANNELS, CONV_STEPS = 256, 64


@triton.jit
def _taps(w, c, live, TAPS: tl.constexpr):
    """The four last taps, zeros where there are fewer; w3 falls on the step itself."""
    w3 = tl.load(w + c * TAPS + (TAPS - 1), mask=live, other=0.0).to(tl.float32)
    w2 = tl.load(w + c * TAPS + (TAPS - 2), mask=live & (TAPS > 1), other=0.0).to(tl.float32)
    w1 = tl.load(w + c * TAPS + (TAPS - 3), mask=live & (TAPS > 2), other=0.0).to(tl.float32)
    w0 = tl.load(w + c * TAPS + (TAPS - 4), mask=live & (TAPS > 3), other=0.0).to(tl.float32)
    return w0, w1, w2, w3


@triton.jit
def _conv_forward(
    x, w, bias, out, length, channels, x_batch, x_row, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * STEPS
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(2).to(tl.int64)
    live = c < channels
    w0, w1, w2, w3 = _taps(w, c, live, TAPS)
    bv = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        bv += tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    rows = x + b * x_batch + start.to(tl.int64) * x_row + c
    to = out + (b * length + start) * channels + c
    x1 = tl.load(rows - x_row, mask=live & (start >= 1), other=0.0).to(tl.float32)
    x2 = tl.load(rows - 2 * x_row, mask=live & (start >= 2), other=0.0).to(tl.float32)
    x3 = tl.load(rows - 3 * x_row, mask=live & (start >= 3), other=0.0).to(tl.float32)
    for i in range(STEPS):
        mask = live & (start + i < length)
        x0 = tl.load(rows, mask=mask, other=0.0).to(tl.float32)
        pre = bv + w3 * x0 + w2 * x1 + w1 * x2 + w0 * x3
        tl.store(to, (pre * tl.sigmoid(pre)).to(out.dtype.element_ty), mask=mask)
        x3, x2, x1 = x2, x1, x0
        rows += x_row
        to += channels


@triton.jit
def _conv_backward(
    grad, x, w, bias, dx, partial, length, channels, x_batch, x_row, g_batch, g_row, TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of STEPS steps, and their sum for the four taps and the bias: partial (batch, spans, 5, C).

    The gradient of the pre-activation, d, is computed once a step (and again for the three steps behind the span, which
    reach back into it): dx[t] = w3 d[t] + w2 d[t+1] + w1 d[t+2] + w0 d[t+3].
    """
    start = tl.program_id(0) * STEPS
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(2).to(tl.int64)
    live = c < channels
    w0, w1, w2, w3 = _taps(w, c, live, TAPS)
    bv = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        bv += tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    rows = x + b * x_batch + start.to(tl.int64) * x_row + c
    from_grad = grad + b * g_batch + start.to(tl.int64) * g_row + c
    to = dx + (b * length + start - 3) * channels + c
    x1 = tl.load(rows - x_row, mask=live & (start >= 1), other=0.0).to(tl.float32)
    x2 = tl.load(rows - 2 * x_row, mask=live & (start >= 2), other=0.0).to(tl.float32)
    x3 = tl.load(rows - 3 * x_row, mask=live & (start >= 3), other=0.0).to(tl.float32)
    # Each its own zeros: Triton takes a variable that is handed another's value for unchanged by the loop where both
    # start as one value.
    d1 = tl.zeros((BLOCK,), tl.float32)
    d2 = tl.zeros((BLOCK,), tl.float32)
    d3 = tl.zeros((BLOCK,), tl.float32)
    s0 = tl.zeros((BLOCK,), tl.float32)
    s1 = tl.zeros((BLOCK,), tl.float32)
    s2 = tl.zeros((BLOCK,), tl.float32)
    s3 = tl.zeros((BLOCK,), tl.float32)
    sb = tl.zeros((BLOCK,), tl.float32)
    for i in range(STEPS + 3):
        mask = live & (start + i < length)
        x0 = tl.load(rows, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(from_grad, mask=mask, other=0.0).to(tl.float32)
        pre = bv + w3 * x0 + w2 * x1 + w1 * x2 + w0 * x3
        sigma = tl.sigmoid(pre)
        d0 = g * sigma * (1 + pre * (1 - sigma))
        own = tl.where(i < STEPS, d0, 0.0)
        s3 += own * x0
        s2 += own * x1
        s1 += own * x2
        s0 += own * x3
        sb += own
        value = w3 * d3 + w2 * d2 + w1 * d1 + w0 * d0
        tl.store(to, value.to(dx.dtype.element_ty), mask=live & (i >= 3) & (start + i - 3 < length))
        x3, x2, x1 = x2, x1, x0
        d3, d2, d1 = d2, d1, d0
        rows += x_row
        from_grad += g_row
        to += channels
    base = partial + (b * tl.num_programs(0) + tl.program_id(0)) * 5 * channels + c
    tl.store(base, s0, mask=live)
    tl.store(base + channels, s1, mask=live)
    tl.store(base + 2 * channels, s2, mask=live)
    tl.store(base + 3 * channels, s3, mask=live)
    tl.store(base + 4 * channels, sb, mask=live)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _conv_grid(batch: int, length: int, channels: int) -> tuple[int, int, int]:
    return triton.cdiv(length, CONV_STEPS), triton.cdiv(channels, CONV_CHANNELS), batch


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, weight = _rows(x), weight.contiguous()
    batch, length, channels = x.shape
    out = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    _conv_forward[_conv_grid(batch, length, channels)](
        x, weight, bias if bias is not None else weight, out, length, channels, x.stride(0), x.stride(1),
        TAPS=weight.shape[1], HAS_BIAS=bias is not None, STEPS=CONV_STEPS, BLOCK=CONV_CHANNELS, num_warps=2,
    )  # fmt: skip
    return out


def conv_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    x, grad, weight = _rows(x), _rows(grad), weight.contiguous()
    (batch, length, channels), taps = x.shape, weight.shape[1]
    dx = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    grid = _conv_grid(batch, length, channels)
    partial = torch.empty(batch * grid[0], 5, channels, dtype=torch.float32, device=x.device)
    _conv_backward[grid](
        grad, x, weight, bias if bias is not None else weight, dx, partial, length, channels,
        x.stride(0), x.stride(1), grad.stride(0), grad.stride(1),
        TAPS=taps, HAS_BIAS=bias is not None, STEPS=CONV_STEPS, BLOCK=CONV_CHANNELS, num_warps=2,
    )  # fmt: skip
    sums = partial.sum(0)
    # A copy also for one tap: an operator's results may not be views of one tensor.
    return dx, sums[4 - taps : 4].t().clone(memory_format=torch.contiguous_format), sums[4]


# --- RMSNorm ----------------------------------------------------------------------------------------------------------


@triton.jit
def _norm_forward(
    x, residual, w, out, total, width, x_row, r_row, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    live = c < width
    v = tl.load(x + row * x_row + c, mask=live, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(residual + row * r_row + c, mask=live, other=0.0).to(tl.float32)
        stored = v.to(total.dtype.element_ty)
        tl.store(total + row * width + c, stored, mask=live)
        v = stored.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(v * v) / width + eps)
    y = v * scale * tl.load(w + c, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * width + c, y.to(out.dtype.element_ty), mask=live)


@triton.jit
def _norm_backward(
    grad, x, w, extra, dx, partial, rows, width, g_row, x_row, e_row, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows program_id, program_id + programs, ...; partial (programs, C) holds each program's sum for the weight."""
    c = tl.arange(0, BLOCK)
    live = c < width
    weight = tl.load(w + c, mask=live, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    wide_zero = tl.program_id(0).to(tl.int64) * 0  # rows times width may pass 2^31
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        r = wide_zero + row
        v = tl.load(x + r * x_row + c, mask=live, other=0.0).to(tl.float32)
        g = tl.load(grad + r * g_row + c, mask=live, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt_rn(tl.sum(v * v) / width + eps)
        normal = v * scale
        dw += g * normal
        g = g * weight
        d = scale * (g - normal * (tl.sum(g * normal) / width))
        if ADD:
            d += tl.load(extra + r * e_row + c, mask=live, other=0.0).to(tl.float32)
        tl.store(dx + r * width + c, d.to(dx.dtype.element_ty), mask=live)
    tl.store(partial + tl.program_id(0) * width + c, dw, mask=live)


def _flat(x: Tensor) -> Tensor:
    """(..., C) as (rows, C) whose last dimension is contiguous; a copy only where the strides force one."""
    return _rows(x.reshape(-1, x.shape[-1]))


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def norm_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    flat, width = _flat(x), x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    other = flat if residual is None else _flat(residual)
    total = out if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    _norm_forward[(flat.shape[0],)](
        flat, other, weight, out, total, width, flat.stride(0), other.stride(0), eps,
        ADD=residual is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out, total


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, extra: Tensor | None) -> tuple[Tensor, Tensor]:
    g, flat, width = _flat(grad), _flat(x), x.shape[-1]
    other = flat if extra is None else _flat(extra)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    units = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    block = triton.next_power_of_2(width)
    programs = min(flat.shape[0], units * max(1, 8192 // block))
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _norm_backward[(programs,)](
        g, flat, weight, other, dx, partial, flat.shape[0], width, g.stride(0), flat.stride(0), other.stride(0), eps,
        ADD=extra is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return dx, partial.sum(0)


# --- softmax, loss and its gradient in place --------------------------------------------------------------------------


@triton.jit
def _softmax_loss(
    logits, targets, losses, scale, row_stride, columns, vocab, ignore, WANTED: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its loss, and with WANTED softmax minus one-hot in place (0 in padding columns and ignored rows); with
    SCALED times the number at scale."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    target = tl.load(targets + row)
    valid = target != ignore
    # Lanes without a column hold a finite lowest value: its exponential vanishes beside any logit, and is never NaN.
    top = tl.full((BLOCK,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    if valid:
        for at in range(0, vocab, BLOCK):
            c = at + tl.arange(0, BLOCK)
            v = tl.where(c < vocab, tl.load(start + c, mask=c < vocab, other=0.0).to(tl.float32), -3.0e38)
            new = tl.maximum(top, v)
            total = total * tl.exp(top - new) + tl.exp(v - new)
            top = new
    peak = tl.max(top, axis=0)
    norm = tl.sum(total * tl.exp(top - peak), axis=0)
    inside = (target >= 0) & (target < vocab)
    hit = tl.load(start + tl.where(inside, target, 0)).to(tl.float32)
    norm = tl.where(valid, norm, 1.0)
    loss = tl.where(inside, peak + tl.log(norm) - hit, float("nan"))
    tl.store(losses + row, tl.where(valid, loss, 0.0))
    if WANTED:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        for at in range(0, columns, BLOCK):
            c = at + tl.arange(0, BLOCK)
            live = (c < vocab) & valid
            v = tl.load(start + c, mask=live, other=0.0).to(tl.float32)
            p = tl.exp(tl.where(live, v - peak, 0.0)) / norm - tl.where(c == target, 1.0, 0.0)
            if SCALED:
                p = p * tl.load(scale).to(tl.float32)
            tl.store(start + c, tl.where(live, p, 0.0).to(logits.dtype.element_ty), mask=c < columns)


def softmax_loss_(
    logits: Tensor, targets: Tensor, vocab_size: int, wanted: bool, scale: Tensor | None = None
) -> Tensor:
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _softmax_loss[(logits.shape[0],)](
        logits, targets.contiguous(), losses, losses if scale is None else scale,
        logits.stride(0), logits.shape[1], vocab_size, -100, WANTED=wanted, SCALED=scale is not None,
        BLOCK=min(4096, triton.next_power_of_2(logits.shape[1])), num_warps=8,
    )  # fmt: skip
    return losses.sum()
