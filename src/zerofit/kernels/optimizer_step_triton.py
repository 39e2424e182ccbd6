"""The fused step of `optimizer_step`: one pass over gradient, weights and running means. Triton.

A program takes `ROWS` blocks of 256 elements, so that a block's largest magnitude is a reduction along a row.
Divisions and roots round to the nearest where a code hangs on them. One launch reads and writes, an element with bf16
weights and 8-bit AdamW moments: gradient 2, weights 4, codes 4 bytes, and 8/128 for the scales.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .optimizer_step import BLOCK, SMALLEST_SCALE, Figures, Moment, Rule

ROWS = 4
_KINDS = {"adamw": 0, "lion": 1, "sgd": 2}


@triton.jit
def _chance(word):
    """Uniform in [0, 1) from the upper 24 bits."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _to_bf16(x, word):
    bits = x.to(tl.uint32, bitcast=True) + (word & 0xFFFF)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _load_mean(values, scales, offset, row, inside, row_inside, signed: tl.constexpr, bits: tl.constexpr):
    if bits == 8:
        code = tl.load(values + offset, mask=inside, other=0).to(tl.float32)
        scale = tl.load(scales + row, mask=row_inside, other=0.0)[:, None]
        if signed:
            root = tl.div_rn(code - 128.0, 127.0)
            return root * tl.abs(root) * scale
        root = (code + 1.0) * 0.00390625
        return (root * root) * (root * root) * scale
    return tl.load(values + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_mean(
    values, scales, offset, row, inside, row_inside, x, word, smallest, signed: tl.constexpr, bits: tl.constexpr
):
    if bits == 8:
        x = tl.where(inside, x, 0.0)
        largest = tl.max(tl.abs(x), axis=1)
        largest = tl.where(largest < smallest, 0.0, largest)
        scale = largest[:, None]
        share = tl.div_rn(tl.abs(x), tl.where(scale > 0.0, scale, 1.0))
        root = tl.sqrt_rn(share)
        if signed:
            low = tl.minimum(tl.floor(root * 127.0), 126.0)
            a, b = tl.div_rn(low, 127.0), tl.div_rn(low + 1.0, 127.0)
            low_value, high_value = a * a, b * b
        else:
            low = tl.minimum(tl.maximum(tl.floor(tl.sqrt_rn(root) * 256.0 - 1.0), 0.0), 254.0)
            a, b = (low + 1.0) * 0.00390625, (low + 2.0) * 0.00390625
            low_value, high_value = (a * a) * (a * a), (b * b) * (b * b)
        place = tl.div_rn(share - low_value, high_value - low_value)
        code = tl.where(place > _chance(word), low + 1.0, low)
        code = tl.where(scale > 0.0, code, 0.0)
        if signed:
            code = 128.0 + tl.where(x < 0.0, -code, code)
        tl.store(values + offset, code.to(tl.uint8), mask=inside)
        tl.store(scales + row, largest, mask=row_inside)
    elif bits == 16:
        tl.store(values + offset, _to_bf16(x, word), mask=inside)
    else:
        tl.store(values + offset, x, mask=inside)


@triton.jit(do_not_specialize=["first", "seed", "stream"])
def _kernel(
    gradient, weights, m_values, m_scales, v_values, v_scales, figures, n, first, seed, stream,
    lr, weight_decay, beta1, beta2, eps, momentum, smallest,
    kind: tl.constexpr, nesterov: tl.constexpr, bits: tl.constexpr, bf16_weights: tl.constexpr,
    rows: tl.constexpr, block: tl.constexpr, rounds: tl.constexpr,
):  # fmt: skip
    if tl.load(figures + 1) != 0.0:
        return
    inverse = tl.load(figures)
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    offset = row[:, None] * block + tl.arange(0, block)[None, :]
    inside, row_inside = offset < n, row * block < n
    g = tl.load(gradient + offset, mask=inside, other=0.0).to(tl.float32) * inverse
    p = tl.load(weights + offset, mask=inside, other=0.0).to(tl.float32)
    m = _load_mean(m_values, m_scales, offset, row, inside, row_inside, True, bits)
    if kind == 0:
        v = _load_mean(v_values, v_scales, offset, row, inside, row_inside, False, bits)
        m = beta1 * m + (1.0 - beta1) * g
        v = beta2 * v + (1.0 - beta2) * g * g
        update = m / tl.load(figures + 3) / (tl.sqrt(v) / tl.load(figures + 4) + eps)
    elif kind == 1:
        c = beta1 * m + (1.0 - beta1) * g
        update = tl.where(c > 0.0, 1.0, tl.where(c < 0.0, -1.0, 0.0))
        m = beta2 * m + (1.0 - beta2) * g
    else:
        m = momentum * m + g
        update = g + momentum * m if nesterov else m
    p = p * (1.0 - lr * weight_decay) - lr * update
    number = first + offset
    t = tl.load(figures + 2).to(tl.uint32)
    low = number.to(tl.uint32)
    zero = low * 0
    r0, r1, r2, _ = tl.philox(
        seed, low, (number >> 32).to(tl.uint32), zero + t, zero + stream.to(tl.uint32), n_rounds=rounds
    )
    if bf16_weights:
        tl.store(weights + offset, _to_bf16(p, r0), mask=inside)
    else:
        tl.store(weights + offset, p, mask=inside)
    _store_mean(m_values, m_scales, offset, row, inside, row_inside, m, r1, smallest, True, bits)
    if kind == 0:
        _store_mean(v_values, v_scales, offset, row, inside, row_inside, v, r2, smallest, False, bits)


def step(
    rule: Rule,
    gradient: Tensor,
    weights: Tensor,
    moments: tuple[Moment, ...],
    figures: Figures,
    lr: float,
    weight_decay: float,
    seed: int,
    stream: int,
    first: int,
) -> None:
    """As `optimizer_step.step`, on contiguous tensors of one device."""
    bits: Any = {torch.float32: 32, torch.bfloat16: 16, torch.uint8: 8}[moments[0].values.dtype]
    m, v = moments[0], moments[-1]
    _kernel[(triton.cdiv(weights.numel(), ROWS * BLOCK),)](
        gradient,
        weights,
        m.values,
        m.values if m.scales is None else m.scales,
        v.values,
        v.values if v.scales is None else v.scales,
        figures.packed,
        weights.numel(),
        first,
        seed,
        stream,
        lr,
        weight_decay,
        rule.beta1,
        rule.beta2,
        rule.eps,
        rule.momentum,
        SMALLEST_SCALE,
        kind=_KINDS[rule.kind],
        nesterov=rule.nesterov,
        bits=bits,
        bf16_weights=weights.dtype == torch.bfloat16,
        rows=ROWS,
        block=BLOCK,
        rounds=7,
    )
