"""Opening and closing the process group of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ..planning.plan import Plan
from ..types import World


@contextmanager
def open_world(plan: Plan) -> Iterator[World]:
    """Join the ranks named in the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); leave on exit.

    A single process opens no group unless its strategy needs one (ZeRO on one GPU). Collective.
    """
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    device = torch.device("cuda", local_rank) if plan.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if plan.deterministic:
        # cuBLAS reads it when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    grouped = world_size > 1 or plan.strategy.startswith("zero")
    if grouped:
        _join(rank, world_size, device, plan.collective_timeout_seconds)
    try:
        yield World(rank=rank, world_size=world_size, local_rank=local_rank, device=device)
    finally:
        if grouped and dist.is_initialized():
            dist.destroy_process_group()


def _join(rank: int, world_size: int, device: torch.device, timeout_seconds: int) -> None:
    timeout = timedelta(seconds=timeout_seconds)
    if "MASTER_ADDR" not in os.environ:  # one process, started by hand
        store = TCPStore("127.0.0.1", 0, 1, is_master=True)
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl", store=store, rank=0, world_size=1, timeout=timeout
        )
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", rank=rank, world_size=world_size, timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timeout)
