"""What the verbs that read a finished run, or another program's weights, share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from ..checkpoint.foreign import Foreign
    from ..checkpoint.source import Averaged
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


def open_weights(path: Path, which: str, weights: str) -> Saved | Averaged | Foreign:
    """The weights of a run, of a step folder, or of another program's checkpoint; imports torch.

    Args:
        path: where they are.
        which: of a run: ``latest``, ``best``, ``final``, a tag or a step.
        weights: ``trained``, or ``ema`` for the average that a run keeps.

    Raises:
        CheckpointError: there are none, or they are damaged.
        ConfigError: an average was asked for that another program's checkpoint does not have.
    """
    from ..checkpoint.manifest import MANIFEST, step_folders
    from ..checkpoint.source import own_checkpoint, weights_of

    run = path.parent if path.name == "checkpoints" else path
    if (path / MANIFEST).is_file() or (which == "best" and not step_folders(run / "checkpoints")):
        which = "latest"  # there is one only
    own = own_checkpoint(path, which)
    if own is not None:
        return weights_of(own, weights)
    if not path.exists() or (path.is_dir() and _is_a_run(path)):
        raise CheckpointError(
            f"{path} holds no checkpoints. Give a folder under runs/ that has some, or another program's checkpoint."
        )
    from ..checkpoint.foreign import open_foreign

    found = open_foreign(path)
    if weights == "ema":
        raise ConfigError(f"--weights ema: {path} is another program's checkpoint, of which only weights are read.")
    return found


def _is_a_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("config.yaml", "plan.json", "events.jsonl"))


def data_folder(saved: Saved | Averaged | Foreign, given: Path | None) -> Path:
    """The data that the run trained on, unless another folder was given.

    Raises:
        ConfigError: another program's checkpoint does not tell it, and none was given.
    """
    if given is None and "data_path" not in saved.state:
        raise _no_data(saved)
    return given or Path(str(saved.state["data_path"]))


def _no_data(saved: Saved | Averaged | Foreign) -> ConfigError:
    return ConfigError(
        f"{saved.folder} was written by another program and does not tell its data. Name a folder of prepared data "
        f"with --data (`zerofit data prepare TEXT --tokenizer NAME`): its tokenizer has to be the one that the model "
        f"was trained with."
    )


def trained_data(saved: Saved | Averaged | Foreign) -> list[DataConfig]:
    """All data that the run trained on: its own first, then what its stages had instead.

    Raises:
        ConfigError: another program's checkpoint does not tell it.
    """
    from ..config.schema import DataConfig

    if "config" not in saved.state:
        raise _no_data(saved)
    config = saved.state["config"]
    found = [config["data"], *(stage["data"] for stage in config.get("stages", ()) if stage["data"] is not None)]
    return [DataConfig.model_validate(data) for data in found]
