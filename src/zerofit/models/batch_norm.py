"""Batch normalisation (Ioffe & Szegedy 2015) as every classifier here has it, whatever its author wrote.

Statistics are computed and kept in fp32 under every precision. In training a micro-batch is normalised by its own
statistics and moves the running ones once, so ``accumulation_steps`` times a step, also where blocks are recomputed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# torch 2.13 warns of the all-reduce that gradients flow through, in every layer; 2.11 has no other.
warnings.filterwarnings("ignore", r"torch\.distributed\.nn\.functional\.all_reduce is deprecated", FutureWarning)


class _Recomputing:
    """Whether a block runs once more for its backward pass: then running statistics have seen its batch already."""

    now = False


@contextmanager
def _recomputing() -> Iterator[None]:
    _Recomputing.now = True
    try:
        yield
    finally:
        _Recomputing.now = False


def recomputation_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of a checkpointed block's first pass and of its recomputation."""
    return nullcontext(), _recomputing()


def batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor, sync: bool) -> Tensor:
    """``module``'s normalisation of (B, C, ...), in training or evaluation as the module is. The shape stays.

    Args:
        module: with running statistics, scale and shift; the running statistics move by its momentum.
        sync: with the statistics of all ranks' micro-batches (collective, in the backward pass too).
    """
    # Kernels want scale and shift of the type of the statistics; the copies are small.
    weight, bias = module.weight.float(), module.bias.float()
    if not module.training:
        return F.batch_norm(x, module.running_mean, module.running_var, weight, bias, False, 0.0, module.eps)
    assert module.momentum is not None
    if not _Recomputing.now and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
    if sync and dist.is_initialized() and dist.get_world_size() > 1:
        return _over_ranks(module, x, weight, bias)
    mean, var = module.running_mean, module.running_var
    if _Recomputing.now and mean is not None and var is not None:
        mean, var = mean.clone(), var.clone()  # theirs to change: the running ones have seen this batch
    return F.batch_norm(x, mean, var, weight, bias, True, module.momentum, module.eps)


def _over_ranks(module: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Statistics of all ranks' samples; gradients flow through the sums. Collective, in the backward pass too."""
    from torch.distributed.nn.functional import all_reduce

    values = x.float()
    count = values.numel() / values.shape[1] * dist.get_world_size()
    over = (0, *range(2, x.ndim))
    sums = torch.stack([values.sum(over), values.square().sum(over)])
    mean, square = all_reduce(sums).unbind() if torch.is_grad_enabled() else _summed(sums)
    mean, square = mean / count, square / count
    var = (square - mean.square()).clamp(min=0)
    if not _Recomputing.now and module.running_mean is not None and module.running_var is not None:
        assert module.momentum is not None
        module.running_mean.lerp_(mean.detach(), module.momentum)
        module.running_var.lerp_(var.detach() * (count / (count - 1)), module.momentum)
    scale = weight * torch.rsqrt(var + module.eps)
    shaped = (1, -1, *[1] * (x.ndim - 2))
    return (values * scale.view(shaped) + (bias - mean * scale).view(shaped)).to(x.dtype)


def _summed(sums: Tensor) -> tuple[Tensor, Tensor]:
    dist.all_reduce(sums)
    return sums[0], sums[1]
