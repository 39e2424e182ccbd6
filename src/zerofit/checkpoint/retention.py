"""Which checkpoints a run has, which are whole, which are kept, and which names point to them."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from ..errors import CheckpointError
from .manifest import (
    MANIFEST,
    CannotTell,
    Manifest,
    make_durable,
    read_manifest,
    sizes_differ,
    step_folders,
    step_name,
    verify,
    write_atomically,
)

#: Names that training gives; others are tags.
POINTERS = ("latest", "best", "final")
_TAG = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}\Z")


@dataclass(frozen=True)
class Retention:
    """What is kept beside the checkpoints that a pointer or a tag names.

    Attributes:
        newest: this many of the newest.
        every_steps: all whose step is a multiple of it; None: none for that reason.
        best: this many with the best evaluation (the lowest validation loss, or what the task calls best); None: none
            for that reason.
    """

    newest: int
    every_steps: int | None = None
    best: int | None = None


def pointers(root: Path) -> dict[str, str]:
    """Name -> step folder's name, of all pointers and tags. They may point to what is not there."""
    found = {}
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path.is_file() and not path.name.startswith(".") and path.stat().st_size < 256:
            found[path.name] = path.read_text(encoding="utf-8", errors="replace").strip()
    return found


def tag(root: Path, name: str, step: int) -> None:
    """Give a checkpoint a name of the user's own, which keeps it from being removed.

    Raises:
        CheckpointError: the name is taken by training, is no plain word, or there is no such step.
    """
    taken = name.lower() in POINTERS or name.lower().startswith("step-")  # disks may not tell case
    if taken or not _TAG.match(name) or name.lower().endswith((".yaml", ".yml", ".json")):
        raise CheckpointError(
            f"The tag {name!r} cannot be used: a tag is a word of letters, digits, '.', '_' and '-' that starts with a "
            f"letter and does not end like a configuration file, and latest, best, final and step-… are taken. Choose "
            f"another one."
        )
    folder = root / step_name(step)
    if not (folder / MANIFEST).is_file():
        there = ", ".join(path.name for path in step_folders(root)) or "none"
        raise CheckpointError(f"There is no checkpoint {folder.name} under {root}; there are: {there}.")
    write_atomically(root / name, folder.name + "\n")


def untag(root: Path, name: str) -> None:
    """Take a tag away; the checkpoint stays until retention removes it.

    Raises:
        CheckpointError: there is no such tag, or training gave the name.
    """
    if name in POINTERS or name not in pointers(root):
        tags = ", ".join(sorted(pointers(root).keys() - set(POINTERS))) or "none"
        raise CheckpointError(f"{name!r} is no tag of {root.parent}; its tags are: {tags}.")
    (root / name).unlink()


def publish(root: Path, work: Path, step: int, names: tuple[str, ...], retention: Retention) -> list[str]:
    """Give a finished folder its name, let `names` point to it, and prune. Returns what was removed.

    A checkpoint of the same step (from a run that went another way) gives place only when the new one is there; a name
    that it had is not the new one's.
    """
    final = root / step_name(step)
    old = _aside(final) if final.exists() else None
    work.rename(final)
    make_durable(root)
    for name in names:
        write_atomically(root / name, final.name + "\n")
    try:
        if old is not None:
            for name in [name for name, target in pointers(root).items() if target == final.name and name not in names]:
                (root / name).unlink()
            shutil.rmtree(old, ignore_errors=True)
        return prune(root, retention)
    except OSError:
        return []  # what is too much can go next time; the new one is durable and named


def prune(root: Path, retention: Retention, *, dry_run: bool = False) -> list[str]:
    """Remove what `retention` does not keep; returns the names.

    The newest whole checkpoint always stays. Damaged folders count for nothing, and stay for their owner to see.
    """
    newest = pointers(root).get("latest", "step-9")
    # Beyond `latest` lies what a run that went another way left: neither new nor in the way.
    folders = [folder for folder in step_folders(root) if folder.name <= newest or not (root / newest).is_dir()]
    manifests = {folder: found for folder in folders if (found := _quick_look(folder)) is not None}
    kept = _kept(manifests, retention) | set(pointers(root).values())
    gone = [folder for folder in manifests if folder.name not in kept]
    if not dry_run:
        for folder in gone:
            shutil.rmtree(_aside(folder), ignore_errors=True)
    return [folder.name for folder in gone]


def prune_damaged(root: Path, *, dry_run: bool = False) -> list[str]:
    """Remove checkpoints with a broken manifest, or files that are missing or cut off; returns the names.

    What another version wrote, or what the disk does not give out at the moment, stays.
    """
    gone = [folder for folder in step_folders(root) if _is_surely_damaged(folder)]
    if not dry_run:
        for folder in gone:
            shutil.rmtree(_aside(folder), ignore_errors=True)
    return [folder.name for folder in gone]


def _is_surely_damaged(folder: Path) -> bool:
    try:
        return sizes_differ(folder, read_manifest(folder)) is not None
    except CannotTell:
        return False
    except CheckpointError:
        return True
    except OSError:
        return False


def _kept(manifests: dict[Path, Manifest], retention: Retention) -> set[str]:
    kept = {folder.name for folder in list(manifests)[-retention.newest :]}
    if retention.every_steps:
        kept |= {folder.name for folder, m in manifests.items() if m.step % retention.every_steps == 0}
    if retention.best:
        # Each evaluation counts for the checkpoint of its own step only.
        values = [
            (value, folder.name)
            for folder, m in manifests.items()
            if (value := _value(m)) is not None and m.state.get("metrics_step", m.step) == m.step
        ]
        kept |= {name for _, name in sorted(values)[: retention.best]}
    return kept


def _value(manifest: Manifest) -> float | None:
    """What its newest evaluation came to, lower being better; None when there was none."""
    state = manifest.state
    value = state.get("metrics", {}).get(state.get("best_metric", "val_loss"))
    if value is None or not math.isfinite(value):
        return None
    return -value if state.get("best_highest") else float(value)


def _quick_look(folder: Path) -> Manifest | None:
    """The manifest, when all files have their size."""
    try:
        manifest = read_manifest(folder)
        return manifest if sizes_differ(folder, manifest) is None else None
    except (CheckpointError, OSError):
        return None


def _aside(folder: Path) -> Path:
    """Rename a folder so that nobody takes it for a checkpoint any more."""
    hidden = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.removed")
    folder.rename(hidden)
    return hidden


def sweep(root: Path) -> list[str]:
    """Remove what interrupted saves and removals left. Only under the run's lock. Returns the names."""
    gone = []
    for path in root.glob(".*"):
        if (
            path.suffix == ".removed"
            and (folder := root / path.name.split(".")[1])
            and _was_being_replaced(path, folder)
        ):
            path.rename(folder)
        elif path.suffix in (".partial", ".removed"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            gone.append(path.name)
    return gone


def _was_being_replaced(aside: Path, folder: Path) -> bool:
    """The old checkpoint was moved aside and the new one did not come: a kill between two renames."""
    return not folder.exists() and folder.name in pointers(folder.parent).values() and _quick_look(aside) is not None


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole, and what was passed over on the way to it."""

    folder: Path
    skipped: tuple[str, ...] = ()


def find_whole(run: Path, which: str) -> Found:
    """The checkpoint that `which` names, every byte of it checked.

    Args:
        run: the run folder.
        which: ``latest`` (the newest whole one when it is damaged, with the reasons in `Found.skipped`), ``best``,
            ``final``, a tag, a step, or the path of a step folder or of another run.

    Raises:
        CheckpointError: there is none, or the one that was named is damaged; says what there is instead.
    """
    root = run / "checkpoints"
    if which != "latest":
        folder = locate(run, which)
        reason = damage_of(folder)
        if reason is not None:
            raise CheckpointError(
                f"Checkpoint {folder} is damaged: {reason}. Resume from another one: {_others(folder)}."
            )
        return Found(folder)
    skipped: list[str] = []
    for folder in _newest_first(root):
        reason = damage_of(folder)
        if reason is None:
            return Found(folder, tuple(skipped))
        skipped.append(f"{folder.name}: {reason}")
    found = f"; damaged: {'; '.join(skipped)}" if skipped else ""
    raise CheckpointError(
        f"--resume: no whole checkpoint under {root}{found}. Nothing was started: to begin again from step 0, train "
        f"under another --name."
    )


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every byte is what was written."""
    try:
        return verify(folder, read_manifest(folder))
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error})"


def _newest_first(root: Path) -> Iterator[Path]:
    """What ``latest`` names, then the older ones; all when it names nothing that is there.

    Not those beyond it: a run that went another way left them.
    """
    named = pointers(root).get("latest")
    folders = step_folders(root)[::-1]
    known = any(folder.name == named for folder in folders)
    yield from (folder for folder in folders if not known or named is None or folder.name <= named)


def locate(run: Path, which: str) -> Path:
    """The step folder that `which` names (see `find_whole`); its bytes are not checked.

    Raises:
        CheckpointError: there is none; the message lists what is there.
    """
    root = run / "checkpoints"
    named = pointers(root)
    if which == "latest":
        found = next(_newest_first(root), root / "none")
    elif which in named:
        found = root / Path(named[which]).name
    elif which.isascii() and which.isdecimal():
        found = root / step_name(int(which))
    else:
        found = Path(which)
        if not (found / MANIFEST).is_file() and (found / "checkpoints").is_dir():
            return locate(found, "latest")
    if not (found / MANIFEST).is_file():
        there = ", ".join(path.name for path in step_folders(root)) or "none"
        raise CheckpointError(f"No checkpoint {which!r} under {run}; there are: {there}.")
    return found


def _others(folder: Path) -> str:
    whole = [other.name for other in step_folders(folder.parent) if other != folder and _quick_look(other)]
    return ", ".join(whole) or "there is none"
