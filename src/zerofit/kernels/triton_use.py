"""Whether the Triton kernels can run on a tensor; said once when they cannot."""

from __future__ import annotations

import functools
import importlib.util
import warnings

from torch import Tensor


@functools.cache
def _found() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn(
        "Triton is not installed (torch's CUDA builds for Linux bring it), so the convolution, the norms and the loss "
        "run as separate PyTorch operations: these parts take two to four times as long.",
        stacklevel=3,
    )
    return False


def use_triton(x: Tensor) -> bool:
    """True on an NVIDIA GPU with Triton; warns once on one without it."""
    return x.is_cuda and _found()
