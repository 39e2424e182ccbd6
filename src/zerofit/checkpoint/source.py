"""Everything that weights can be read from, behind one face."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..config.models import ModelConfig
from ..errors import CheckpointError
from ..types import Scalars
from .foreign import open_foreign
from .manifest import MANIFEST, step_folders
from .retention import find_whole
from .store import Saved, open_checkpoint


class Source(Protocol):
    """A checkpoint of zerofit's or of another tool; its `read` is a `types.Reader`."""

    folder: Path
    scalars: Scalars
    state: Mapping[str, Any]

    @property
    def step(self) -> int | None:
        """Optimizer steps that made it; None when it does not tell."""

    @property
    def notes(self) -> Sequence[str]:
        """What was carried over and what was absent, in sentences."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical parameter name -> shape."""

    def read(self, name: str, role: str, start: int, stop: int) -> Tensor | None:
        """Elements ``[start, stop)`` of a flattened tensor, fp32; None when the source does not hold it."""


def open_source(path: Path, model: ModelConfig | None, *, verified: bool = False) -> Source:
    """Open a run folder, a step folder or another tool's checkpoint.

    Args:
        verified: a step folder's bytes have been checked already.
        path: a run, its ``checkpoints`` folder, a step folder; or what `foreign.open_foreign` reads.
        model: the shape that is wanted; what another tool wrote is matched with it.

    Raises:
        CheckpointError: nothing readable, damaged, or of another model.
    """
    if verified and (path / MANIFEST).is_file():
        return open_checkpoint(path)
    own = own_checkpoint(path)
    if own is not None:
        return own
    if not path.exists():
        raise CheckpointError(f"There is nothing at {path}. Give a run folder, a checkpoint, or another tool's files.")
    source: Source = open_foreign(path, model)
    return source


def own_checkpoint(path: Path, which: str = "latest") -> Saved | None:
    """A checkpoint that zerofit wrote, whole; None when `path` is something else."""
    if (path / MANIFEST).is_file():
        _refuse_choice(path, which)
        return open_checkpoint(find_whole(path, str(path)).folder)
    run = path.parent if path.name == "checkpoints" else path
    if not step_folders(run / "checkpoints"):
        if path.exists():
            _refuse_choice(path, which)
        return None
    found = find_whole(run, which)
    for skipped in found.skipped:
        print(f"Warning: passed over a damaged checkpoint, {skipped}.", file=sys.stderr)
    return open_checkpoint(found.folder)


class Averaged:
    """A checkpoint whose parameters read as their average (role ``ema``) and which has no optimizer states.

    Raises:
        CheckpointError: it keeps no average.
    """

    def __init__(self, saved: Saved) -> None:
        self.saved, self.folder, self.step = saved, saved.folder, saved.step
        self.scalars: Scalars = {}
        self.state = saved.state
        if any(("ema", name) not in saved.manifest.tensors for name in saved.shapes()):
            raise CheckpointError(
                f"Checkpoint {saved.folder} keeps no average of its weights, and --weights ema asks for one. A run "
                f"keeps one when ema_decay is set (--ema-decay 0.999)."
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """What is carried over."""
        return (f"The average of the weights at step {self.step} of {self.folder}.",)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape."""
        return self.saved.shapes()

    def read(self, name: str, role: str, start: int, stop: int) -> Tensor | None:
        """A `types.Reader`. Counters have no average, nor have statistics that an older version saved."""
        if role == "buffer":
            average = self.saved.read(name, "ema", start, stop)
            return self.saved.read(name, role, start, stop) if average is None else average
        return self.saved.read(name, "ema", start, stop) if role == "parameter" else None


def weights_of(saved: Saved, weights: str) -> Saved | Averaged:
    """The checkpoint with the weights that were asked for: ``trained`` or ``ema``."""
    return Averaged(saved) if weights == "ema" else saved


def _refuse_choice(path: Path, which: str) -> None:
    if which != "latest":
        raise CheckpointError(
            f"The checkpoint {which!r} was looked for, and {path} is no run with several to choose from: it holds no "
            f"folder `checkpoints`. Give runs/NAME; of a step folder or another tool's leave --checkpoint out."
        )
