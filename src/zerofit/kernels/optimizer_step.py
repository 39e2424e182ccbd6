"""One step of an element-wise optimizer over flat tensors, with running means in fp32, bf16 or 8 bits.

Beside the Triton kernel (`optimizer_step_triton`) this is the plain PyTorch reference, which is what a CPU runs.

Legend: n elements of a flat tensor; b = 256 consecutive ones are a block. g gradient, p weights, m the running mean of
the gradient (or the momentum), v of its square; all arithmetic in fp32.

8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"). A block keeps its largest magnitude s in
fp32 and a code c of one byte an element:

    m   c in 1..255    sign * ((|c - 128| / 127) ** 2) * s
    v   c in 0..255    (((c + 1) / 256) ** 4) * s            never 0: see Li et al. 2023, section 4.1

Both maps give small values finer steps, without a table. Largest values and all codes survive decoding and encoding
again, so a state that was saved in fp32 comes back as it was.

Stochastic rounding: a value goes to one of its two neighbours, with the probability that keeps its expectation. Without
it a running mean with decay 0.999 stands still where a thousandth is less than half a step of its type. The random
numbers are Philox 4x32-7 (Salmon et al. 2011) of (seed; element, step, stream): nothing to save, exact resume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

#: Elements that share a scale.
BLOCK = 256
#: Blocks whose largest magnitude is below this are 0: no update that AdamW's eps lets through is that small, and their
#: squares' codes would leave fp32's normal range.
SMALLEST_SCALE = 1e-26
#: Elements that the reference works on at a time, so that what it makes meanwhile stays in the cache.
REFERENCE_ELEMENTS = 1 << 15
#: Elements that are encoded at a time: what is made meanwhile stays small.
PIECE_ELEMENTS = 1 << 20
#: Elements that are decoded at a time: 16 MiB of fp32, and as much for what is made meanwhile.
DECODED_ELEMENTS = 1 << 22
_PHILOX_ROUNDS = 7
_LOW = 0xFFFFFFFF

Kind = Literal["adamw", "lion", "sgd"]
StateType = Literal["fp32", "bf16", "8bit"]


@dataclass(frozen=True)
class Rule:
    """What a step does.

    Attributes:
        kind: ``adamw`` (Loshchilov & Hutter 2019, algorithm 2), ``lion`` (Chen et al. 2023, program 1) or ``sgd``
            (with momentum, as torch.optim.SGD without dampening). Weight decay is decoupled in all three.
        beta1, beta2, eps: AdamW's; Lion's betas.
        momentum, nesterov: SGD's.
    """

    kind: Kind = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = False

    @property
    def signed_moments(self) -> tuple[bool, ...]:
        """For each running mean, whether it has a sign."""
        return {"adamw": (True, False), "lion": (True,), "sgd": (True,)}[self.kind]


class Moment:
    """A running mean of n values, in fp32, bf16 or 8 bits.

    Attributes:
        values: (n,) fp32, bf16, or uint8 codes.
        scales: (ceil(n / 256),) fp32 with 8 bits, else None.
        signed: which of the two maps its codes use.
    """

    def __init__(self, elements: int, kind: StateType, signed: bool, device: torch.device) -> None:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}[kind]
        self.values = torch.zeros(elements, dtype=dtype, device=device)
        self.scales: Tensor | None = None
        self.signed = signed
        if kind == "8bit":
            self.scales = torch.zeros(-(-elements // BLOCK), dtype=torch.float32, device=device)
            self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return self.values.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def part(self, start: int, stop: int) -> Moment:
        """The elements ``[start, stop)`` as views; `start` must begin a block, and `stop` end one or the tensor."""
        part = object.__new__(Moment)
        part.values, part.signed, part.scales = self.values[start:stop], self.signed, None
        if self.scales is not None:
            part.scales = self.scales[start // BLOCK : -(-stop // BLOCK)]
        return part

    @property
    def is_coded(self) -> bool:
        """Whether `read` makes a copy."""
        return self.values.dtype != torch.float32

    def read(self, start: int, stop: int) -> Tensor:
        """Elements ``[start, stop)`` in fp32: a view of an fp32 state, else a copy."""
        if self.scales is None:
            return self.values[start:stop].float()
        if stop - start <= DECODED_ELEMENTS:
            return self._decoded(start, stop)
        values = torch.empty(stop - start, dtype=torch.float32, device=self.values.device)
        for low in range(start, stop, DECODED_ELEMENTS):
            high = min(low + DECODED_ELEMENTS, stop)
            values[low - start : high - start] = self._decoded(low, high)
        return values

    def _decoded(self, start: int, stop: int) -> Tensor:
        """A few operations in place on the whole blocks that hold the interval, for a GPU is told of each of them."""
        assert self.scales is not None
        first, last = start // BLOCK, -(-stop // BLOCK)
        codes = self.values[first * BLOCK : last * BLOCK]
        values = torch.empty((last - first) * BLOCK, dtype=torch.float32, device=self.values.device)
        values[: codes.numel()].copy_(codes)
        _decode_(values.view(-1, BLOCK), self.scales[first:last, None], self.signed)
        return values[start - first * BLOCK : stop - first * BLOCK]

    def write(self, start: int, values: Tensor) -> None:
        """Store values from any device, rounded to the nearest; block-aligned as in `part`."""
        if self.scales is None:
            self.values[start : start + values.numel()].copy_(values)
            return
        for low in range(0, values.numel(), PIECE_ELEMENTS):
            piece = values[low : low + PIECE_ELEMENTS].to(self.values.device, torch.float32)
            part = self.part(start + low, start + low + piece.numel())
            assert part.scales is not None
            scales, padded = _scales(piece)
            part.scales.copy_(scales)
            part.values.copy_(_encode(padded, scales[:, None], self.signed, None).view(-1)[: piece.numel()])

    def clear(self) -> None:
        """Set all of it to 0."""
        self.values.fill_(128 if self.scales is not None and self.signed else 0)
        if self.scales is not None:
            self.scales.zero_()


def _scales(values: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitude of each block, and the values as (blocks, 256), padded with zeros."""
    blocks = -(-values.numel() // BLOCK)
    padded = values
    if blocks * BLOCK != values.numel():
        padded = values.new_zeros(blocks * BLOCK)
        padded[: values.numel()] = values
    padded = padded.view(blocks, BLOCK)
    scales = padded.abs().amax(dim=1)
    return torch.where(scales < SMALLEST_SCALE, 0.0, scales), padded


def _decode_(codes: Tensor, scales: Tensor, signed: bool) -> None:
    """Codes, given as fp32, become their values."""
    if signed:
        codes.sub_(128).div_(127)
        codes.mul_(codes.abs()).mul_(scales)
    else:
        codes.add_(1).div_(256)
        codes.mul_(codes).mul_(codes).mul_(scales)


def _encode(values: Tensor, scales: Tensor, signed: bool, chance: Tensor | None) -> Tensor:
    """Codes (as uint8) of fp32 values.

    Args:
        scales: of each value's block; broadcast.
        chance: uniform in [0, 1) of each value; None: to the nearest.
    """
    some = scales > 0
    share = values.abs() / torch.where(some, scales, 1.0)
    root = share.sqrt()
    steps = root * 127 if signed else root.sqrt() * 256 - 1
    low = steps.floor().clamp(0, 126 if signed else 254)
    high = low + 1
    if signed:
        low_value, high_value = (low / 127).square(), (high / 127).square()
    else:
        low_value, high_value = (((c + 1) / 256).square().square() for c in (low, high))
    place = (share - low_value) / (high_value - low_value)
    code = torch.where(place > (0.5 if chance is None else chance), high, low)
    code = torch.where(some, code, 0.0)
    if signed:
        code = 128 + torch.where(values < 0, -code, code)
    return code.to(torch.uint8)


def philox(seed: int, element: Tensor, step: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words of 32 bits for each element, as int64: Philox 4x32-7.

    Args:
        seed: the key.
        element: (n,) int64 below 2^63: counter words 0 and 1.
        step: scalar int64: counter word 2.
        stream: counter word 3; tells apart tensors whose elements have the same numbers.
    """
    c0, c1 = element & _LOW, element >> 32
    c2, c3 = (step & _LOW).expand_as(element), torch.full_like(element, stream & _LOW)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_PHILOX_ROUNDS):
        # Products of 32-bit words wrap around in int64 and keep their 64 bits.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((b >> 32) & _LOW) ^ c1 ^ k0, ((a >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = b & _LOW, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def round_stochastically(values: Tensor, words: Tensor) -> Tensor:
    """fp32 to bf16: up or down with the probability that keeps the expectation, by the low 16 bits of `words`."""
    bits = values.contiguous().view(torch.int32) + (words & 0xFFFF).to(torch.int32)
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)


@dataclass(frozen=True)
class Figures:
    """What a step needs beside tensors; a packed fp32 tensor on the device, so that nothing waits.

    Attributes:
        packed: (5,) fp32: 1 / gradient divisor; found_inf; t; 1 - beta1^t; sqrt(1 - beta2^t).
    """

    packed: Tensor

    @staticmethod
    def of(rule: Rule, steps: Tensor, grad_divisor: Tensor, found_inf: Tensor) -> Figures:
        """`steps`: scalar, applied steps with this one; the others as `step` takes them."""
        t = steps.double()
        one, root = 1 - rule.beta1**t, (1 - rule.beta2**t).sqrt()
        return Figures(torch.stack([1 / grad_divisor.double(), found_inf.double(), t, one, root]).float())


@torch.no_grad()
def step(
    rule: Rule,
    gradient: Tensor,
    weights: Tensor,
    moments: tuple[Moment, ...],
    figures: Figures,
    *,
    lr: float,
    weight_decay: float,
    seed: int,
    stream: int,
    first: int = 0,
) -> None:
    """Update `weights` and `moments` in place; does nothing where ``found_inf`` is not 0.

    Args:
        gradient: (n,) fp32 or bf16, divided by the figures' divisor first.
        weights: (n,) fp32, or bf16: rounded stochastically.
        moments: (n,) each, as many as the rule has. Block-aligned: see `Moment.part`.
        figures: see there.
        lr: learning rate.
        weight_decay: decoupled.
        seed: of the random numbers.
        stream: below 2^32; different for tensors that must not share them.
        first: number of the first element, for the random numbers.
    """
    if weights.device.type == "cuda" and (kernel := _triton_kernel()) is not None:
        dtypes = gradient.dtype, weights.dtype, moments[0].values.dtype
        if _kernel_agrees(kernel, rule, weights.device, *dtypes):
            kernel(rule, gradient, weights, moments, figures, lr, weight_decay, seed, stream, first)
            return
    for start in range(0, weights.numel(), REFERENCE_ELEMENTS):
        stop = min(start + REFERENCE_ELEMENTS, weights.numel())
        parts = tuple(moment.part(start, stop) for moment in moments)
        reference_step(
            rule, gradient[start:stop], weights[start:stop], parts, figures.packed, lr, weight_decay, seed, stream,
            first + start,
        )  # fmt: skip


@cache
def _triton_kernel():  # type: ignore[no-untyped-def]
    """The fused kernel; None where Triton is missing, and then the reference runs on the GPU, many times slower."""
    try:
        from .optimizer_step_triton import step as kernel
    except ImportError:
        import warnings

        warnings.warn(
            "Triton is not installed, so the optimizer's step runs as dozens of PyTorch operations instead of one "
            "kernel. Run `pip install triton`.",
            stacklevel=2,
        )
        return None
    return kernel


@cache
def _kernel_agrees(
    kernel: Any, rule: Rule, device: torch.device, gradient_dtype: torch.dtype, dtype: torch.dtype, kept: torch.dtype
) -> bool:
    """Two steps of the kernel against the reference, once."""
    from .triton_use import agrees

    n, random = 5 * BLOCK + 100, torch.Generator(device).manual_seed(0)
    gradients, start = (torch.randn(*shape, generator=random, device=device) for shape in ((2, n), (n,)))
    state: StateType = "fp32" if kept == torch.float32 else "bf16" if kept == torch.bfloat16 else "8bit"

    def run(one_step: Callable[..., None]) -> list[Tensor]:
        weights = start.to(dtype)
        means = tuple(Moment(n, state, signed, device) for signed in rule.signed_moments)
        for t, gradient in enumerate(gradients.to(gradient_dtype)):
            one, zero = torch.ones((), device=device), torch.zeros((), device=device)
            figures = Figures.of(rule, one * (t + 1), 2 * one, zero)
            one_step(rule, gradient, weights, means, figures, 0.1, 0.1, 7, 3, 2**33)
        return [weights, *(mean.read(0, n) for mean in means)]

    def reference(rule: Rule, gradient: Tensor, weights: Tensor, means: Any, figures: Figures, *rest: Any) -> None:
        reference_step(rule, gradient, weights, means, figures.packed, *rest)

    return agrees(
        "the optimizer's step",
        lambda: run(kernel),
        lambda: run(reference),
        "dozens of PyTorch operations take its place, many times slower",
    )


def reference_step(
    rule: Rule,
    gradient: Tensor,
    weights: Tensor,
    moments: tuple[Moment, ...],
    packed: Tensor,
    lr: float,
    weight_decay: float,
    seed: int,
    stream: int,
    first: int,
) -> None:
    """As `step`, over all elements at once; `packed` as in `Figures`."""
    inverse, found_inf, t, one, root = packed.unbind()
    n = weights.numel()
    p, means, words = weights.float(), [moment.read(0, n) for moment in moments], None
    if weights.dtype != torch.float32 or any(moment.values.dtype != torch.float32 for moment in moments):
        element = torch.arange(first, first + n, device=weights.device)
        words = philox(seed, element, t.long(), stream)
    update, means = _update(rule, gradient.float() * inverse, means, one, root)
    skipped = found_inf != 0
    p = p * (1 - lr * weight_decay) - lr * update
    _store(weights, p, words[0] if words else None, skipped)
    for moment, mean, word in zip(moments, means, (words or (None,) * 4)[1:], strict=False):
        if moment.scales is None:
            _store(moment.values, mean, word, skipped)
        else:
            scales, padded = _scales(mean)
            chance = torch.zeros_like(padded)
            chance.view(-1)[:n] = (word >> 8).float() * 2.0**-24  # type: ignore[operator, union-attr]
            codes = _encode(padded, scales[:, None], moment.signed, chance).view(-1)[:n]
            moment.values.copy_(torch.where(skipped, moment.values, codes))
            moment.scales.copy_(torch.where(skipped, moment.scales, scales))


def _update(rule: Rule, g: Tensor, means: list[Tensor], one: Tensor, root: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What is subtracted, times the learning rate; and the new running means."""
    m = means[0]
    if rule.kind == "adamw":
        m = rule.beta1 * m + (1 - rule.beta1) * g
        v = rule.beta2 * means[1] + (1 - rule.beta2) * g * g
        return m / one / (v.sqrt() / root + rule.eps), [m, v]
    if rule.kind == "lion":
        update = (rule.beta1 * m + (1 - rule.beta1) * g).sign()
        return update, [rule.beta2 * m + (1 - rule.beta2) * g]
    m = rule.momentum * m + g
    return (g + rule.momentum * m if rule.nesterov else m), [m]


def _store(target: Tensor, values: Tensor, words: Tensor | None, skipped: Tensor) -> None:
    new = values if target.dtype == torch.float32 else round_stochastically(values, words)  # type: ignore[arg-type]
    target.copy_(torch.where(skipped, target, new))
