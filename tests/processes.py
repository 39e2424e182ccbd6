"""Runs a function on several gloo ranks, each in a fresh process, for tests.

A fork server with torch and DeepSpeed already imported makes a rank cost about 0.15 s. Fresh processes, because
DeepSpeed keeps state in its modules.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from torch.distributed import TCPStore

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "zerofit.models.gpt2", "zerofit.engines.build"]
)


def run(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_seconds: float = 120) -> list[Any]:
    """Call ``function(world, *arguments)`` on every rank; returns what the ranks returned, in their order.

    Args:
        function: at module level, so that it can be pickled; arguments and results too.

    Raises:
        AssertionError: a rank failed (its traceback is in the message) or the time is over.
    """
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")  # read when the fork server starts
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [_start(rank, world_size, store.port, function, arguments) for rank in range(world_size)]
    try:
        return _results([receiver for _, receiver in ranks], time.monotonic() + timeout_seconds)
    finally:
        for process, receiver in ranks:
            process.kill()
            process.join()
            receiver.close()


def _start(rank: int, world_size: int, port: int, function: Any, arguments: Any) -> tuple[Any, Connection]:
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_rank_main, args=(sender, rank, world_size, port, function, arguments))
    process.start()
    sender.close()
    return process, receiver


def _results(receivers: list[Connection], deadline: float) -> list[Any]:
    """In order of arrival, because the first failure is the cause of the others."""
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = wait(waiting, max(deadline - time.monotonic(), 0))
        if not ready:
            missing = [rank for rank in range(len(receivers)) if rank not in results]
            raise AssertionError(f"ranks {missing} did not answer in time")
        for receiver in ready:
            rank = receivers.index(receiver)  # type: ignore[arg-type]
            results[rank] = _received(rank, receivers[rank])
    return [results[rank] for rank in range(len(receivers))]


def _received(rank: int, receiver: Connection) -> Any:
    try:
        result, failure = receiver.recv()
    except EOFError:
        raise AssertionError(f"rank {rank} died without a word") from None
    if failure is not None:
        raise AssertionError(f"rank {rank} failed:\n{failure}")
    return result


def _rank_main(
    sender: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    from zerofit.types import World

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        store = TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
        world = World(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
        sender.send((function(world, *arguments), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))
    # Not sys.exit: a rank whose peer died would wait for it in the destructor of the process group.
    sender.close()
    os._exit(0)
