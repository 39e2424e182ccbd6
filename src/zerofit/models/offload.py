"""Inputs of checkpointed blocks kept in host memory between the two passes.

A block's input goes out on a stream of its own while the block computes; in the backward pass the input of the block
before comes back while a block is recomputed. What it costs the GPU is one input more than it works on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Kept:
    """One input: on the host, and on its way back once `back` is set."""

    host: Tensor
    device: torch.device
    back: Tensor | None = None
    ready: Any = None


class InputOffload:
    """The hooks of all checkpointed blocks of one model; `hooks` goes around each block's call."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._stream: Any = None

    def hooks(self) -> Any:
        """A context for one call of `torch.utils.checkpoint.checkpoint`, whose own hooks catch what lies inside."""
        return torch.autograd.graph.saved_tensors_hooks(self._out, self._back)

    def _out(self, tensor: Tensor) -> Any:
        if not tensor.is_floating_point():
            return tensor
        self._kept.append(self.to_host(tensor))
        return len(self._kept) - 1, self._kept

    def _back(self, packed: Any) -> Tensor:
        """The input, and the one that is wanted next on its way."""
        if isinstance(packed, Tensor):
            return packed
        index: int = packed[0]
        kept: list[_Kept] = packed[1]
        wanted = [kept[i] for i in (index - 1, index) if i >= 0 and kept[i].back is None]
        for entry in wanted:  # memory first for the next one: so every block but the last does the same
            host = entry.host  # its strides too: pictures may be channels-last
            entry.back = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=entry.device)
        for entry in reversed(wanted):
            self.fetch(entry)
        entry = kept[index]
        if index == len(kept) - 1:  # backward passes go from the last block to the first
            kept.pop()
        if entry.ready is not None:
            torch.cuda.current_stream(entry.device).wait_event(entry.ready)
        assert entry.back is not None
        return entry.back

    def to_host(self, tensor: Tensor) -> _Kept:
        """Start the copy out."""
        if not tensor.is_cuda:
            return _Kept(tensor.detach().clone(), tensor.device)
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        with torch.cuda.stream(self._side(tensor.device)):
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self._stream)
        return _Kept(host, tensor.device)

    def fetch(self, entry: _Kept) -> None:
        """Start the copy back."""
        assert entry.back is not None
        if entry.device.type != "cuda":
            entry.back.copy_(entry.host)
            return
        with torch.cuda.stream(self._side(entry.device)):
            entry.back.copy_(entry.host, non_blocking=True)
            entry.ready = torch.cuda.Event()
            entry.ready.record()

    def _side(self, device: torch.device) -> Any:
        """The stream of the copies, behind all that was started so far."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return self._stream


class TracedOffload(InputOffload):
    """For traces on fake tensors: what goes to the host leaves no storage behind."""

    def __init__(self, unrecorded: Callable[[], Any]) -> None:
        super().__init__()
        self.unrecorded = unrecorded

    def to_host(self, tensor: Tensor) -> _Kept:
        with self.unrecorded():
            return _Kept(torch.empty_like(tensor, device="meta"), tensor.device)

    def fetch(self, entry: _Kept) -> None:
        """Nothing moves."""
