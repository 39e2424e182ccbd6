"""Whether the Triton kernels can run on a tensor; said once when they cannot."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Norm of a difference over the norm that rounding explains, for what `agrees` compares.
TOLERANCE = 2e-2


@functools.cache
def _found() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn(
        "Triton is not installed (torch's CUDA builds for Linux bring it), so the convolution, the norms, the loss and "
        "the crops of pictures run as separate PyTorch operations: these parts take two to four times as long.",
        stacklevel=3,
    )
    return False


def use_triton(x: Tensor) -> bool:
    """True on an NVIDIA GPU with Triton; warns once on one without it."""
    return x.is_cuda and _found()


@functools.cache
def falls_back(what: str, reason: str, consequence: str) -> None:
    """Say once that a Triton kernel does not take a shape, and what that costs."""
    warnings.warn(f"The Triton kernel for {what} {reason}: {consequence}.", stacklevel=3)


def agrees(
    what: str,
    kernel: Callable[[], Sequence[Tensor]],
    reference: Callable[[], Sequence[Tensor]],
    consequence: str,
) -> bool:
    """Whether a kernel computes on this machine what its reference does; warns when it does not, or ends with an error.

    A compiler that makes something else of a kernel is silent, and a wrong gradient is worse than a slow one: callers
    compare once a process, device and dtype, on a small input, and remember the answer.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return True  # nothing may wait now
    try:
        worst = max(_distance(a, b) for a, b in zip(kernel(), reference(), strict=True))
        found = f"is off by {worst:.1e} of its size"
        if worst <= TOLERANCE:
            return True
    except Exception as reason:  # a driver or compiler that refuses
        found = f"ends with {type(reason).__name__}: {reason}"
    warnings.warn(f"The Triton kernel for {what} {found} here, and is not used: {consequence}.", stacklevel=3)
    return False


def _distance(found: Tensor, true: Tensor) -> float:
    true = true.double()
    return float((found.double() - true).norm() / true.norm().clamp(min=1e-30))
