"""zerofit from Python: `load_model`, `plan` and `train`. Small on purpose; the command line does the rest.

::

    import zerofit

    model = zerofit.load_model("runs/shakespeare_char")           # a plain torch.nn.Module in evaluation mode
    choice = zerofit.plan(preset="gpt2_xl", num_gpus=4)           # what would run, and what it would need
    run = zerofit.train(preset="shakespeare_char", max_steps=50)  # the run folder
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import TrainingFailed, ZerofitError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .planning.choose import Choice


def load_model(path: str | Path, *, checkpoint: str = "latest", device: torch.device | str = "cpu") -> nn.Module:
    """The trained model as a plain fp32 module in evaluation mode.

    Args:
        path: a run folder, a step folder, or what another tool wrote (see ``zerofit export --help``).
        checkpoint: of a run folder: ``latest``, ``best``, ``final``, a tag or a step.
        device: where the parameters go.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    from .checkpoint.model import load_model as load
    from .checkpoint.source import open_source, own_checkpoint

    source = own_checkpoint(Path(path), checkpoint) or open_source(Path(path), None)
    return load(source, device)[0]


def plan(config: str | Path | None = None, *, preset: str | None = None, **settings: Any) -> Choice:
    """What ``zerofit plan`` would show: the plan, every candidate and the reason. Starts nothing.

    Args:
        config: a YAML or JSON file.
        preset: the preset to start from.
        settings: configuration keys, nested with double underscores or dicts: ``optimizer={"learning_rate": 1e-4}``.

    Raises:
        RequestError: the configuration is wrong.
        DoesNotFit: nothing fits.
    """
    from .planning.choose import choose
    from .planning.hardware import probe
    from .training.initial_model import with_initial_model
    from .training.start import with_model_of_data

    return choose(
        with_model_of_data(with_initial_model(_resolve(config, preset, settings), fetch=False)).config, probe()
    )


def train(
    config: str | Path | None = None, *, preset: str | None = None, resume: str | int | None = None, **settings: Any
) -> Path:
    """Train as ``zerofit train`` does, in processes of its own, to the end; returns the run folder.

    Args:
        config: a YAML or JSON file.
        preset: the preset to start from.
        resume: continue the run from ``latest``, ``best``, a tag, a step or a path.
        settings: configuration keys, as for `plan`.

    Raises:
        RequestError: the configuration is wrong; nothing was started.
        DoesNotFit: nothing fits.
        Interrupted: stopped on request after saving.
        TrainingFailed: a rank failed; its last words were printed.
    """
    from .config.arguments import Request
    from .launch.local import launch_run
    from .training.start import prepare_run

    source = Path(config) if config is not None else None
    prepared = prepare_run(
        _resolve(config, preset, settings), Request(source, preset, resume=None if resume is None else str(resume))
    )
    assert prepared is not None  # only a dry run prepares nothing
    try:
        code = launch_run(prepared)
    finally:
        if prepared.lock:
            prepared.lock.give_up(prepared.folder)
    if code:
        raise _error_of(code, prepared.folder)
    return prepared.folder


def _error_of(code: int, folder: Path) -> ZerofitError:
    """The exception that an exit code stands for."""
    from . import errors

    kinds: dict[int, type[ZerofitError]] = {
        2: errors.RequestError,
        3: errors.DoesNotFit,
        4: errors.Interrupted,
    }
    return kinds.get(code, TrainingFailed)(f"Training in {folder} ended with exit code {code}; see {folder}/logs.")


def _resolve(config: str | Path | None, preset: str | None, settings: Mapping[str, Any]) -> Any:
    from .config.documents import write_value
    from .config.load import load_config

    overrides = [(name, value if isinstance(value, str) else write_value(value)) for name, value in _flat(settings)]
    return load_config(Path(config) if config is not None else None, preset, overrides)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    from .config.keys import keys

    found: list[tuple[str, Any]] = []
    for name, value in settings.items():
        full = prefix + name.replace("__", ".")
        plain = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        if isinstance(plain, Mapping) and full not in keys():
            found += _flat(plain, f"{full}.")
        else:
            found.append((full, dict(plain) if isinstance(plain, Mapping) else plain))
    return found
