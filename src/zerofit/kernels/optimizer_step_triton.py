"""The fused step of `optimizer_step`: one pass over gradient, weights and running means. Triton.

A tile is `ROWS` blocks of 256 elements, so that a block's largest magnitude is a reduction along a row. `step` takes
flat gradients, a tile a program; `step_group` takes the parameters of a group where their gradients and compute copies
lie, some tiles a program.

Divisions and roots round to the nearest where a code hangs on them. One launch reads and writes, an element with bf16
weights and 8-bit AdamW moments: gradient 2, weights 4, codes 4 bytes, and 8/128 for the scales; with fp32 weights,
fp32 AdamW moments and a bf16 copy: gradient 2, weights 8, moments 16, copy 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .optimizer_group import BLOCKS_OF_TILE as ROWS
from .optimizer_group import Flat, Tables
from .optimizer_step import BLOCK, SMALLEST_SCALE, Figures, Moment, Rule

_KINDS = {"adamw": 0, "lion": 1, "sgd": 2}
_BITS = {torch.float32: 32, torch.bfloat16: 16, torch.uint8: 8}
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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


@triton.jit
def _update(
    g, weights, m_values, m_scales, v_values, v_scales, figures, offset, number, row, inside, row_inside, seed, stream,
    lr, weight_decay, beta1, beta2, rest1, rest2, eps, momentum, smallest,
    kind: tl.constexpr, nesterov: tl.constexpr, bits: tl.constexpr, bf16_weights: tl.constexpr, rounds: tl.constexpr,
):  # fmt: skip
    """Update a tile's weights and running means; returns the weights as they were stored, in fp32.

    g: unscaled gradient, fp32. offset, row: elements and blocks within the flat tensors; number: of an element for the
    random numbers.
    """
    p = tl.load(weights + offset, mask=inside, other=0.0).to(tl.float32)
    m = _load_mean(m_values, m_scales, offset, row, inside, row_inside, True, bits)
    if kind == 0:
        v = _load_mean(v_values, v_scales, offset, row, inside, row_inside, False, bits)
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        update = m / tl.load(figures + 3) / (tl.sqrt(v) / tl.load(figures + 4) + eps)
    elif kind == 1:
        c = beta1 * m + rest1 * g
        update = tl.where(c > 0.0, 1.0, tl.where(c < 0.0, -1.0, 0.0))
        m = beta2 * m + rest2 * g
    else:
        m = momentum * m + g
        update = g + momentum * m if nesterov else m
    p = p * (1.0 - lr * weight_decay) - lr * update
    t = tl.load(figures + 2).to(tl.uint32)
    low = number.to(tl.uint32)
    zero = low * 0
    r0, r1, r2, _ = tl.philox(
        seed, low, (number >> 32).to(tl.uint32), zero + t, zero + stream.to(tl.uint32), n_rounds=rounds
    )
    if bf16_weights:
        rounded = _to_bf16(p, r0)
        tl.store(weights + offset, rounded, mask=inside)
        p = rounded.to(tl.float32)
    else:
        tl.store(weights + offset, p, mask=inside)
    _store_mean(m_values, m_scales, offset, row, inside, row_inside, m, r1, smallest, True, bits)
    if kind == 0:
        _store_mean(v_values, v_scales, offset, row, inside, row_inside, v, r2, smallest, False, bits)
    return p


@triton.jit(do_not_specialize=["first", "seed", "stream"])
def _kernel(
    gradient, weights, m_values, m_scales, v_values, v_scales, figures, n, first, seed, stream,
    lr, weight_decay, beta1, beta2, rest1, rest2, eps, momentum, smallest,
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
    _update(
        g, weights, m_values, m_scales, v_values, v_scales, figures, offset, first + offset, row, inside, row_inside,
        seed, stream, lr, weight_decay, beta1, beta2, rest1, rest2, eps, momentum, smallest, kind, nesterov, bits,
        bf16_weights, rounds,
    )  # fmt: skip


def _means(moments: tuple[Moment, ...]) -> Iterator[Tensor]:
    """Values and scales of both means; what a kernel does not read is any pointer."""
    for moment in (moments[0], moments[-1]):
        yield moment.values
        yield moment.values if moment.scales is None else moment.scales


def _numbers(rule: Rule, lr: float, weight_decay: float) -> tuple[float, ...]:
    """In the order of the kernels' arguments from ``lr`` on."""
    # The differences here, in fp64: 1 - 0.999 is off by 1e-5 in fp32.
    rest1, rest2 = 1 - rule.beta1, 1 - rule.beta2
    return lr, weight_decay, rule.beta1, rule.beta2, rest1, rest2, rule.eps, rule.momentum, SMALLEST_SCALE


def _forms(rule: Rule, weights: Tensor, moments: tuple[Moment, ...]) -> dict[str, Any]:
    """What is compiled in."""
    return {
        "kind": _KINDS[rule.kind],
        "nesterov": rule.nesterov,
        "bits": _BITS[moments[0].values.dtype],
        "bf16_weights": weights.dtype == torch.bfloat16,
        "rows": ROWS,
        "block": BLOCK,
        "rounds": 7,
    }


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
    _kernel[(triton.cdiv(weights.numel(), ROWS * BLOCK),)](
        gradient,
        weights,
        *_means(moments),
        figures.packed,
        weights.numel(),
        first,
        seed,
        stream,
        *_numbers(rule, lr, weight_decay),
        **_forms(rule, weights, moments),
    )


@triton.jit
def _tile_of_group(
    fast: tl.constexpr, gradient, copy, start, elements, at, weights, m_values, m_scales, v_values, v_scales, average,
    figures, average_weight, inverse, seed, stream, lr, weight_decay, beta1, beta2, rest1, rest2, eps, momentum,
    smallest, kind: tl.constexpr, nesterov: tl.constexpr, bits: tl.constexpr, bf16_weights: tl.constexpr,
    gradient_type: tl.constexpr, copy_type: tl.constexpr, has_copy: tl.constexpr, has_average: tl.constexpr,
    rows: tl.constexpr, block: tl.constexpr, rounds: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """One tile of a parameter, from its element `at` on.

    fast: the tile is whole and every address a multiple of 16 bytes, which the compiler is told by rounding them to
    what they are: each thread then moves 16 bytes at a time. (A hint on the values themselves would hold for the slow
    form too, whose addresses are any.)
    """
    row = at // block + tl.arange(0, rows)
    within = at + (tl.arange(0, rows) * block)[:, None] + tl.arange(0, block)[None, :]
    if fast:
        inside, row_inside = tl.full((rows, block), True, tl.int1), tl.full((rows,), True, tl.int1)
        from_, to = (gradient // 16 * 16).to(tl.pointer_type(gradient_type)), copy // 16 * 16
        tl.multiple_of(from_, 16)
        first = start // aligned * aligned
        g = tl.load(from_ + within).to(tl.float32)
    else:
        inside, row_inside = within < elements, row * block < elements
        from_, to, first = gradient.to(tl.pointer_type(gradient_type)), copy, start
        g = tl.load(from_ + within, mask=inside & (gradient != 0), other=0.0).to(tl.float32)
    offset = first + within
    p = _update(
        g * inverse, weights, m_values, m_scales, v_values, v_scales, figures, offset, offset, first // block + row,
        inside, row_inside, seed, stream, lr, weight_decay, beta1, beta2, rest1, rest2, eps, momentum, smallest, kind,
        nesterov, bits, bf16_weights, rounds,
    )  # fmt: skip
    if has_copy:
        target = to.to(tl.pointer_type(copy_type))
        if fast:
            tl.multiple_of(target, 16)
        tl.store(target + within, p.to(copy_type), mask=inside)
    if has_average:
        mean = tl.load(average + offset, mask=inside, other=0.0)
        weight = tl.load(average_weight)
        # As torch.lerp: from the nearer end.
        moved = tl.where(weight < 0.5, mean + weight * (p - mean), p - (p - mean) * (1.0 - weight))
        tl.store(average + offset, moved, mask=inside)


@triton.jit(do_not_specialize=["tiles", "seed", "stream"])
def _group_kernel(
    spans, programs, addresses, weights, m_values, m_scales, v_values, v_scales, average, figures, average_weight,
    tiles, seed, stream, lr, weight_decay, beta1, beta2, rest1, rest2, eps, momentum, smallest,
    kind: tl.constexpr, nesterov: tl.constexpr, bits: tl.constexpr, bf16_weights: tl.constexpr,
    gradient_type: tl.constexpr, copy_type: tl.constexpr, has_copy: tl.constexpr, has_average: tl.constexpr,
    rows: tl.constexpr, block: tl.constexpr, rounds: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    if tl.load(figures + 1) != 0.0:
        return
    inverse = tl.load(figures)
    parameter = tl.load(programs + 2 * tl.program_id(0))
    first = tl.load(programs + 2 * tl.program_id(0) + 1)
    start, elements = tl.load(spans + 2 * parameter), tl.load(spans + 2 * parameter + 1)
    gradient, copy = tl.load(addresses + 2 * parameter), tl.load(addresses + 2 * parameter + 1)
    straight = (gradient != 0) & ((gradient | copy) % 16 == 0) & (start % aligned == 0)
    begin = first.to(tl.int64) * (rows * block)
    for tile in range(tl.minimum(tiles, tl.cdiv(elements - begin, rows * block).to(tl.int32))):
        at = begin + tile * (rows * block)
        if straight & (at + rows * block <= elements):
            _tile_of_group(
                True, gradient, copy, start, elements, at, weights, m_values, m_scales, v_values, v_scales, average,
                figures, average_weight, inverse, seed, stream, lr, weight_decay, beta1, beta2, rest1, rest2, eps,
                momentum, smallest, kind, nesterov, bits, bf16_weights, gradient_type, copy_type, has_copy, has_average,
                rows, block, rounds, aligned,
            )  # fmt: skip
        else:
            _tile_of_group(
                False, gradient, copy, start, elements, at, weights, m_values, m_scales, v_values, v_scales, average,
                figures, average_weight, inverse, seed, stream, lr, weight_decay, beta1, beta2, rest1, rest2, eps,
                momentum, smallest, kind, nesterov, bits, bf16_weights, gradient_type, copy_type, has_copy, has_average,
                rows, block, rounds, aligned,
            )  # fmt: skip


def step_group(
    rule: Rule,
    flat: Flat,
    tables: Tables,
    gradient_dtype: torch.dtype,
    copy_dtype: torch.dtype | None,
    figures: Figures,
    average_weight: Tensor | None,
    lr: float,
    weight_decay: float,
    seed: int,
    stream: int,
) -> None:
    """As `optimizer_group.reference`, on parameters whose gradients and copies the table's addresses tell."""
    in_8_bits = _BITS[flat.moments[0].values.dtype] == 8
    _group_kernel[(tables.programs.shape[0],)](
        tables.spans,
        tables.programs,
        tables.addresses,
        flat.weights,
        *_means(flat.moments),
        flat.weights if flat.average is None else flat.average,
        figures.packed,
        figures.packed if average_weight is None else average_weight,
        tables.tiles,
        seed,
        stream,
        *_numbers(rule, lr, weight_decay),
        **_forms(rule, flat.weights, flat.moments),
        gradient_type=_TYPES[gradient_dtype],
        copy_type=_TYPES[copy_dtype or torch.float32],
        has_copy=copy_dtype is not None,
        has_average=flat.average is not None,
        # In 8 bits parameters begin blocks; 8 elements are 16 bytes of bf16 and 32 of fp32.
        aligned=BLOCK if in_8_bits else 8,
        # Both forms of a tile then round alike, whatever the compiler makes of each: a resumed run whose gradients lie
        # at other addresses is still the same run.
        enable_fp_fusion=False,
        # As many as 8-bit codes need without spilling; the compiler takes 168, which leaves three programs on a
        # multiprocessor. (Seen in what Triton 3.6 and 3.8 compile for an H200, not timed.)
        **({"maxnreg": 128} if in_8_bits else {}),
    )
