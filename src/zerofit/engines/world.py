"""Opening and closing the process group of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import util
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..planning.plan import Plan
from ..types import World


def launcher_store() -> dist.Store | None:
    """The rendezvous store of whoever started the ranks (``zerofit train``, torchrun, ``deepspeed``, srun with
    MASTER_ADDR and MASTER_PORT); None for one process that nobody launched. Before any process group exists."""
    if "MASTER_ADDR" not in os.environ:
        return None
    store: dist.Store = next(rendezvous("env://"))[0]
    return store


@contextmanager
def open_world(plan: Plan, store: dist.Store | None = None) -> Iterator[World]:
    """Join the ranks named in the environment (RANK, WORLD_SIZE, LOCAL_RANK); leave on exit. Collective.

    Args:
        plan: device, time limit of collectives.
        store: the launcher's rendezvous store; None for one process that nobody launched. A single process opens no
            group unless its strategy needs one (ZeRO on one GPU).
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
    grouped = world_size > 1 or plan.strategy.startswith(("zero", "fsdp"))
    if grouped:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store or dist.HashStore(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=plan.collective_timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    try:
        yield World(rank=rank, world_size=world_size, local_rank=local_rank, device=device)
    finally:
        if grouped and dist.is_initialized():
            dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process without taking the interpreter apart.

    Everything of ours is closed by now, and the exit code means something. Taken apart, threads of PyTorch that belong
    to its collectives end the process with SIGABRT now and then (seen with gloo, torch 2.13).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # As Python does at its end: multiprocessing's temporary folder would stay in /tmp.
    util._run_finalizers()  # type: ignore[attr-defined]
    os._exit(code)
