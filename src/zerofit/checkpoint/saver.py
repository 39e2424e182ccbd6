"""Saving while training goes on: a copy in host memory, then a thread that writes, then one rename.

What a rank does for one checkpoint::

    training thread   begin ─ start copying ─ train on ─────────── the next update waits for the copy
    writer thread                └ complete the copy ─ blocks to files, hashes, fsync ─ rank-N.json
    of rank 0 only                 └ wait for every rank-N.json ─ manifest ─ rename ─ pointers ─ retention

The ranks' writers meet in the file system, never in a collective: those belong to the training thread.
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ..types import Fragment, Scalars, World
from .blocks import Block, BlockPool, BlockWriter, Cancelled
from .manifest import PROBE, Manifest, StoredFile, make_durable, merged, step_name, write_manifest
from .pieces import Piece, hashed, workers
from .retention import Retention, publish

#: How often rank 0 looks for the other ranks' parts.
POLL_SECONDS = 0.02
#: Space that a save leaves free.
SPARE_BYTES = 16 * 1024**2

#: Takes what an engine has to call before it next changes what its fragments show.
HoldUpdates = Callable[[Callable[[], None]], None]


@dataclass(frozen=True)
class Request:
    """What to save beside the fragments.

    Attributes:
        step: optimizer steps attempted.
        scalars: the engine's.
        state: what the loop remembers; JSON-ready.
        probe: inputs of one sample, whose loss stands in `state`.
        pointers: ``latest`` and others that shall name this checkpoint.
    """

    step: int
    scalars: Scalars
    state: Mapping[str, Any]
    probe: Mapping[str, Tensor]
    pointers: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a save.

    Attributes:
        step: of the checkpoint.
        folder: its name; None when it failed.
        seconds: from `Saver.begin` until it was durable under its name.
        size_bytes: of all files.
        failure: why there is none.
        removed: names of the checkpoints that retention removed.
    """

    step: int
    folder: str | None
    seconds: float
    size_bytes: int = 0
    failure: str | None = None
    removed: tuple[str, ...] = ()


class Saver:
    """One rank's part in saving a run's checkpoints. At most one save is under way.

    Args:
        root: the run's ``checkpoints`` folder, on storage that all ranks share.
        world: this rank.
        retention: what is kept.
        checkpoint_bytes: what one checkpoint takes, over all ranks.
        asynchronous: copy first and write while training goes on (takes the rank's share in host memory once more);
            else write block by block while training waits.
        patience_seconds: how long rank 0 waits for the other ranks' parts after its own.
    """

    def __init__(
        self,
        root: Path,
        world: World,
        retention: Retention,
        checkpoint_bytes: int,
        *,
        asynchronous: bool,
        patience_seconds: float,
    ) -> None:
        self.root, self.world, self.retention = root, world, retention
        self.checkpoint_bytes = checkpoint_bytes
        self.asynchronous, self.patience_seconds = asynchronous, patience_seconds
        cuda = world.device.type == "cuda"
        self.stream = torch.cuda.Stream() if cuda else None
        self.threads = ThreadPoolExecutor(workers(), "zerofit-save")
        #: On rank 0, what became of saves and nobody has asked for yet.
        self.outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._memory = BlockPool(pinned=cuda)
        self._under_way: _Save | None = None
        self._attempts = 0

    def begin(self, request: Request, fragments: Iterable[Fragment], hold_updates: HoldUpdates) -> bool:
        """Save. Collective. Waits for the save before this one.

        With `asynchronous` it returns when the copying has begun, else when this rank's part is written; `finish`
        tells what came of it.

        Returns:
            False when the disk has no room on some rank; then nothing was touched.
        """
        self.finish()
        if not agree(self.has_room(), self.world):
            return False
        self._attempts += 1
        save = self._under_way = _Save(self, request, self._attempts)
        with self._on_stream():
            if self.asynchronous:
                save.start(list(self._memory.fill(fragments, self.stream, reuse=False)))
            else:
                save.write(self._memory.fill(fragments, self.stream, reuse=True))
                save.start([])
        if self.asynchronous:
            hold_updates(save.wait_until_copied)
        return True

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Inside, what is asked of the GPU runs on the stream of the copies, after what training asked for before."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def finish(self) -> bool:
        """Wait until the save under way, if any, is durable, or has failed on any rank. Collective.

        Returns:
            False when it failed; rank 0 has cleaned up then, and tells why in `told`.
        """
        save, self._under_way = self._under_way, None
        if save is None:
            return True
        save.own_part.wait()
        if not agree(save.failure is None, self.world):
            save.cancelled.set()
        save.join()
        if self.world.is_main and save.failure is not None:
            shutil.rmtree(save.work, ignore_errors=True)  # now that nobody writes there any more
        return agree(save.failure is None, self.world)

    def told(self) -> list[Outcome]:
        """What became of saves since the last call; on rank 0 only. Never waits."""
        found = []
        with suppress(queue.Empty):
            while True:
                found.append(self.outcomes.get_nowait())
        return found

    def has_room(self) -> bool:
        """Whether the disk would take another checkpoint now."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            return shutil.disk_usage(self.root).free >= self.checkpoint_bytes + SPARE_BYTES
        except OSError:
            return False

    def close(self) -> None:
        """End the threads. A save that is still under way is given up; older checkpoints are whole."""
        if self._under_way is not None:
            self._under_way.cancelled.set()
            self._under_way.join()
        self.threads.shutdown(wait=True)


class _Save:
    """One rank's part in one checkpoint."""

    def __init__(self, saver: Saver, request: Request, attempt: int) -> None:
        self.saver, self.request = saver, request
        self.work = saver.root / f".{step_name(request.step)}.{attempt}.partial"
        self.began = time.monotonic()
        self.failure: str | None = None
        self.own_part, self.cancelled = threading.Event(), threading.Event()
        self._copied_on_host = threading.Event()
        self._copied: torch.cuda.Event | None = None
        self._writer = BlockWriter(self.work, saver.world.rank, saver.threads, self.cancelled)
        self._thread: threading.Thread | None = None

    def start(self, blocks: list[Block]) -> None:
        """Do the rest in a thread: complete and write `blocks`; on rank 0, publish."""
        if self.saver.stream is not None:
            self._copied = self.saver.stream.record_event()
        self._thread = threading.Thread(target=self._run, args=(blocks,), name="zerofit-save", daemon=True)
        self._thread.start()

    def wait_until_copied(self) -> None:
        """Keep later changes out of the checkpoint: the GPU waits, or, on the CPU, the caller."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
        else:
            self._copied_on_host.wait()

    def join(self) -> None:
        """Wait for the thread."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, blocks: list[Block]) -> None:
        try:
            for block in blocks:
                block.complete()
        except Exception as error:
            self.failure = _in_words(error)
        finally:
            self._copied_on_host.set()
        self.write(blocks)
        self._finish_own_part()
        if self.saver.world.is_main:
            self.saver.outcomes.put(self._publish())

    def write(self, blocks: Iterable[Block]) -> None:
        """Write this rank's files; a failure is kept in `failure`."""
        try:
            if self.failure is None:
                self.work.mkdir(parents=True, exist_ok=True)
                for block in blocks:
                    block.complete()
                    self._writer.write(block)
        except Exception as error:
            self.failure = _in_words(error)

    def _finish_own_part(self) -> None:
        """Leave ``rank-N.json`` or ``rank-N.failed`` for rank 0."""
        try:
            self._leave_word()
        finally:
            self.own_part.set()

    def _leave_word(self) -> None:
        rank, writer = self.saver.world.rank, self._writer
        files = {name: [file.size_bytes, [vars(piece) for piece in file.pieces]] for name, file in writer.files.items()}
        try:
            if self.failure is None:
                _write_small(self.work / f"rank-{rank:05d}.json", json.dumps({"files": files, "parts": writer.parts}))
        except OSError as error:
            self.failure = _in_words(error)
        if self.failure is not None:
            with suppress(OSError):
                for path in self.work.glob(f"rank-{rank:05d}-*"):
                    path.unlink(missing_ok=True)  # makes room for the word that there is none
            with suppress(OSError):
                _write_small(self.work / f"rank-{rank:05d}.failed", self.failure)

    def _publish(self) -> Outcome:
        """Rank 0: wait for all parts, write the manifest, give the folder its name, move pointers, prune."""
        request, saver = self.request, self.saver
        try:
            manifest = self._manifest([json.loads(path.read_text(encoding="utf-8")) for path in self._parts()])
            write_manifest(self.work, manifest)
            for path in self.work.glob("rank-*.json"):
                path.unlink()
            make_durable(self.work)
            removed = publish(saver.root, self.work, request.step, request.pointers, saver.retention)
        except Exception as error:
            failure = self.failure = self.failure or _in_words(error)
            shutil.rmtree(self.work, ignore_errors=True)
            return Outcome(request.step, None, time.monotonic() - self.began, failure=failure)
        seconds = time.monotonic() - self.began
        return Outcome(request.step, step_name(request.step), seconds, manifest.size_bytes, removed=tuple(removed))

    def _parts(self) -> list[Path]:
        """Every rank's list of what it wrote, once all are there.

        Raises:
            OSError: a rank failed, or its part did not appear in time.
        """
        wanted = [self.work / f"rank-{rank:05d}.json" for rank in range(self.saver.world.world_size)]
        deadline = time.monotonic() + self.saver.patience_seconds
        while missing := [path for path in wanted if not path.exists()]:
            for failed in self.work.glob("rank-*.failed"):  # first: it tells why the others were told to stop
                raise OSError(f"{failed.stem}: {failed.read_text(encoding='utf-8')}")
            if self.failure is not None or self.cancelled.is_set():
                raise OSError(self.failure or "another rank could not write its part")
            if time.monotonic() > deadline:
                raise OSError(
                    f"{missing[0].stem} had not appeared in {self.work} after {self.saver.patience_seconds:.0f} s; "
                    f"all nodes must see the same run folder (shared storage)"
                )
            time.sleep(POLL_SECONDS)
        return wanted

    def _manifest(self, parts: list[dict[str, Any]]) -> Manifest:
        request = self.request
        files = {
            name: StoredFile(size, tuple(Piece(**piece) for piece in pieces))
            for part in parts
            for name, (size, pieces) in part["files"].items()
        }
        if request.probe:
            path = self.work / PROBE
            save_file({name: tensor.clone() for name, tensor in request.probe.items()}, path)
            make_durable(path)
            files[PROBE] = StoredFile(path.stat().st_size, hashed(path))
        tensors = merged(file for part in parts for file in part["parts"])
        return Manifest(request.step, request.scalars, request.state, files, tensors)


def _write_small(path: Path, text: str) -> None:
    """Appears whole, or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _in_words(error: Exception) -> str:
    if isinstance(error, Cancelled):
        return "another rank could not write its part"
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def agree(fine: bool, world: World) -> bool:
    """True when `fine` is true on every rank. Collective; waits for the device."""
    if world.world_size == 1:
        return fine
    flag = torch.tensor(int(fine), device=world.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())
