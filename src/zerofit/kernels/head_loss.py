"""Output head and cross-entropy in one, chunk by chunk: the logits of all tokens never exist at once.

Shape legend: M tokens, C width, V rows of the table (``vocab_size`` of them words, the rest padding), K tokens a chunk.

For each chunk the logits (K, V) are computed, the loss is added up, and the logits are overwritten by their own
gradient (softmax minus one-hot), from which the gradients of x and of the table follow at once. The backward pass only
scales them. Peak memory beside the inputs: K V logits, and the gradients of x and of the table, which are due anyway.
The logits are computed and rounded in x's dtype, as ``F.linear`` does; softmax and loss are fp32.

fp16 waits for the backward pass, where the loss's own gradient (divisor and loss scale) is known, and computes the
logits again: the unscaled gradients leave the range of fp16 at both ends. Sixteen thousand tokens with one target add
up to more than 65,504, and probabilities below 6e-8 vanish; no loss scale could mend what is already inf or 0. Scaled
first, they are what autograd makes of the separate operations, and an overflow is the loss scale's business. It costs
one more matrix product a chunk, and the memory is the same, in the backward pass instead of the forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .triton_use import use_triton

#: Target of a token that is not trained on.
IGNORE = -100


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, chunk_tokens: int = 2048
) -> Tensor:
    """Sum of the cross-entropies of ``x @ weight[:vocab_size].T``; equals ``F.cross_entropy(..., reduction="sum")``.

    Args:
        x: (M, C); weight: (V, C) of the same dtype, V at least vocab_size; targets: (M,) int64, -100 is not counted.
        vocab_size: rows behind it are padding, take no part in the softmax and get a gradient of zero.
        chunk_tokens: tokens a chunk. Larger ones are faster until the matrix products fill the GPU; the table's
            gradient is rounded to its dtype once a chunk.

    Returns: () fp32 (float64 when x is). A target outside 0..vocab_size-1 that is not -100 is an IndexError on the
    CPU and a loss of NaN on a GPU. Its backward pass can run once (a second one, with ``retain_graph``, is refused by
    autograd; fp16 allows it), and it has no second derivative.

    Raises: ValueError when shapes or dtypes do not belong together.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy takes x (tokens, width), weight (rows, width) and targets (tokens,); "
            f"they are {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    if not 0 < vocab_size <= weight.shape[0] or chunk_tokens < 1 or x.dtype != weight.dtype:
        raise ValueError(
            f"linear_cross_entropy: vocab_size {vocab_size} must lie in 1..{weight.shape[0]} (rows), chunk_tokens "
            f"{chunk_tokens} must be positive, and the dtypes of x ({x.dtype}) and weight ({weight.dtype}) equal"
        )
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if wanted and x.dtype == torch.float16:
        late: Tensor = torch.ops.zerofit.linear_cross_entropy_late(x, weight, targets, vocab_size, chunk_tokens)
        return late
    loss, _, _ = torch.ops.zerofit.linear_cross_entropy(x, weight, targets, vocab_size, chunk_tokens, wanted)
    result: Tensor = loss
    return result


def torch_softmax_loss_(
    logits: Tensor, targets: Tensor, vocab_size: int, wanted: bool, scale: Tensor | None = None
) -> Tensor:
    """The loss sum of one chunk; with ``wanted`` the logits (K, V) become their gradient in place, times ``scale``."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scores = logits[:, :vocab_size].to(wide)
    valid = targets != IGNORE
    index = torch.where(valid, targets, 0)[:, None]
    if not logits.is_cuda and bool(((index < 0) | (index >= vocab_size)).any()):
        raise IndexError(f"a target lies outside 0..{vocab_size - 1} and is not {IGNORE}")
    log_p = F.log_softmax(scores, dim=-1)
    loss = -(log_p.gather(1, index.clamp(0, vocab_size - 1)).squeeze(1) * valid).sum()
    if logits.is_cuda:  # no synchronisation to look at the targets: a wrong one makes the loss NaN
        wrong = ((index < 0) | (index >= vocab_size)).any()
        loss = torch.where(wrong, torch.full_like(loss, float("nan")), loss)
    if wanted:
        p = log_p.exp_()
        p.scatter_add_(1, index.clamp(0, vocab_size - 1), torch.full_like(index, -1, dtype=wide))
        p.mul_(valid[:, None])
        logits[:, :vocab_size] = p if scale is None else p.mul_(scale)
        logits[:, vocab_size:] = 0
    return loss


def _softmax_loss_(
    logits: Tensor, targets: Tensor, vocab_size: int, wanted: bool, scale: Tensor | None = None
) -> Tensor:
    if use_triton(logits):
        from . import triton_kernels

        return triton_kernels.softmax_loss_(logits, targets, vocab_size, wanted, scale)
    return torch_softmax_loss_(logits, targets, vocab_size, wanted, scale)


@torch.library.custom_op("zerofit::linear_cross_entropy", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk_tokens: int, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss sum, gradient of x, gradient of weight); without ``wanted`` the gradients are empty."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    loss = torch.zeros((), dtype=wide, device=x.device)
    dx = torch.empty(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)
    dweight = torch.zeros(weight.shape if wanted else (0,), dtype=weight.dtype, device=x.device)
    for start in range(0, x.shape[0], chunk_tokens):
        tokens = slice(start, start + chunk_tokens)
        logits = F.linear(x[tokens], weight)
        loss += _softmax_loss_(logits, targets[tokens], vocab_size, wanted)
        if wanted:
            torch.mm(logits, weight, out=dx[tokens])
            dweight.addmm_(logits.t(), x[tokens])
    return loss, dx, dweight


@_forward.register_fake
def _forward_fake(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk_tokens: int, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # The chunk's logits are allocated here too, so that a trace of memory sees the peak.
    logits = x.new_empty(min(chunk_tokens, x.shape[0]), weight.shape[0])
    loss = logits.new_empty((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return loss, x.new_empty(x.shape if wanted else (0,)), weight.new_empty(weight.shape if wanted else (0,))


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], output[2])


def _differentiate(ctx, grad, _dx, _dweight):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 6
    dx, dweight = ctx.saved_tensors
    # In place: the table's gradient is among the largest tensors of a small-card run. Autograd refuses a second pass.
    wx, ww = ctx.needs_input_grad[:2]
    return (dx.mul_(grad) if wx else None, dweight.mul_(grad) if ww else None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op("zerofit::linear_cross_entropy_late", mutates_args=())
def _late_forward(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk_tokens: int) -> Tensor:
    """The loss sum alone; its gradients are computed in the backward pass."""
    loss = torch.zeros((), dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[0], chunk_tokens):
        tokens = slice(start, start + chunk_tokens)
        loss += _softmax_loss_(F.linear(x[tokens], weight), targets[tokens], vocab_size, False)
    return loss


@_late_forward.register_fake
def _late_forward_fake(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk_tokens: int) -> Tensor:
    logits = x.new_empty(min(chunk_tokens, x.shape[0]), weight.shape[0])
    return logits.new_empty((), dtype=torch.float32)


@torch.library.custom_op("zerofit::linear_cross_entropy_gradients", mutates_args=())
def _late_backward(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk_tokens: int, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of weight, times grad: () fp32, a factor on the logits' gradient before it is rounded."""
    dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
    for start in range(0, x.shape[0], chunk_tokens):
        tokens = slice(start, start + chunk_tokens)
        logits = F.linear(x[tokens], weight)
        _softmax_loss_(logits, targets[tokens], vocab_size, True, grad)
        torch.mm(logits, weight, out=dx[tokens])
        dweight.addmm_(logits.t(), x[tokens])
    return dx, dweight


@_late_backward.register_fake
def _late_backward_fake(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk_tokens: int, grad: Tensor
) -> tuple[Tensor, Tensor]:
    logits = x.new_empty(min(chunk_tokens, x.shape[0]), weight.shape[0])
    return logits.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, targets, ctx.vocab_size, ctx.chunk_tokens = inputs
    ctx.save_for_backward(x, weight, targets)


def _differentiate_late(ctx, grad):  # type: ignore[no-untyped-def]
    dx, dweight = torch.ops.zerofit.linear_cross_entropy_gradients(
        *ctx.saved_tensors, ctx.vocab_size, ctx.chunk_tokens, grad
    )
    wx, ww = ctx.needs_input_grad[:2]
    return (dx if wx else None, dweight if ww else None, None, None, None)


_late_forward.register_autograd(_differentiate_late, setup_context=_keep_inputs)
