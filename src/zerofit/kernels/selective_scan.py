"""The selective scan of Mamba (Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces").

Shape legend: B samples, L steps of time, D inner channels, N states a channel.

::

    dt[b,t,d]  = softplus(delta[b,t,d] + delta_bias[d])
    h[b,t,d,n] = exp(dt[b,t,d] A[d,n]) h[b,t-1,d,n] + dt[b,t,d] u[b,t,d] B[b,t,n]        h[b,-1] = 0
    y[b,t,d]   = sum_n C[b,t,n] h[b,t,d,n] + D[d] u[b,t,d]
    out        = y silu(z)

Nothing of shape (B, L, D, N) is kept for the backward pass: it keeps the inputs and the state before every
`STATE_INTERVAL`-th step, and computes the states between them again. Three paths compute the same function:

- `selective_scan_reference`: step by step, differentiated by autograd, the measure of the others;
- `selective_scan_torch`: in blocks of steps, any device (the CPU's path, and the fallback on a GPU);
- `selective_scan_cuda`: one CUDA kernel each way, compiled at run time.

`selective_scan` registers them as the operators ``zerofit::selective_scan`` and ``zerofit::selective_scan_backward``
with fake kernels, so that FakeTensorMode and ``torch.compile`` see their outputs and what is kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import nvrtc, selective_scan_cuda, selective_scan_torch
from .selective_scan_torch import STATE_INTERVAL


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
    *,
    deterministic: bool = False,
) -> Tensor:
    """``(scan(u, softplus(delta + delta_bias), A, B, C) + D u) silu(z)``, fp32 inside, differentiable in all inputs.

    Args:
        u, delta: (B, L, D), fp32, bf16 or fp16; rows may be strided, the last dimension is contiguous.
        A: (D, N), negative; used as fp32.
        B, C: (B, L, N), usually slices of one projection.
        D, delta_bias: (D,), any float dtype; used as fp32.
        z: (B, L, D) or None (no gate).
        deterministic: the GPU's backward adds up the gradients of B and C in a fixed order. It costs
            ``B L 2N 4`` bytes for every 16 channels while it runs. The other paths always do.

    Returns: (B, L, D) in u's dtype. Gradients come in their inputs' dtypes.

    Raises: ValueError when the shapes do not belong together.
    """
    check_shapes(u, delta, A, B, C, D, z, delta_bias)
    out, _ = torch.ops.zerofit.selective_scan(u, delta, A, B, C, D, z, delta_bias, deterministic)
    result: Tensor = out
    return result


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, step by step in plain PyTorch. Slow, and autograd keeps every state: for checking.

    Args: as in `selective_scan`, in any float dtype (computed in float64 when u is float64, else in fp32);
        initial_state: (B, D, N) or None for zeros.

    Returns: the output (B, L, D) in u's dtype, and the last state (B, D, N) in the dtype of the computation.
    """
    batch, length, width = u.shape
    dtype = selective_scan_torch.compute_dtype(u)
    uf, A, B, C, D = (x.to(dtype) for x in (u, A, B, C, D))
    dt = F.softplus(delta.to(dtype) + delta_bias.to(dtype))  # (B, L, D)
    state = uf.new_zeros(batch, width, A.shape[1]) if initial_state is None else initial_state.to(dtype)
    ys = []
    for t in range(length):
        decay = torch.exp(dt[:, t, :, None] * A)  # (B, D, N)
        state = decay * state + (dt[:, t] * uf[:, t])[..., None] * B[:, t, None, :]
        ys.append((state * C[:, t, None, :]).sum(-1))  # (B, D)
    y = torch.stack(ys, dim=1) + D * uf if ys else uf * D
    return (y if z is None else y * F.silu(z.to(dtype))).to(u.dtype), state


@torch.no_grad()
def selective_scan_final_state(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of a prompt with the state behind it, for generation. No gradients.

    Args: as in `selective_scan`; initial_state: (B, D, N) fp32 or None for zeros (a state given here makes the
        PyTorch path run, on a GPU too).

    Returns: the output (B, L, D) in u's dtype and the last state (B, D, N) fp32.
    """
    check_shapes(u, delta, A, B, C, D, z, delta_bias)
    if initial_state is not None or u.shape[1] == 0:
        out, _, state = selective_scan_torch.forward(u, delta, A, B, C, D, z, delta_bias, initial_state)
        return out, state
    out, states = torch.ops.zerofit.selective_scan(u, delta, A, B, C, D, z, delta_bias, False)
    rest = slice((u.shape[1] - 1) // STATE_INTERVAL * STATE_INTERVAL, None)
    _, _, state = selective_scan_torch.forward(
        u[:, rest], delta[:, rest], A, B[:, rest], C[:, rest], D, None, delta_bias, states[:, -1]
    )
    return out, state


@torch.no_grad()
def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of generation.

    Args: state: (B, D, N) fp32; u, delta, z: (B, D); B, C: (B, N); the rest as in `selective_scan`.

    Returns: the output (B, D) in u's dtype and the new state (B, D, N); the given one is left as it was.
    """
    dtype = state.dtype
    dt = F.softplus(delta.to(dtype) + delta_bias.to(dtype))
    uf = u.to(dtype)
    state = torch.exp(dt[..., None] * A.to(dtype)) * state + (dt * uf)[..., None] * B.to(dtype)[:, None, :]
    y = (state * C.to(dtype)[:, None, :]).sum(-1) + D.to(dtype) * uf
    return (y if z is None else y * F.silu(z.to(dtype))).to(u.dtype), state


def check_shapes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
) -> None:
    """Raise ValueError, in words, when the shapes do not belong together."""
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(
            f"selective_scan takes u of (batch, length, d_inner) and A of (d_inner, d_state); "
            f"u is {tuple(u.shape)} and A is {tuple(A.shape)}"
        )
    (batch, length, width), d_state = u.shape, A.shape[1]
    gate = [] if z is None else [("z", z, (batch, length, width))]
    for name, tensor, shape in [
        ("delta", delta, (batch, length, width)),
        ("A", A, (width, d_state)),
        ("B", B, (batch, length, d_state)),
        ("C", C, (batch, length, d_state)),
        ("D", D, (width,)),
        ("delta_bias", delta_bias, (width,)),
        *gate,
    ]:
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"selective_scan: {name} is {tuple(tensor.shape)} where u of {tuple(u.shape)} and A of "
                f"{tuple(A.shape)} want {shape}"
            )


def _states_shape(u: Tensor, A: Tensor) -> tuple[int, int, int, int]:
    return u.shape[0], -(-u.shape[1] // STATE_INTERVAL), u.shape[2], A.shape[1]


@torch.library.custom_op("zerofit::selective_scan", mutates_args=())
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """(out, states): states (B, ceil(L / STATE_INTERVAL), D, N), the state before each interval."""
    if selective_scan_cuda.takes(u, A):
        try:
            return selective_scan_cuda.forward(u, delta, A, B, C, D, z, delta_bias)
        except nvrtc.Unavailable as error:
            selective_scan_cuda.refuse(error)
    out, states, _ = selective_scan_torch.forward(u, delta, A, B, C, D, z, delta_bias)
    return out, states


@_forward.register_fake
def _forward_fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    states = u.new_empty(_states_shape(u, A), dtype=selective_scan_torch.compute_dtype(u))
    return u.new_empty(u.shape), states


@torch.library.custom_op("zerofit::selective_scan_backward", mutates_args=())
def _backward(
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
    deterministic: bool,
) -> list[Tensor]:
    """Gradients of u, delta, A, B, C, D, delta_bias and, with a gate, of z, each contiguous in its input's dtype."""
    grads = None
    if selective_scan_cuda.takes(u, A):
        try:
            grads = selective_scan_cuda.backward(grad, u, delta, A, B, C, D, z, delta_bias, states, deterministic)
        except nvrtc.Unavailable as error:
            selective_scan_cuda.refuse(error)
    if grads is None:
        grads = selective_scan_torch.backward(grad, u, delta, A, B, C, D, z, delta_bias, states)
    inputs = (u, delta, A, B, C, D, delta_bias) if z is None else (u, delta, A, B, C, D, delta_bias, z)
    return [g.to(x.dtype).contiguous() for g, x in zip(grads, inputs, strict=True)]


@_backward.register_fake
def _backward_fake(
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
    deterministic: bool,
) -> list[Tensor]:
    inputs = (u, delta, A, B, C, D, delta_bias) if z is None else (u, delta, A, B, C, D, delta_bias, z)
    return [x.new_empty(x.shape) for x in inputs]


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.deterministic = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx, grad, _):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 9
    u, delta, A, B, C, D, z, delta_bias, states = ctx.saved_tensors
    du, ddelta, dA, dB, dC, dD, dbias, *dz = torch.ops.zerofit.selective_scan_backward(
        grad, u, delta, A, B, C, D, z, delta_bias, states, ctx.deterministic
    )
    return du, ddelta, dA, dB, dC, dD, (dz[0] if dz else None), dbias, None


_forward.register_autograd(_differentiate, setup_context=_keep)
