"""``zerofit train``: configuration, plan, launch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from ..config.arguments import Request, parse_arguments
from ..config.load import load_config
from ..errors import ConfigError, Interrupted
from .presets import preset_table

IMAGE_FOLDER = Path("data/train")


def run_train(arguments: Sequence[str]) -> None:
    """Plan, launch and train; show the plan before anything is started."""
    from ..launch.local import launch_run
    from ..training.start import prepare_run

    if "--check-memory" in arguments or "--check_memory" in arguments:
        from .check_memory import run_check_memory

        run_check_memory([part for part in arguments if part not in ("--check-memory", "--check_memory")])
        return
    request = parse_arguments(arguments)
    _refuse_what_train_lacks(request)
    resolved = load_config(request.source, request.preset, request.overrides)
    prepared = prepare_run(resolved, request)
    if prepared is not None:
        code = launch_run(prepared)
        if code in (0, Interrupted.exit_code):
            _draw_curves(prepared.folder)
        raise typer.Exit(code)


def _draw_curves(run: Path) -> None:
    """``training_history.json`` and ``curves.png``, of a stopped run too. What cannot be written ends nothing."""
    from ..reporting.history import write_history

    try:
        written = write_history(run)
    except (OSError, KeyError, ValueError) as error:
        print(f"Warning: the curves of {run} could not be drawn ({error}).", file=sys.stderr)
        return
    if written:
        print(f"Curves: {', '.join(path.name for path in written)} in the run folder.")


def _refuse_what_train_lacks(request: Request) -> None:
    if request.as_json or request.run:
        raise ConfigError(
            "`zerofit train` was given --json or --run, and has neither: its events are JSON in the run folder's "
            "events.jsonl, and --run is what it hands to its workers. Use `zerofit plan --json` for a plan as JSON, "
            "--resume to continue a run."
        )
    if request.source is None and request.preset is None and not request.overrides:
        raise ConfigError(
            f"`zerofit train` was given neither a configuration file nor a preset, and there is no default job. Name "
            f"one, as in `zerofit train --preset shakespeare_char`.{_about_images()} The presets are:\n{preset_table()}"
        )


def _about_images() -> str:
    """What to say to someone who comes with the folders of an image classifier."""
    if not IMAGE_FOLDER.is_dir():
        return ""
    classes = sum(entry.is_dir() for entry in IMAGE_FOLDER.iterdir())
    if not classes:
        return ""
    return (
        f" {IMAGE_FOLDER} holds {classes} folders, as for an image classifier: `zerofit train --preset animals90 "
        f"--model.num_classes {classes}` trains one on data/train and data/val."
    )
