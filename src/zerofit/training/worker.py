"""One rank of a run. Started by ``zerofit train``, torchrun, ``deepspeed`` or srun::

    python -m zerofit.training.worker --run RUN [--resume WHICH]
    torchrun --nproc-per-node 2 -m zerofit.training.worker CONFIG --preset NAME --dotted.key value …

In the second form rank 0 does what ``zerofit train`` does before it launches. Either way rank 0 publishes the run
and its plan through the rendezvous store, before any process group exists, and every rank reads the same bytes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypedDict, cast

from torch.distributed import Store

from ..config.arguments import parse_arguments
from ..config.load import load_config
from ..engines.world import launcher_store, leave
from ..errors import ConfigError, ZerofitError
from ..planning.plan import Plan
from .rank import train_rank
from .signals import stop_with_launcher
from .start import PreparedRun, Start, prepare_run, start_of

#: The store's key, and how long rank 0 may take to tokenise before the others give up.
RUN_KEY = "zerofit/run"
PREPARE_TIMEOUT_SECONDS = 24 * 3600
#: Counts the ranks that have read it; and how long a rank 0 that has nothing more to do keeps the store alive for them.
READERS_KEY = "zerofit/run/readers"
READ_TIMEOUT_SECONDS = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as one rank; returns the process's exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    stop_with_launcher()
    rank = int(os.environ.get("RANK", "0"))
    try:
        store = launcher_store()
        prepared = _agree_on_run(arguments, store, rank)
        if prepared is not None:
            train_rank(prepared, store)
    except ZerofitError as error:
        if rank == 0:
            print(error, file=sys.stderr)
        return error.exit_code
    return 0


class _Message(TypedDict, total=False):
    """What rank 0 publishes: a refusal, a run, or nothing (a dry run)."""

    error: str
    exit_code: int
    folder: str
    plan: str
    start: list[str]


def _agree_on_run(arguments: list[str], store: Store | None, rank: int) -> PreparedRun | None:
    """Rank 0 reads or prepares the run; the others wait for it. Its refusals become everybody's. None: a dry run.

    Raises:
        ZerofitError: rank 0 refused, with its message and exit code.
    """
    if rank == 0:
        message, error = _prepare(arguments)
        if store is not None:
            store.set(RUN_KEY, json.dumps(message))
            if "plan" not in message:
                _wait_for_readers(store)
        if error is not None:
            raise error
    else:
        assert store is not None
        store.wait([RUN_KEY], timedelta(seconds=PREPARE_TIMEOUT_SECONDS))
        message = cast(_Message, json.loads(store.get(RUN_KEY)))
        store.add(READERS_KEY, 1)
    if "error" in message:
        refusal = ZerofitError(message["error"])
        refusal.exit_code = message["exit_code"]
        raise refusal
    if "plan" not in message:
        return None
    return PreparedRun(
        Path(message["folder"]), Plan.model_validate_json(message["plan"]), Start.of_message(message["start"])
    )


def _wait_for_readers(store: Store) -> None:
    """Rank 0 may host the store: it stays until the others have read why nothing is started, or are late."""
    others, deadline = int(os.environ.get("WORLD_SIZE", "1")) - 1, time.monotonic() + READ_TIMEOUT_SECONDS
    while store.add(READERS_KEY, 0) < others and time.monotonic() < deadline:
        time.sleep(0.05)


def _prepare(arguments: list[str]) -> tuple[_Message, ZerofitError | None]:
    """What rank 0 tells the others, and its own error."""
    try:
        prepared = _read_or_prepare(arguments)
    except ZerofitError as error:
        return {"error": str(error), "exit_code": error.exit_code}, error
    if prepared is None:
        return {}, None
    message: _Message = {
        "folder": str(prepared.folder),
        "plan": prepared.plan.model_dump_json(),
        "start": prepared.start.as_message(),
    }
    return message, None


def _read_or_prepare(arguments: list[str]) -> PreparedRun | None:
    request = parse_arguments(arguments)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if request.run is not None:
        plan = Plan.model_validate_json((request.run / "plan.json").read_text(encoding="utf-8"))
        prepared = PreparedRun(request.run, plan, start_of(request))
    else:
        overrides = [*request.overrides, ("num_gpus", str(world_size))]
        resolved = load_config(request.source, request.preset, overrides)
        ready = prepare_run(resolved, request)
        if ready is None:
            return None
        prepared = ready
    if prepared.plan.world_size != world_size:
        raise ConfigError(
            f"The plan is for {prepared.plan.world_size} ranks and {world_size} were started. Start as many, or plan "
            f"again with --num-gpus {world_size}."
        )
    return prepared


if __name__ == "__main__":
    leave(main())
