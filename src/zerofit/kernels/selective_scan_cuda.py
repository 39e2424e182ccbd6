"""Launches the CUDA kernels of ``selective_scan.cu``. Same contract as `selective_scan_torch`, on an NVIDIA GPU.

What the kernels do not take (`takes` says no, and warns once with the cost) runs on the PyTorch path.
"""

from __future__ import annotations

import ctypes
import functools
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.models import SCAN_CAPABILITY, SCAN_MAX_LENGTH, SCAN_MAX_STATES
from . import nvrtc
from .selective_scan_torch import STATE_INTERVAL

#: Largest batch: the second dimension of a grid.
MAX_BATCH = 65535
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTERS = [
    "u",
    "delta",
    "z",
    "B",
    "C",
    "grad",
    "A",
    "D",
    "bias",
    "out",
    "du",
    "ddelta",
    "dz",
    "states",
    "dA",
    "dBC",
    "dD",
    "dbias",
    "carry",
    "decay",
]
_ROWS = ["u", "delta", "z", "B", "C", "grad"]
_COUNTS = ["length", "width", "padded", "intervals", "chunk", "chunks", "batch", "columns"]


class _Params(ctypes.Structure):
    """``struct Params`` of the source, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((f"{name}_batch", ctypes.c_int64) for name in _ROWS),
        *((f"{name}_row", ctypes.c_int32) for name in _ROWS),
        *((name, ctypes.c_int32) for name in _COUNTS),
    ]


@dataclass(frozen=True)
class Variant:
    """How a kernel is cut: channels and states a lane holds, steps of a tile, steps held in registers, occupancy."""

    channels: int = 2
    states: int = 4
    tile: int = 16
    span: int = 4
    min_blocks: int = 8
    unroll: int = 2
    pack: bool = False  # B and C stay in their 16-bit type in shared memory
    chunk: int = 0  # steps of time a warp takes, a multiple of STATE_INTERVAL or not less than all; 0: all

    def width(self, padded_states: int) -> int:
        """Channels of a warp."""
        return 32 * self.states // padded_states * self.channels

    def vector(self, padded_states: int) -> int:
        """Elements that a lane loads at once."""
        return self.width(padded_states) * self.tile // 32


def padded_states(d_state: int) -> int:
    return max(8, 1 << (d_state - 1).bit_length())


def variants(d_state: int, shared_bytes: int = 228 * 1024) -> tuple[Variant, Variant, Variant]:
    """(forward with wide units, forward with narrow ones, backward) for a number of states.

    A unit is a warp's channels in one sample.

    Args: shared_bytes: shared memory of a multiprocessor. Cards with about 100 KiB of it (consumer cards) take a
        backward kernel that keeps less there for a warp.
    """
    padded = padded_states(d_state)
    tile = 8 if padded == 8 else 16
    wide = Variant(tile=tile, min_blocks=12)
    narrow = wide if padded == 8 else Variant(channels=1, unroll=4, pack=True, min_blocks=16)
    if shared_bytes < 200 * 1024 and padded > 8:
        return wide, narrow, Variant(channels=1, span=8, min_blocks=12)
    return wide, narrow, Variant(tile=tile)


@dataclass(frozen=True)
class _Cost:
    """What work takes, in any unit of time; the ratios were measured on an H200 (docs/kernels.md)."""

    alone: float  # units at a stretch, at most one a scheduler
    round: float  # units at a stretch, for every further unit a scheduler has to take
    cut: float  # units in chunks of time, which are walked through nearly twice, for each unit a scheduler has

    def stretch(self, share: float) -> float:
        return self.alone if share <= 1 else self.round * math.ceil(share)

    def chunks(self, share: float) -> float:
        return self.cut * share


_WIDE, _NARROW, _BACKWARD = _Cost(0.35, 0.266, 0.45), _Cost(0.23, 0.139, 0.28), _Cost(1.05, 0.84, 1.09)


def spread(length: int, units: int, processors: int, cost: _Cost) -> tuple[float, int]:
    """(relative time, steps of time a warp takes): all of them, or a chunk where that is expected to be faster.

    A multiprocessor has four schedulers. Units at a stretch beyond a multiple of all schedulers cost a whole round;
    chunks fill every round, and cost a second walk for what each hands on.
    """
    schedulers, intervals = 4 * processors, -(-length // STATE_INTERVAL)
    share = units / schedulers
    stretch, cut = cost.stretch(share), cost.chunks(share)
    if cut >= stretch or intervals < 4:
        return stretch, length
    parts = min(intervals, max(5, round(2 / share)))
    return cut, -(-intervals // parts) * STATE_INTERVAL


def chosen(u: Tensor, A: Tensor) -> tuple[Variant, Variant]:
    """(forward, backward) for these inputs on their GPU, with the steps of time that a warp takes."""
    (batch, length, width), d_state = u.shape, A.shape[1]
    properties = torch.cuda.get_device_properties(u.device)
    wide, narrow, back = variants(d_state, properties.shared_memory_per_multiprocessor)

    def planned(variant: Variant, cost: _Cost) -> tuple[float, Variant]:
        units = -(-width // variant.width(padded_states(d_state))) * batch
        time, chunk = spread(length, units, properties.multi_processor_count, cost)
        return time, replace(variant, chunk=chunk)

    front = min(planned(wide, _WIDE), planned(narrow, _NARROW), key=lambda plan: plan[0])[1]
    return front, planned(back, _BACKWARD)[1]


def takes(u: Tensor, A: Tensor) -> bool:
    """Whether the kernels run this; where they could not on a GPU, one warning says why and what it costs."""
    if not u.is_cuda or u.numel() == 0 or u.dtype == torch.float64 or _refused:
        return False
    reason = _machine(u.device.index or 0) or _shape(u.dtype, u.shape[0], u.shape[1], A.shape[1])
    if reason:
        _warn(reason)
    return reason is None


#: Why the compiler or the driver refused a kernel in this process; the PyTorch path runs from then on.
_refused: list[str] = []


def refuse(error: nvrtc.Unavailable) -> None:
    """Run the PyTorch path from now on: a driver older than the compiler, say, refuses every kernel alike."""
    _refused.append(str(error))
    _warn(str(error))


def _shape(dtype: torch.dtype, batch: int, length: int, d_state: int) -> str | None:
    if dtype not in _TYPES:
        return f"it takes fp32, bf16 and fp16, not {dtype}"
    if not 1 <= d_state <= SCAN_MAX_STATES:
        return f"it takes d_state up to {SCAN_MAX_STATES}, not {d_state}"
    if batch > MAX_BATCH:
        return f"it takes a batch up to {MAX_BATCH}, not {batch}"
    if length > SCAN_MAX_LENGTH:
        return f"it takes up to {SCAN_MAX_LENGTH} steps, not {length}"
    return None


@functools.cache
def _machine(device: int) -> str | None:
    if torch.version.hip or torch.cuda.get_device_capability(device) < SCAN_CAPABILITY:
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, not {torch.cuda.get_device_name(device)}"
    try:
        nvrtc.version()
    except nvrtc.Unavailable as error:
        return str(error)
    return None


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"The fused selective scan cannot run here: {reason}. The PyTorch path runs instead; it takes 10 to 50 times "
        f"as long, and holds {STATE_INTERVAL} steps of all states in fp32 several times over while it works.",
        stacklevel=3,
    )


def macros(
    dtype: torch.dtype, d_state: int, variant: Variant, vector: bool, gate: bool, back: bool, fixed: bool
) -> dict[str, int]:
    """The compiler's macros; see the head of the source."""
    return {
        "X_TYPE": _TYPES[dtype],
        "STATES": d_state,
        "STATES_PADDED": padded_states(d_state),
        "LANE_CHANNELS": variant.channels,
        "LANE_STATES": variant.states,
        "TILE": variant.tile,
        "SPAN": variant.span,
        "INTERVAL": STATE_INTERVAL,
        "VEC": int(vector),
        "HAS_Z": int(gate),
        "BACKWARD": int(back),
        "DETERMINISTIC": int(fixed),
        "MIN_BLOCKS": variant.min_blocks,
        "FORWARD_UNROLL": variant.unroll,
        "PREFIX_UNROLL": variant.unroll,
        "PACK": int(variant.pack and dtype != torch.float32),
        "PARAMS_BYTES": ctypes.sizeof(_Params),
    }


def source() -> str:
    return Path(__file__).with_name("selective_scan.cu").read_text()


@functools.cache
def _module(
    device: torch.device,
    dtype: torch.dtype,
    d_state: int,
    variant: Variant,
    vector: bool,
    gate: bool,
    back: bool,
    fixed: bool,
) -> nvrtc.Module:
    return nvrtc.Module(source(), macros(dtype, d_state, variant, vector, gate, back, fixed), device)


class _Call:
    """One forward or backward pass: checked inputs, the module, and the parameters that both passes share."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor | None,
        delta_bias: Tensor,
        grad: Tensor | None,
        variant: Variant,
        fixed: bool,
    ) -> None:
        self.batch, self.length, self.width = u.shape
        self.d_state, self.padded_states = A.shape[1], padded_states(A.shape[1])
        rows = {"u": u, "delta": delta, "z": u if z is None else z, "grad": u if grad is None else grad}
        # One type for all: mixed inputs (a model under autocast) are computed from fp32 copies.
        same = len({x.dtype for x in (*rows.values(), B, C)}) == 1
        self.dtype, self.device = (u.dtype if same else torch.float32), u.device
        rows = {name: _last_contiguous(x.to(self.dtype)) for name, x in rows.items()}
        per_warp = variant.width(self.padded_states)
        self.columns = -(-self.width // per_warp)
        self.padded = self.columns * per_warp
        vector = self.width % variant.vector(self.padded_states) == 0 and all(
            _aligned(x, variant.vector(self.padded_states)) for x in rows.values()
        )
        narrow = {name: self._states_last(x.to(self.dtype), variant) for name, x in (("B", B), ("C", C))}
        extra = self.padded - self.width
        wide = {
            "A": _padded(A.float(), (0, self.padded_states - self.d_state, 0, extra)),
            "D": _padded(D.float(), (0, extra)),
            "bias": _padded(delta_bias.float(), (0, extra)),
        }
        self.held = rows | narrow | {name: _whole(x) for name, x in wide.items()}
        self.module = _module(
            self.device,
            self.dtype,
            self.d_state,
            replace(variant, chunk=0),
            vector,
            z is not None,
            grad is not None,
            fixed,
        )
        self.chunk = variant.chunk or self.length
        self.chunks = -(-self.length // self.chunk)
        self.intervals = -(-self.length // STATE_INTERVAL)
        self.params = _Params(
            length=self.length, width=self.width, padded=self.padded, intervals=self.intervals,
            chunk=self.chunk, chunks=self.chunks, batch=self.batch, columns=self.columns,
        )  # fmt: skip
        for name, x in self.held.items():
            setattr(self.params, name, x.data_ptr())
            if x.dim() == 3:
                setattr(self.params, f"{name}_batch", x.stride(0) * x.element_size())
                setattr(self.params, f"{name}_row", x.stride(1) * x.element_size())

    def _states_last(self, x: Tensor, variant: Variant) -> Tensor:
        """B or C as the kernel reads it: rows of padded states, aligned for its vector loads (small; copied if not)."""
        vector = min(8, variant.tile * self.padded_states // 32)
        if x.shape[2] != self.padded_states:
            return F.pad(x, (0, self.padded_states - x.shape[2]))
        return x if x.stride(2) == 1 and _aligned(x, vector) else x.clone(memory_format=torch.contiguous_format)

    def give(self, **tensors: Tensor) -> None:
        for name, x in tensors.items():
            self.held[name] = x
            setattr(self.params, name, x.data_ptr())

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def run(self, way: str) -> None:
        """The pass ("forward" or "backward"), behind what it needs to know of the chunks before each chunk."""
        units, carveout = self.columns * self.batch, 100 if way == "backward" else None
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            if self.chunks > 1:
                carry = self.empty(self.batch, self.chunks, self.padded, self.padded_states)
                self.give(carry=carry, decay=self.empty(self.batch, self.chunks, self.padded))
                before = (units * (self.chunks - 1), 1, 1)
                self.module.launch(f"scan_chunk_{way}", before, 32, self.params, stream=stream)
                chain = (-(-self.padded * self.padded_states // 256), self.batch, 1)
                self.module.launch(f"scan_chain_{way}", chain, 256, self.params, stream=stream)
            grid = (units * self.chunks, 1, 1)
            self.module.launch(f"scan_{way}", grid, 32, self.params, stream=stream, shared_carveout=carveout)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(x: Tensor, by: tuple[int, ...]) -> Tensor:
    return F.pad(x, by) if any(by) else x


def _aligned(x: Tensor, elements: int) -> bool:
    """Whether every row may be loaded by vectors of so many elements (of at most 16 bytes)."""
    size = x.element_size()
    step = min(16, elements * size)
    return x.data_ptr() % step == 0 and all(
        x.stride(d) * size % step == 0 for d in range(x.dim() - 1) if x.shape[d] > 1
    )


def _whole(x: Tensor) -> Tensor:
    """Contiguous and aligned for 16-byte loads (a view into a flat buffer may not be)."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
    variant: Variant | None = None,
) -> tuple[Tensor, Tensor]:
    """-> out (B, L, D) in u's dtype, states (B, ceil(L / STATE_INTERVAL), D, N) fp32.

    Raises: nvrtc.Unavailable when the driver refuses to load or start the kernel.
    """
    call = _Call(u, delta, A, B, C, D, z, delta_bias, None, variant or chosen(u, A)[0], False)
    out = call.empty(*u.shape, dtype=call.dtype)
    states = call.empty(call.batch, call.intervals, call.width, call.d_state)
    call.give(out=out, states=states)
    call.run("forward")
    return out.to(u.dtype), states


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
    deterministic: bool,
    variant: Variant | None = None,
) -> list[Tensor]:
    """-> gradients of u, delta, A, B, C, D, delta_bias and, with a gate, z; see `selective_scan_torch.backward`.

    Sums over time and batch are added in a fixed order always; those of B and C over channels with ``deterministic``,
    else by atomic additions.

    Raises: nvrtc.Unavailable when the driver refuses to load or start the kernel.
    """
    variant = variant or chosen(u, A)[1]
    call = _Call(u, delta, A, B, C, D, z, delta_bias, grad, variant, deterministic)
    shape, sums = (call.batch, call.length, call.width), (call.batch, call.chunks, call.padded)
    outs = {name: call.empty(*shape, dtype=call.dtype) for name in ("du", "ddelta", *(() if z is None else ("dz",)))}
    dA, dD, dbias = call.empty(*sums, call.padded_states), call.empty(*sums), call.empty(*sums)
    both = (call.batch, call.length, 2 * call.padded_states)
    dBC = call.empty(call.columns, *both) if deterministic else torch.zeros(both, device=u.device)
    call.give(**outs, dA=dA, dD=dD, dbias=dbias, dBC=dBC, states=_whole(states))
    call.run("backward")
    if deterministic:
        dBC = dBC.sum(0)
    dB, dC = dBC[..., : call.d_state], dBC[..., call.padded_states :][..., : call.d_state]
    if call.batch * call.length == 1:
        dC = dC.clone()  # contiguous halves of one tensor: an operator's results may not be views of one
    dA, dD, dbias = (x[0, 0] if call.batch * call.chunks == 1 else x.sum((0, 1)) for x in (dA, dD, dbias))
    grads = [
        outs["du"],
        outs["ddelta"],
        dA[: call.width, : call.d_state],
        dB,
        dC,
        dD[: call.width],
        dbias[: call.width],
    ]
    return grads if z is None else [*grads, outs["dz"]]
