"""Checkpoints out of zerofit: one file or folder in a format that other programs read.

An export is written under a temporary name beside its destination, made durable, read back in full and compared with
its source, and only then given its name. Memory: one interval of one tensor, or one matrix where a format wants it
transposed.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config.models import ModelConfig
from ..errors import CheckpointError, RequestError
from ..planning.sizes import format_bytes
from .export_formats import FORMATS, Format, Job
from .foreign import open_foreign
from .foreign.contents import MOMENTS, PARAMETER
from .foreign.sources import intervals
from .outgoing import DTYPES, Outgoing, Readable

#: What ``--to`` takes.
#: Room for headers and small files.
SPARE_BYTES = 16 << 20


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    to: str
    dtype: str
    files: tuple[str, ...]
    """Names inside `path`, or the file's own."""
    size_bytes: int
    parameters: int
    step: int | None
    notes: tuple[str, ...]

    def describe(self) -> str:
        """One line for people."""
        step = "" if self.step is None else f" of step {self.step}"
        files = f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        return (
            f"{self.path}: {self.to}, {self.dtype}, {self.parameters:,} parameters{step}, {files}, "
            f"{format_bytes(self.size_bytes)}, read back and compared"
        )


def export(
    source: Readable,
    model: ModelConfig,
    out: Path,
    *,
    to: str,
    dtype: str = "fp32",
    shard_bytes: int = 5 * 10**9,
    force: bool = False,
) -> Exported:
    """Write `source` to `out`.

    Args:
        source: a checkpoint of a run (`store.Saved`) or of another program (`foreign.Foreign`).
        model: its shape.
        out: ``pt``: the file. ``safetensors``: a folder, or a file when its name ends so. Else a folder.
        to: a key of `FORMATS`.
        dtype: ``fp32``, ``bf16`` or ``fp16``: of the weights. DeepSpeed's masters and moments stay fp32.
        shard_bytes: largest file of the formats that may be cut.
        force: replace an earlier export at `out`. Anything else that lies there is never replaced.

    Raises:
        RequestError: `out` is taken, or the disk has no room.
        CheckpointError: the source is of another model, or a value does not fit the type.
    """
    kind = "safetensors file" if to == "safetensors" and out.suffix == ".safetensors" else to
    chosen, job = FORMATS[kind], Job(source, model, DTYPES[dtype], shard_bytes)
    _check_source(source, model)
    _check_destination(source, out, chosen, force)
    _check_room(out, _expected_bytes(job, to))
    work = out.with_name(f".{out.name}.partial")
    _remove(work)
    try:
        if not chosen.is_file:
            work.mkdir(parents=True)
        else:
            work.parent.mkdir(parents=True, exist_ok=True)
        notes = chosen.write(job, work)
        _verify(job, work, to)
        files = [work] if chosen.is_file else sorted(path for path in work.rglob("*") if path.is_file())
        names = tuple(out.name if chosen.is_file else str(path.relative_to(work)) for path in files)
        size = sum(path.stat().st_size for path in files)
        _publish(work, out)
    except BaseException:
        _remove(work)
        raise
    return Exported(out, to, dtype, names, size, model.parameter_count(), source.step, tuple(notes))


def _check_source(source: Readable, model: ModelConfig) -> None:
    there, wanted = source.shapes(), model.parameter_shapes()
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise CheckpointError(
                f"Checkpoint {source.folder} is of another model: {name} has the shape {there.get(name, 'absent')} "
                f"there and {wanted.get(name, 'absent')} in the configuration. Name the model that it was written from."
            )


def _check_destination(source: Readable, out: Path, chosen: Format, force: bool) -> None:
    if source.folder.resolve().is_relative_to(out.resolve()):
        raise RequestError(f"{out} holds the checkpoint {source.folder} itself. Export to another place.")
    if chosen.is_file and out.is_dir():
        raise RequestError(f"{out} is a folder, and this format writes one file. Name the file, as {out / 'model.pt'}.")
    if not chosen.is_file and out.is_file():
        raise RequestError(f"{out} is a file, and this format writes a folder. Name a folder that is not there yet.")
    taken = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if taken and not force:
        raise RequestError(f"{out} exists already. Choose another place, or replace it with --force.")
    if out.is_dir():
        known = {path for pattern in chosen.leaves for path in out.glob(pattern)}
        strange = sorted(path.name for path in out.iterdir() if path not in known)
        if strange:
            raise RequestError(
                f"{out} holds {strange[0]}, which no export of this format writes; --force replaces an earlier export "
                f"and nothing else. Choose another place, or remove the folder yourself."
            )


def _expected_bytes(job: Job, to: str) -> int:
    weights = job.model.parameter_count() * job.dtype.itemsize
    states = job.model.parameter_count() * 4 * (3 if job.has_moments else 1)
    return weights + (states if to == "deepspeed" else 0)


def _check_room(out: Path, needed_bytes: int) -> None:
    """The export lies beside its destination until it is whole, so an earlier one is not counted as free."""
    parent = next(path for path in out.resolve().parents if path.is_dir())
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes + SPARE_BYTES:
        raise RequestError(
            f"The export to {out} takes {needed_bytes / 2**30:.2f} GiB, and {parent} has {free_bytes / 2**30:.2f} GiB "
            f"free. Free some disk, choose another place, or use --dtype bf16."
        )


# ------------------------------------------------------------------------------------------------ verifying


def _verify(job: Job, work: Path, to: str) -> None:
    """Read everything back as any reader of foreign checkpoints would, and compare it with the source.

    Raises:
        CheckpointError: something differs; the export was not given its name.
    """
    found = open_foreign(work, job.model)  # names, shapes and ties
    for name in job.model.parameter_shapes():
        _compare(job, found, name, PARAMETER, torch.float32 if to == "deepspeed" else job.dtype, to)
        if to == "deepspeed" and job.has_moments:
            for role in MOMENTS:
                _compare(job, found, name, role, torch.float32, to)


def _compare(job: Job, found: Readable, name: str, role: str, dtype: torch.dtype, to: str) -> None:
    expected = Outgoing(name, job.held(name, role), dtype)
    elements = expected.elements
    if to == "huggingface":  # padded rows were left out
        elements = min(elements, math.prod(job.architecture.huggingface_shapes(job.model)[name]))
    for start, stop in intervals(elements):
        wanted = expected.cast(expected.source.read(start, stop)).to(torch.float32)
        values = found.read(name, role, start, stop)
        # As bits: NaN equals itself, and -0 is not 0.
        if values is None or not torch.equal(values.view(torch.int32), wanted.view(torch.int32)):
            raise CheckpointError(
                f"What was written for {name} ({role}) reads back with other values. The disk or the file system may "
                f"be failing; nothing was left behind. Export again, to another disk if it happens again."
            )


# ------------------------------------------------------------------------------------------------ publishing


def _publish(work: Path, out: Path) -> None:
    """Give the export its name; an earlier one stands until then."""
    if out.is_dir():
        aside = out.with_name(f".{out.name}.replaced")
        _remove(aside)
        out.rename(aside)
        work.rename(out)
        _remove(aside)
    else:
        work.replace(out)
    if os.name != "nt":  # Windows opens no folders
        handle = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
