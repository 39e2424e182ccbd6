"""Everything before the first process: data, vocabulary, hardware, plan, run folder. Starts nothing, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..config.load import ResolvedConfig
from ..config.schema import Config
from ..data.prepare import is_prepared, prepare
from ..data.tokens import check_data, vocabulary_size
from ..planning.choose import Choice, choose
from ..planning.explain import print_choice
from ..planning.hardware import Hardware, probe
from ..planning.plan import Plan
from .run_folder import choose_folder, write_run_folder


@dataclass(frozen=True)
class PreparedRun:
    """A run that can be launched."""

    folder: Path
    plan: Plan
    resume: str | None

    @property
    def processes(self) -> int:
        """Processes to start on this machine."""
        return self.plan.world_size

    @property
    def worker_arguments(self) -> list[str]:
        """Arguments of ``python -m zerofit.training.worker``."""
        return ["--run", str(self.folder), *(["--resume", self.resume] if self.resume else [])]

    @property
    def log_dir(self) -> Path:
        """Where the ranks' output goes."""
        return self.folder / "logs"


def with_data(resolved: ResolvedConfig, console: Console) -> ResolvedConfig:
    """Prepare the data when it is missing, take the vocabulary from it, and check that it suits the model.

    Raises:
        DataError: missing, empty, too short, or beyond the vocabulary.
    """
    config = resolved.config
    if config.data.prepare and not is_prepared(config.data.path):
        console.print(f"Preparing {', '.join(config.data.prepare)} …", highlight=False, soft_wrap=True)
        console.print(prepare(config.data).describe(), highlight=False, soft_wrap=True)
    resolved = with_vocabulary(resolved)
    check_data(config.data.path, resolved.config.model)
    return resolved


def with_vocabulary(resolved: ResolvedConfig) -> ResolvedConfig:
    """The configuration with the vocabulary of its prepared data, unless it names one itself.

    Raises:
        DataError: the data is missing.
    """
    config = resolved.config
    if config.model.vocab_size is not None:
        return resolved
    model = config.model.model_copy(update={"vocab_size": vocabulary_size(config.data.path)})
    origins = {**resolved.origins, "model.vocab_size": f"data {config.data.path}"}
    return ResolvedConfig(config.model_copy(update={"model": model}), origins)


def make_plan(config: Config, console: Console) -> tuple[Choice, Hardware]:
    """Choose for this machine, and print the choice with its warnings."""
    hardware = probe(config.runs_dir, config.nvme_path)
    choice = choose(config, hardware)
    print_choice(console, config, choice)
    return choice, hardware


def prepare_run(
    resolved: ResolvedConfig, *, default_name: str, resume: str | None, dry_run: bool
) -> PreparedRun | None:
    """All of a run up to its first process group; None for a dry run, which writes no run folder.

    Raises:
        RequestError: something about the request is wrong (exit code 2).
        DoesNotFit: nothing fits (exit code 3).
    """
    console = Console()
    folder = choose_folder(resolved, default_name, resume)
    resolved = with_data(resolved, console)
    choice, hardware = make_plan(resolved.config, console)
    if dry_run:
        console.print(
            f"Dry run: nothing was started. The run folder would be {folder}.", highlight=False, soft_wrap=True
        )
        return None
    write_run_folder(folder, resolved, choice.plan, hardware)
    return PreparedRun(folder, choice.plan, resume)
