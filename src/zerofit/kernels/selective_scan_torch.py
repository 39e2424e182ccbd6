"""The selective scan in blocks of steps, plain PyTorch: the CPU's path, and a GPU's where the kernel cannot run.

A block of T steps is cut into chunks of about sqrt(T). The recurrence h_t = a_t h_{t-1} + x_t runs over the steps of
all chunks at once, then from chunk to chunk: 2 sqrt(T) operations of Python for T steps instead of T. Products of
decays are only ever formed forwards (they stay in [0, 1]), never by dividing, so nothing overflows.
Shape legend as in `selective_scan`; T steps of one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Steps between two states that the forward pass keeps for the backward pass, on every device.
STATE_INTERVAL = 64
#: Elements of (samples, STATE_INTERVAL, channels, N) worked on at once on a CPU: several such tensors fit its caches.
CPU_PIECE = 2**18


def compute_dtype(u: Tensor) -> torch.dtype:
    """fp32 for everything but float64, which stays (checks of gradients need it)."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def linear_scan_(decay: Tensor, value: Tensor, carry: Tensor | None, *, reverse: bool = False) -> Tensor:
    """In place, ``value[:, t] += decay[:, t] * value[:, t - 1]`` for rising t; both arguments are overwritten.

    Args:
        decay, value: (B, T, ...) of one shape, contiguous.
        carry: (B, ...), the value before the first step, or None for zeros.
        reverse: from the last step to the first; step t then takes from t + 1.

    Returns: value.
    """
    steps = value.shape[1]
    size = max(1, math.isqrt(steps))
    if steps % size:  # the largest divisor below; a prime number of steps runs one by one
        size = next(s for s in range(size, 0, -1) if steps % s == 0)
    shape = (value.shape[0], steps // size, size, *value.shape[2:])
    a, x = decay.view(shape), value.view(shape)
    order = range(size - 2, -1, -1) if reverse else range(1, size)
    back = 1 if reverse else -1
    for t in order:
        x[:, :, t].addcmul_(a[:, :, t], x[:, :, t + back])
        a[:, :, t].mul_(a[:, :, t + back])
    for c in range(shape[1] - 1, -1, -1) if reverse else range(shape[1]):
        if carry is not None:
            x[:, c].addcmul_(a[:, c], carry[:, None])
        carry = x[:, c, 0 if reverse else -1]
    return value


class _Block:
    """One block of at most STATE_INTERVAL steps: its inputs in the dtype of the computation, and its states."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        bias: Tensor,
        state: Tensor,
    ) -> None:
        dtype = state.dtype
        self.u = u.to(dtype)
        self.raw = delta.to(dtype) + bias
        self.dt = F.softplus(self.raw)  # (B, T, D)
        self.B, self.C = B.to(dtype), C.to(dtype)  # (B, T, N)
        self.x = self.dt * self.u  # (B, T, D)
        self.decay = torch.exp(self.dt[..., None] * A)  # (B, T, D, N)
        self.before = state  # (B, D, N)
        self.h = linear_scan_(self.decay.clone(), self.x[..., None] * self.B[:, :, None, :], state)

    def y(self) -> Tensor:
        """sum_n C h: (B, T, D)."""
        return _contract_states(self.h, self.C)


def _contract_states(h: Tensor, c: Tensor) -> Tensor:
    """(B, T, D, N), (B, T, N) -> (B, T, D)."""
    return torch.matmul(h, c[..., None]).squeeze(-1)


def _contract_channels(h: Tensor, x: Tensor) -> Tensor:
    """(B, T, D, N), (B, T, D) -> (B, T, N)."""
    return torch.matmul(x[..., None, :], h).squeeze(-2)


def pieces(u: Tensor, d_state: int) -> Iterator[tuple[slice, slice]]:
    """(samples, channels) to work on one after another: whole on a GPU, of about CPU_PIECE elements on a CPU."""
    batch, length, width = u.shape
    samples, channels = max(batch, 1), max(width, 1)
    if u.device.type == "cpu":
        per_channel = max(1, min(length, STATE_INTERVAL) * d_state)
        samples = max(1, min(samples, CPU_PIECE // (per_channel * channels)))
        channels = max(1, min(channels, CPU_PIECE // per_channel))
    for b in range(0, batch, samples):
        for d in range(0, width, channels):
            yield slice(b, b + samples), slice(d, d + channels)


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out (B, L, D) in u's dtype, states (B, ceil(L / STATE_INTERVAL), D, N), the last state (B, D, N)."""
    batch, length, width = u.shape
    dtype = compute_dtype(u)
    A, D, bias = A.to(dtype), D.to(dtype), delta_bias.to(dtype)
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    states = u.new_empty(batch, -(-length // STATE_INTERVAL), width, A.shape[1], dtype=dtype)
    last = u.new_zeros(batch, width, A.shape[1], dtype=dtype)
    if initial_state is not None:
        last.copy_(initial_state)
    for b, d in pieces(u, A.shape[1]):
        state = last[b, d]
        for i in range(states.shape[1]):
            t = slice(i * STATE_INTERVAL, (i + 1) * STATE_INTERVAL)
            states[b, i, d] = state
            block = _Block(u[b, t, d], delta[b, t, d], A[d], B[b, t], C[b, t], bias[d], state)
            y = block.y() + D[d] * block.u
            out[b, t, d] = y if z is None else y * F.silu(z[b, t, d].to(dtype))
            state = block.h[:, -1]
        last[b, d] = state
    return out, states, last


def backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
    states: Tensor,
) -> list[Tensor]:
    """-> gradients of u, delta, A, B, C, D, delta_bias and, with a gate, z.

    Those of u, delta and z come in their inputs' dtypes, the others, which are sums, in the dtype of the computation.
    """
    dtype = states.dtype
    A, D, bias = A.to(dtype), D.to(dtype), delta_bias.to(dtype)
    sums = _Sums(*(torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (A, B, C, D, bias)))
    du, ddelta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, delta))
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    for b, d in pieces(u, A.shape[1]):
        carry: Tensor | None = None
        for i in range(states.shape[1] - 1, -1, -1):
            t = slice(i * STATE_INTERVAL, (i + 1) * STATE_INTERVAL)
            block = _Block(u[b, t, d], delta[b, t, d], A[d], B[b, t], C[b, t], bias[d], states[b, i, d])
            dy = grad[b, t, d].to(dtype)
            if z is not None and dz is not None:
                gate = z[b, t, d].to(dtype)
                sigma = torch.sigmoid(gate)
                dz[b, t, d] = dy * (block.y() + D[d] * block.u) * sigma * (1 + gate * (1 - sigma))
                dy = dy * gate * sigma
            du[b, t, d], ddelta[b, t, d], carry = _block_backward(block, dy, carry, A[d], D[d], sums, b, t, d)
    grads = [du, ddelta, sums.A, sums.B, sums.C, sums.D, sums.bias]
    return grads if dz is None else [*grads, dz]


class _Sums(NamedTuple):
    """Gradients that several blocks add to."""

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    bias: Tensor


def _block_backward(
    block: _Block,
    dy: Tensor,
    carry: Tensor | None,
    A: Tensor,
    D: Tensor,
    sums: _Sums,
    b: slice,
    t: slice,
    d: slice,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the block's share to ``sums``.

    Args: dy: (B, T, D), the gradient of y; carry: (B, D, N), the gradient of the last state from later steps.

    Returns: the gradients of u and delta, (B, T, D), and of the state before the block.
    """
    sums.C[b, t] += _contract_channels(block.h, dy)
    g = dy[..., None] * block.C[:, :, None, :]  # becomes the gradient of h
    later = torch.cat([block.decay[:, 1:], torch.ones_like(block.decay[:, :1])], dim=1)
    linear_scan_(later, g, carry, reverse=True)
    dx = _contract_states(g, block.B)
    sums.B[b, t] += _contract_channels(g, block.x)
    before = block.decay.mul_(g)  # the gradient of the state one step earlier
    carry = before[:, 0].clone()
    before[:, 1:] *= block.h[:, :-1]
    before[:, 0] *= block.before
    sums.A[d] += torch.mul(before, block.dt[..., None], out=later).sum(dim=(0, 1))
    ddelta = (before.mul_(A).sum(-1) + dx * block.u) * torch.sigmoid(block.raw)
    sums.bias[d] += ddelta.sum(dim=(0, 1))
    sums.D[d] += (dy * block.u).sum(dim=(0, 1))
    return dx * block.dt + D * dy, ddelta, carry
