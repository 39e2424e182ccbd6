"""Recomputing the cheap part of a block: results that are dear to compute are kept, the rest is computed again.

Inside `torch.utils.checkpoint` nothing that a block computes survives its forward pass. `KeepResults` makes exceptions:
operations written with `linear` and `scan` below hand their results to the call that is being checkpointed, and its
recomputation takes them from there instead of computing them. Their gradients are computed as ever. No dispatch mode
is involved, so neither pass costs more Python than plain checkpointing.

Sources: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 5, for the
idea of choosing; Gu & Dao 2023, section 3.3.2, for what a Mamba block can recompute cheaply.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Here(threading.local):
    """The call that this thread is in; backward passes have threads of their own."""

    call: _Call | None = None


_HERE = _Here()


class _Call:
    """One checkpointed call of a block: first it keeps results, then its recomputation takes them, in order."""

    def __init__(self, scans: bool) -> None:
        self.scans = scans
        self.results: deque[tuple[Tensor, ...]] = deque()
        self.again = False

    @contextmanager
    def entered(self, again: bool) -> Iterator[None]:
        before, _HERE.call, self.again = _HERE.call, self, again
        try:
            yield
        finally:
            _HERE.call = before

    def taken(self) -> tuple[Tensor, ...] | None:
        """The next kept result; None the first time."""
        return self.results.popleft() if self.again else None

    def keep(self, *results: Tensor) -> None:
        if not self.again:
            self.results.append(tuple(result.detach() for result in results))


class KeepResults:
    """A ``context_fn`` for `torch.utils.checkpoint.checkpoint`: results of `linear` are kept.

    Args:
        scans: those of `scan` too (its output, and the states that its backward pass starts from).
    """

    def __init__(self, *, scans: bool) -> None:
        self.scans = scans

    def __call__(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        call = _Call(self.scans)
        return call.entered(again=False), call.entered(again=True)


def _call() -> _Call | None:
    """The checkpointed call that this is part of. In compiled code there is none: the compiler's partitioner decides
    what is recomputed, and the configuration refuses both together."""
    return None if torch.compiler.is_compiling() else _HERE.call


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``; (..., I), (O, I) -> (..., O). Its result is kept."""
    call = _call()
    if call is None:
        return F.linear(x, weight)
    taken = call.taken()
    out: Tensor = _Linear.apply(x, weight, taken[0] if taken else None)  # type: ignore[no-untyped-call]
    call.keep(out)
    return out


def last_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`linear` whose result the block's backward pass does not need: neither kept nor computed again."""
    call = _call()
    if call is None:
        return F.linear(x, weight)
    nothing = x.new_empty(1).expand(*x.shape[:-1], weight.shape[0]) if call.again else None
    out: Tensor = _Linear.apply(x, weight, nothing)  # type: ignore[no-untyped-call]
    return out


def scan(*tensors: Tensor | None, deterministic: bool) -> Tensor:
    """`kernels.selective_scan.selective_scan`. Its result is kept where scans are.

    Args: tensors: u, delta, A, B, C, D, z, delta_bias, as there.
    """
    from ..kernels.selective_scan import selective_scan

    call = _call()
    if call is None or not call.scans:
        return selective_scan(*tensors, deterministic=deterministic)  # type: ignore[arg-type]
    taken = call.taken() or (None, None)
    out, states = _Scan.apply(deterministic, *taken, *tensors)  # type: ignore[no-untyped-call]
    call.keep(out, states)
    result: Tensor = out
    return result


class _Linear(torch.autograd.Function):
    """A product whose result may be given: the same saved tensors and the same gradients either way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, given: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight) if given is None else given.view_as(given)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_x = (rows @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        of_weight = rows.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None


class _Scan(torch.autograd.Function):
    """The selective scan, whose output and states may be given."""

    @staticmethod
    def forward(ctx: Any, deterministic: bool, out: Any, states: Any, *tensors: Any) -> Any:
        if out is None:
            out, states = torch.ops.zerofit.selective_scan(*tensors, deterministic)
        else:
            out, states = out.view_as(out), states.view_as(states)
        ctx.deterministic = deterministic
        ctx.save_for_backward(*tensors, states)
        ctx.mark_non_differentiable(states)
        return out, states

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        found = torch.ops.zerofit.selective_scan_backward(gradients[0], *ctx.saved_tensors, ctx.deterministic)
        *first, of_bias, of_z = found
        return None, None, None, *first, of_z, of_bias
