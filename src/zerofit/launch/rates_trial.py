"""Measures what a machine's GPUs reach: the program of ``zerofit plan --calibrate``, one process a GPU.

    python -m zerofit.launch.rates_trial FREE_BYTES

FREE_BYTES: what the driver showed as free on the first GPU before this process (what it shows as used differs between
NVML, which counts the driver's own reserve, and the CUDA runtime). Each figure is the best of several
runs: contention only ever slows. Without a GPU it measures the CPU in its place, small; for trying it out.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..engines.world import leave
from ..planning.speed import CPU_ADAM_BYTES
from .trials import write_result

REPEATS = 5
MIB = 1024**2


def main(arguments: Sequence[str] | None = None) -> None:
    """One rank. Collective."""
    (free,) = sys.argv[1:] if arguments is None else arguments
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    found: dict[str, Any] = {**_single(device), **_outside(device, int(free), "context_bytes")}
    found["workspace_bytes"] = torch.cuda.memory_allocated(device) if cuda else None
    if ranks > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        found |= _collectives(device, ranks)
        outside = _outside(device, int(free), "nccl_bytes")
        found |= {name: max(0, size - found["context_bytes"]) for name, size in outside.items()}
        found |= _transfers(device)  # again, all GPUs at once: they share buses
    found["adam_bytes_a_node"] = adam_bytes_per_second(4 * MIB if cuda else MIB // 4) * ranks
    if ranks > 1:
        dist.destroy_process_group()
    write_result({**found, "torch": torch.__version__, "device": torch.cuda.get_device_name(device) if cuda else "cpu"})


def _single(device: torch.device) -> dict[str, float]:
    return {
        "matrix_flops": matrix_flops(device),
        "memory_bandwidth": copy_bytes_per_second(device),
        **_transfers(device),
    }


def _transfers(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    near, far = torch.empty(256 * MIB, dtype=torch.uint8, device=device), torch.empty(256 * MIB, dtype=torch.uint8)
    far = far.pin_memory()
    down = best_seconds(lambda: near.copy_(far, non_blocking=True), device)
    up = best_seconds(lambda: far.copy_(near, non_blocking=True), device)
    return {"host_to_device": near.numel() / down, "device_to_host": near.numel() / up}


def matrix_flops(device: torch.device) -> float:
    """Best rate of square products over sizes; half precision where the GPU has it. FLOP/s."""
    sizes = (2048, 4096, 8192) if device.type == "cuda" else (128, 256)
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    rates = []
    for n in sizes:
        a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
        rates.append(2 * n**3 / best_seconds(partial(torch.matmul, a, b), device))
    return max(rates)


def copy_bytes_per_second(device: torch.device) -> float:
    """Read and written by a copy within the device's memory."""
    source = torch.empty((512 if device.type == "cuda" else 16) * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_seconds(lambda: target.copy_(source), device)


def adam_bytes_per_second(elements: int) -> float:
    """What fused AdamW on this process's cores moves a second, `CPU_ADAM_BYTES` a parameter."""
    parameter = torch.zeros(16 * elements, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.step()  # makes the moments
    return CPU_ADAM_BYTES * parameter.numel() / best_seconds(lambda: optimizer.step(), torch.device("cpu"))


def _collectives(device: torch.device, ranks: int) -> dict[str, float]:
    """Bus bandwidth, bytes a second: what NCCL's own tests report, so that it does not depend on the ranks."""
    size = (256 if device.type == "cuda" else 1) * MIB
    whole = torch.zeros(size // 2 // ranks * ranks, dtype=torch.bfloat16, device=device)
    part = torch.zeros(whole.numel() // ranks, dtype=torch.bfloat16, device=device)
    ring, moved = (ranks - 1) / ranks, 2 * whole.numel()
    found = {
        "all_reduce": 2 * ring * moved / best_seconds(lambda: dist.all_reduce(whole), device),
        "all_gather": ring * moved / best_seconds(lambda: dist.all_gather_into_tensor(whole, part), device),
    }
    if device.type == "cuda":  # gloo has none for this type
        found["reduce_scatter"] = ring * moved / best_seconds(lambda: dist.reduce_scatter_tensor(part, whole), device)
    return found


def best_seconds(work: Callable[[], Tensor | object], device: torch.device) -> float:
    """The shortest of several runs, the first left out."""
    wait = torch.cuda.synchronize if device.type == "cuda" else nullcontext
    seconds = []
    for _ in range(1 + REPEATS):
        wait()
        started = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _outside(device: torch.device, free_before_bytes: int, name: str) -> dict[str, int]:
    """What this process holds on the device outside PyTorch's allocator now."""
    if device.type != "cuda":
        return {name: 0}
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return {name: max(0, free_before_bytes - free - torch.cuda.memory_reserved(device))}


if __name__ == "__main__":
    main()
    leave(0)
