"""The run folder: what a run is and what became of it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..checkpoint.manifest import write_atomically
from ..config.load import ResolvedConfig, dump_resolved
from ..errors import ConfigError
from ..planning.hardware import Hardware
from ..planning.plan import Plan

PACKAGES = ("zerofit", "torch", "deepspeed", "numpy", "safetensors", "pydantic", "triton")


def choose_folder(resolved: ResolvedConfig, default_name: str, resume: str | None) -> Path:
    """The folder of this run.

    A new run never writes into the folder of another one: a name that was given is refused when it is taken, a name
    that was derived gets a number. With `resume` the folder is the one that is continued.

    Raises:
        ConfigError: the name is taken, or there is nothing to resume.
    """
    config = resolved.config
    name = config.name
    if name is not None and (not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts):
        raise ConfigError(f"name {name!r} is no name of a folder below runs_dir {config.runs_dir}. Choose a plain one.")
    if resume is not None and name is None and (run := _run_of_checkpoint(Path(resume))) is not None:
        return run
    root = config.runs_dir / (name or default_name)
    if resume is not None:
        return _folder_to_resume(config.runs_dir, root, config.name is None)
    if not _is_used(root):
        return root
    if config.name is not None:
        raise ConfigError(
            f"The run {root} exists already, and a run never writes over another one. Continue it with --resume, or "
            f"choose another --name."
        )
    return next(path for path in _numbered(root) if not _is_used(path))


def _run_of_checkpoint(path: Path) -> Path | None:
    """The run that a path given to ``--resume`` lies in, or is."""
    for run in (path, path.parent.parent):
        if path.is_dir() and _is_used(run):
            return run
    return None


def _folder_to_resume(runs_dir: Path, root: Path, numbered: bool) -> Path:
    """The named run, or for a derived name the newest of its numbered siblings."""
    candidates = [root]
    if numbered:
        for path in _numbered(root):
            if not _is_used(path):
                break
            candidates.append(path)
    used = [path for path in candidates if _is_used(path)]
    if not used:
        raise ConfigError(f"--resume: there is no run {root} under {runs_dir}. Start it without --resume first.")
    return used[-1]


def _numbered(root: Path) -> Iterator[Path]:
    number = 2
    while True:
        yield root.with_name(f"{root.name}-{number}")
        number += 1


def _is_used(root: Path) -> bool:
    return (root / "plan.json").exists() or any(root.glob("checkpoints/step-*"))


def write_run_folder(root: Path, resolved: ResolvedConfig, plan: Plan, hardware: Hardware) -> None:
    """Write ``config.yaml``, ``plan.json`` and ``environment.json``. Earlier plans are kept beside the new one."""
    plan_file = root / "plan.json"
    texts = {
        "config.yaml": dump_resolved(resolved),
        "environment.json": json.dumps(_environment(hardware), indent=1),
        "plan.json": plan.model_dump_json(indent=1),
    }
    try:
        (root / "checkpoints").mkdir(parents=True, exist_ok=True)
        if plan_file.exists():
            number = len(list(root.glob("plan-*.json"))) + 1
            shutil.copyfile(plan_file, root / f"plan-{number}.json")
        for name, text in texts.items():
            write_atomically(root / name, text)
    except OSError as error:
        raise ConfigError(
            f"The run folder {root} cannot be written to ({error.strerror}). Free some disk, mend its permissions, or "
            f"choose another runs_dir."
        ) from error


def _environment(hardware: Hardware) -> dict[str, object]:
    return {
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hardware": hardware.model_dump(),
        "command": sys.argv,
        "git_revision": _git_revision(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Revision of the working directory's repository, for whoever wants to repeat the run."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
