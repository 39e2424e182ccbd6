"""``zerofit checkpoint``: what a run has saved, and whether it is whole. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CheckpointError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="A run's checkpoints: look at and keep them.",
)
RunFolder = Annotated[Path, typer.Argument(help="A run folder, or one step folder of its checkpoints.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_checkpoints(run: RunFolder, as_json: AsJson = False) -> None:
    """List checkpoints: step, validation loss, size, strategy, names, and whether all files are there."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..planning.sizes import format_bytes

    rows = [_row(folder) for folder in _folders(run)]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for name in ("step", "val_loss", "size", "saved under"):
        table.add_column(name, no_wrap=True, justify="left" if name == "saved under" else "right")
    for name in ("names", "state"):
        table.add_column(name, overflow="fold")
    for row in rows:
        loss, size = row["val_loss"], row["size_bytes"]
        table.add_row(
            str(row["step"]),
            "" if loss is None else f"{loss:.4f}",
            "" if size is None else format_bytes(size),
            "" if row["strategy"] is None else f"{row['strategy']} x {row['world_size']}",
            " ".join(row["names"]),
            row["damage"] or "whole",
            style=None if row["damage"] is None else "red",
        )
    console = Console()
    console.print(table)
    console.print("State: sizes were compared, hashes not; `zerofit checkpoint verify` reads every byte.")


@app.command()
def verify(run: RunFolder, as_json: AsJson = False) -> None:
    """Read every byte and compare it with its hash. Exit code 2 when something is damaged."""
    from ..checkpoint.retention import damage_of

    found = {folder.name: damage_of(folder) for folder in _folders(run)}
    if as_json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name}: {damage or 'whole'}" for name, damage in found.items()))
    damaged = [name for name, damage in found.items() if damage is not None]
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {len(found)} checkpoints are damaged: {', '.join(damaged)}.")


@app.command()
def prune(
    run: RunFolder,
    keep: Annotated[int, typer.Option(min=1, help="Newest checkpoints to keep.")] = 2,
    every: Annotated[int | None, typer.Option(min=1, help="Keep every multiple of this step, too.")] = None,
    best: Annotated[int | None, typer.Option(min=1, help="Keep this many with the lowest loss, too.")] = None,
    damaged: Annotated[bool, typer.Option(help="Remove damaged ones, too.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove checkpoints. What latest, best, final or a tag names stays, and so does the only whole one."""
    from ..checkpoint import retention
    from ..training.lock import acquire_run

    run = _run_of(run)
    lock = acquire_run(run)
    try:
        root, kept = run / "checkpoints", retention.Retention(keep, every, best)
        gone = retention.prune(root, kept, dry_run=dry_run)
        gone += retention.prune_damaged(root, dry_run=dry_run) if damaged else []
    finally:
        lock.give_up(run)
    if as_json:
        print(json.dumps({"removed": gone, "dry_run": dry_run}))
    else:
        print(f"{'Would remove' if dry_run else 'Removed'}: {', '.join(gone) or 'nothing'}.")


@app.command()
def tag(
    run: RunFolder,
    name: Annotated[str, typer.Argument(help="A word of your own; --resume NAME finds it.")],
    step: Annotated[int | None, typer.Option(help="Which checkpoint; default: the latest.")] = None,
    remove: Annotated[bool, typer.Option(help="Take the name away again; the checkpoint stays.")] = False,
) -> None:
    """Give a checkpoint a name, which keeps it from being removed."""
    from ..checkpoint import retention
    from ..checkpoint.manifest import read_manifest

    run = _run_of(run)
    root = run / "checkpoints"
    if remove and step is not None:
        raise CheckpointError("--remove takes a name away from whatever it names; leave out --step.")
    if remove:
        retention.untag(root, name)
        print(f"{name} names no checkpoint any more.")
        return
    chosen = step if step is not None else read_manifest(retention.locate(run, "latest")).step
    retention.tag(root, name, chosen)
    print(f"{name} names step {chosen} of {run}.")


def _folders(run: Path) -> list[Path]:
    """The step folders that the argument means.

    Raises:
        CheckpointError: there are none.
    """
    from ..checkpoint.manifest import step_folders

    if run.name.startswith("step-") and run.is_dir():
        return [run]
    folders = step_folders(_run_of(run) / "checkpoints")
    if not folders:
        raise CheckpointError(f"{run} holds no checkpoints yet.")
    return folders


def _run_of(path: Path) -> Path:
    """The run folder: the path itself, or what holds the ``checkpoints`` folder or step folder that it names."""
    place = path.absolute()
    if place.name.startswith("step-"):
        place = place.parent
    if place.name == "checkpoints":
        place = place.parent
    if path.exists() and (place / "checkpoints").is_dir():
        return place
    raise CheckpointError(f"{path} is no run folder: there is no folder `checkpoints` in it. Give runs/NAME.")


def _row(folder: Path) -> dict[str, Any]:
    from ..checkpoint.manifest import read_manifest, sizes_differ
    from ..checkpoint.retention import pointers

    names = [name for name, target in pointers(folder.parent).items() if target == folder.name]
    row: dict[str, Any] = {"folder": folder.name, "step": int(folder.name.removeprefix("step-")), "names": names}
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        absent = dict.fromkeys(("val_loss", "size_bytes", "strategy", "world_size", "precision", "saved_at"))
        return {**row, **absent, "damage": str(error)}
    state = manifest.state
    return {
        **row,
        "val_loss": state["metrics"].get("val_loss") if state["metrics_step"] == manifest.step else None,
        "size_bytes": manifest.size_bytes,
        **{key: state[key] for key in ("strategy", "world_size", "precision", "saved_at")},
        "damage": sizes_differ(folder, manifest),
    }
