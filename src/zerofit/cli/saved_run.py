"""What the verbs that read a finished run share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    from ..checkpoint.store import Saved
    from ..config.schema import DataConfig


def open_run(run: Path, which: str) -> Saved:
    """The checkpoint of a run folder, or of a step folder given directly; imports torch.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    from ..checkpoint.manifest import MANIFEST
    from ..checkpoint.source import own_checkpoint

    if not run.is_dir():
        raise CheckpointError(f"No run folder {run}. Give a folder under runs/, or a step folder of its checkpoints.")
    found = own_checkpoint(run, "latest" if (run / MANIFEST).is_file() else which)
    if found is None:
        raise CheckpointError(f"{run} holds no checkpoints. Give a folder under runs/ that has some.")
    return found


def data_folder(saved: Saved, given: Path | None) -> Path:
    """The data that the run trained on, unless another folder was given."""
    return given or Path(str(saved.state["data_path"]))


def trained_data(saved: Saved) -> list[DataConfig]:
    """All data that the run trained on: its own first, then what its stages had instead."""
    from ..config.schema import DataConfig

    config = saved.state["config"]
    found = [config["data"], *(stage["data"] for stage in config.get("stages", ()) if stage["data"] is not None)]
    return [DataConfig.model_validate(data) for data in found]
