"""Everything before the first process: data, vocabulary, hardware, plan, run folder. Starts nothing, no torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console

from ..checkpoint import retention
from ..checkpoint.initial import locate_initial
from ..checkpoint.manifest import MANIFEST, check_same_model, read_manifest, step_name
from ..config.arguments import Request
from ..config.durations import ENDLESS_STEPS, parse_duration
from ..config.image_models import ImageModelShape
from ..config.images import ImageDataConfig
from ..config.load import COMMAND_LINE, DEFAULT, ResolvedConfig
from ..config.models import HuggingFaceConfig, TimmConfig
from ..config.schema import Config
from ..config.stages import check_last_stage
from ..errors import CheckpointError, ConfigError, DataError
from ..planning.candidates import checkpoint_bytes as kept_checkpoint_bytes
from ..planning.choose import Choice, choose
from ..planning.explain import print_choice
from ..planning.hardware import Hardware, probe
from ..planning.huggingface import completed
from ..planning.optimizer_states import checkpoint_bytes_a_parameter
from ..planning.plan import Plan
from ..planning.sizes import MIB, format_bytes
from ..planning.timm_models import described
from ..planning.translation import print_translation
from ..tasks import task_of
from .freezing import freezing_words, refuse_nothing_to_keep
from .initial_model import NO_WEIGHTS, refuse_another_kind, with_initial_model
from .lock import RunLock, acquire_run
from .resume import check_resumable
from .run_folder import choose_folder, write_run_folder

#: Where weights come from: computed from the seed; a checkpoint of this run; a checkpoint of another run or tool with
#: its step and optimizer, or its weights alone.
How = Literal["fresh", "resume", "load", "weights"]


SLOW_DISK_BYTES_PER_SECOND = 200e6


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        how: see `How`.
        checkpoint: a whole step folder of zerofit's, or what another tool wrote; None for a fresh start.
    """

    how: How = "fresh"
    checkpoint: Path | None = None

    def as_message(self) -> list[str]:
        """For other processes; `of_message` reads it."""
        return [self.how, *([str(self.checkpoint)] if self.checkpoint else [])]

    @staticmethod
    def of_message(message: Sequence[str]) -> Start:
        """What `as_message` wrote."""
        return Start(cast(How, message[0]), Path(message[1]) if len(message) > 1 else None)

    def arguments(self) -> list[str]:
        """As a worker's command line."""
        if self.how == "resume":
            return ["--resume", str(self.checkpoint)]
        if self.checkpoint is not None:
            return ["--load-checkpoint", str(self.checkpoint), *(["--weights-only"] if self.how == "weights" else [])]
        return []


def start_of(request: Request) -> Start:
    """What a request asks to start from; its paths are taken as they are."""
    if request.resume is not None:
        return Start("resume", Path(request.resume))
    if request.load_checkpoint is not None:
        return Start("weights" if request.weights_only else "load", request.load_checkpoint)
    return Start()


@dataclass(frozen=True)
class PreparedRun:
    """A run that can be launched."""

    folder: Path
    plan: Plan
    start: Start = Start()
    lock: RunLock | None = None
    """Keeps others out of the run folder; ranks inherit it."""

    @property
    def processes(self) -> int:
        """Processes to start on this machine."""
        return self.plan.world_size

    @property
    def worker_arguments(self) -> list[str]:
        """Arguments of ``python -m zerofit.training.worker``."""
        return ["--run", str(self.folder), *self.start.arguments()]

    @property
    def stop_grace_seconds(self) -> float:
        """What the ranks have after a request to stop: for their step, a save under way and one more, on a slow disk.

        A batch system may give less (Slurm: 30 s unless it is told otherwise).
        """
        return 30.0 + 2 * checkpoint_bytes(self.plan) / SLOW_DISK_BYTES_PER_SECOND

    @property
    def log_dir(self) -> Path:
        """Where the ranks' output goes."""
        return self.folder / "logs"


def with_data(resolved: ResolvedConfig, console: Console) -> ResolvedConfig:
    """Prepare the data when it is missing, take the vocabulary from it, and check that it suits the model.

    Raises:
        DataError: missing, empty, too short, or beyond the vocabulary.
    """
    if isinstance(resolved.config.model, HuggingFaceConfig):
        raise ConfigError(
            "model.kind huggingface was asked for, and such models can be planned (`zerofit plan`), not trained yet. "
            "GPT-2's weights train as model.kind gpt2."
        )
    from .preset_data import refuse_presets_data  # imports NumPy

    refuse_presets_data(resolved)
    task = task_of(resolved.config.model)
    try:
        task.prepare(resolved.config, lambda text: _say(console, text))
        supposed, resolved = resolved.config.model, with_model_of_data(resolved)
        _say_classes(console, supposed, resolved)
        for note in task.check(resolved.config):
            _say(console, note)
    except DataError as error:
        if not resolved.config.data.sources:
            raise
        raise DataError(f"{resolved.origins['data.sources']}: {error}") from error
    return resolved


def with_model_of_data(resolved: ResolvedConfig) -> ResolvedConfig:
    """The configuration with what its data decides about the model (the vocabulary), unless it says so itself.

    Raises:
        DataError: the data is missing.
    """
    config = resolved.config
    if isinstance(config.model, HuggingFaceConfig):
        return ResolvedConfig(config.model_copy(update={"model": completed(config.model)}), resolved.origins)
    resolved = _without_preset_pictures(resolved)
    config = resolved.config
    decided = task_of(config.model).decided_by_data(config)
    if not decided:
        return _with_architecture(resolved)
    origins = {**resolved.origins, **{f"model.{name}": f"data {config.data.path}" for name in decided}}
    model = config.model.model_copy(update=decided)
    return _with_architecture(replace(resolved, config=config.model_copy(update={"model": model}), origins=origins))


def _with_architecture(resolved: ResolvedConfig) -> ResolvedConfig:
    """With what timm builds, where the model is one of timm's."""
    if not isinstance(resolved.config.model, TimmConfig):
        return resolved
    config = resolved.config.model_copy(update={"model": described(resolved.config.model)})
    return replace(resolved, config=config)


def _say_classes(console: Console, before: object, resolved: ResolvedConfig) -> None:
    """Tell that the preset's number of classes gave way."""
    model = resolved.config.model
    if not isinstance(before, ImageModelShape) or not isinstance(model, ImageModelShape):
        return
    if before.num_classes not in (None, model.num_classes):
        _say(
            console,
            f"model.num_classes {model.num_classes}, as {resolved.config.data.path} has (the preset says "
            f"{before.num_classes}).",
        )


def _without_preset_pictures(resolved: ResolvedConfig) -> ResolvedConfig:
    """Where prepared pictures are there, they decide what a preset only supposes: the number of classes, and what they
    were made of."""
    config, origins = resolved.config, resolved.origins
    if not isinstance(config.data, ImageDataConfig) or not isinstance(config.model, ImageModelShape):
        return resolved
    if not config.data.path.is_dir():
        return resolved
    from ..data.images.store import is_prepared_images  # imports NumPy, which a plan without data does not need

    if not is_prepared_images(config.data.path):
        return resolved
    supposed = {name for name, origin in origins.items() if origin.startswith("preset ")}
    data, model = config.data, config.model
    if "data.prepare" in supposed and "data.path" not in supposed:
        data, origins = data.model_copy(update={"prepare": ()}), {**origins, "data.prepare": f"data {data.path}"}
    if "model.num_classes" in supposed:
        model = model.model_copy(update={"num_classes": None})
    return replace(resolved, config=config.model_copy(update={"data": data, "model": model}), origins=origins)


def make_plan(config: Config, console: Console) -> tuple[Choice, Hardware]:
    """Choose for this machine, and print the choice with its warnings.

    Raises:
        DoesNotFit: nothing fits.
        ConfigError: the duration ends before a stage does.
    """
    hardware = probe(config.runs_dir, config.nvme_path)
    choice = choose(config, hardware)
    print_choice(console, with_length(config, max_steps=steps_of(config, choice.plan)), choice)
    return choice, hardware


def steps_of(config: Config, plan: Plan) -> int:
    """Optimizer steps of the run: ``max_steps``, or what ``duration`` comes to with the plan's batch and the data."""
    if config.duration is None:
        return config.max_steps
    length = parse_duration(config.duration)
    epoch = task_of(config.model).epoch_samples(config) if length.unit == "epochs" else None
    steps = length.steps(epoch_samples=epoch, global_batch=plan.global_batch, sample_tokens=plan.model.items_per_sample)
    assert steps is not None
    return steps


def with_duration(resolved: ResolvedConfig, plan: Plan) -> ResolvedConfig:
    """The configuration whose ``max_steps`` is what its duration comes to.

    What stands nearer to the command line wins; of two on one level the same must come out.

    Raises:
        ConfigError: they contradict each other, or the stages.
    """
    config, origins = resolved.config, resolved.origins
    if config.duration is None:
        return resolved
    steps = steps_of(config, plan)
    if _level(origins["max_steps"]) == _level(origins["duration"]) and steps != config.max_steps:
        length = f"comes to {steps:,} steps" if steps < ENDLESS_STEPS else "is a time"
        raise ConfigError(
            f"duration {config.duration} ({origins['duration']}) {length}, and max_steps says "
            f"{config.max_steps:,} ({origins['max_steps']}). A run has one length: keep one of the two."
        )
    config = with_length(config, max_steps=steps)
    return replace(resolved, config=config, origins={**origins, "max_steps": f"duration {config.duration}"})


def without_overruled_duration(resolved: ResolvedConfig) -> ResolvedConfig:
    """A ``max_steps`` that stands nearer to the command line than the duration takes its place."""
    config, origins = resolved.config, resolved.origins
    if config.duration is None or _level(origins["max_steps"]) <= _level(origins["duration"]):
        return resolved
    return replace(
        resolved,
        config=with_length(config, duration=None),
        origins={**origins, "duration": f"overruled: {origins['max_steps']}"},
    )


def with_length(config: Config, **length: object) -> Config:
    """The configuration with another length, which its stages must fit."""
    config = config.model_copy(update=length)
    try:
        check_last_stage(config)
    except ValueError as reason:
        raise ConfigError(f"{reason}.") from None
    return config


def _level(origin: str) -> int:
    """Default 0, preset 1, file 2, command line 3."""
    if origin == DEFAULT:
        return 0
    return 3 if origin == COMMAND_LINE else 1 if origin.startswith("preset ") else 2


def prepare_run(resolved: ResolvedConfig, request: Request) -> PreparedRun | None:
    """All of a run up to its first process group; None for a dry run, which writes no run folder.

    Raises:
        RequestError: something about the request is wrong (exit code 2).
        DoesNotFit: nothing fits (exit code 3).
    """
    console = Console()
    if resolved.config.init_from == "resume" and request.resume is None:
        request = replace(request, resume="latest")
    _refuse_two_starts(request, resolved)
    folder = choose_folder(resolved, request.default_name, request.resume)
    _refuse_another_kind(folder, request, resolved)
    resolved = with_initial_model(resolved, resumed=(folder, request.resume) if request.resume else None)
    resolved = with_data(without_overruled_duration(resolved), console)
    choice, hardware = make_plan(resolved.config, console)
    resolved = with_duration(resolved, choice.plan)
    print_translation(console, resolved.notes, resolved.config, choice.plan)
    lock = None if request.dry_run else acquire_run(folder)
    try:
        if lock is not None:
            _sweep(folder, console)
        start = _checked_start(folder, request, resolved.config, choice.plan, console)
        if words := freezing_words(resolved.config, choice.plan):
            _say(console, words)
        _refuse_a_full_disk(folder, resolved.config, choice.plan)
        if lock is None:
            _say(console, f"Dry run: nothing was started. The run folder would be {folder}.")
            return None
        write_run_folder(folder, resolved, choice.plan, hardware)
    except BaseException:
        if lock is not None:
            lock.give_up(folder)
        raise
    return PreparedRun(folder, choice.plan, start, lock)


def _refuse_two_starts(request: Request, resolved: ResolvedConfig) -> None:
    if request.load_checkpoint is not None and resolved.config.init_from != "scratch":
        raise ConfigError(
            f"{resolved.origins['init_from']}: init_from {resolved.config.init_from} and --load-checkpoint "
            f"{request.load_checkpoint} both name where the run starts from. Use one of them (--init-from scratch "
            f"turns the first off)."
        )
    if request.weights_only and request.load_checkpoint is None:
        raise ConfigError(
            "--weights-only was given without --load-checkpoint, and it says how much of that checkpoint to take. A "
            "run that is resumed keeps its optimizer; for a fresh one start a new run: --load-checkpoint RUN "
            "--weights-only."
        )
    if request.resume is not None and request.load_checkpoint is not None:
        raise ConfigError(
            "--resume and --load-checkpoint were both given: the first goes on with a run in its own folder, the "
            "second starts a new run from a checkpoint. Use one of them."
        )


def _refuse_another_kind(folder: Path, request: Request, resolved: ResolvedConfig) -> None:
    if request.load_checkpoint is not None:
        refuse_another_kind(resolved, f"--load-checkpoint {request.load_checkpoint}", request.load_checkpoint)
    elif request.resume is not None and resolved.config.init_from in NO_WEIGHTS:
        with suppress(CheckpointError):  # said when it is looked for in earnest
            found = retention.locate(folder, request.resume)
            refuse_another_kind(resolved, f"--resume {request.resume}: {found}", found)


def _sweep(folder: Path, console: Console) -> None:
    """Remove what interrupted saves left, now that the lock says that nobody is saving."""
    for name in retention.sweep(folder / "checkpoints"):
        _say(console, f"Removed {name}, which an interrupted save had left.")


def _checked_start(folder: Path, request: Request, config: Config, plan: Plan, console: Console) -> Start:
    """What the run starts from: found, whole, and of this model.

    Raises:
        CheckpointError: there is none, none is whole, or it is of something else.
    """
    start = start_of(request)
    if start.how == "fresh" and config.init_from not in NO_WEIGHTS:
        start = Start("weights", locate_initial(config.init_from))
    if request.resume is not None:
        found = retention.find_whole(folder, request.resume)
        for skipped in found.skipped:
            _say(console, f"Warning: passed over a damaged checkpoint, {skipped}.", style="yellow")
        manifest = read_manifest(found.folder)
        _refuse_another_run(folder, found.folder)
        _refuse_tags_ahead(folder, manifest.step)
        check_resumable(found.folder, manifest, config, plan, task_of(config.model).fingerprint(config))
        if manifest.step >= config.max_steps:
            _say(console, f"Step {manifest.step} of {config.max_steps} is done; raise --max-steps to train on.")
        return Start("resume", found.folder)
    if start.checkpoint is not None:
        from ..checkpoint.foreign import Foreign
        from ..checkpoint.initial import open_initial
        from ..checkpoint.source import open_source

        source = (open_initial if start.how == "weights" else open_source)(start.checkpoint, plan.model)
        check_same_model(source.folder, source.shapes(), plan.model)
        if start.how == "load":
            _refuse_another_optimizer(source.folder, source.state, config)
        if start.how == "load" and (source.step or 0) >= config.max_steps:
            raise ConfigError(
                f"{source.folder} is of step {source.step}, and max_steps {config.max_steps} leaves nothing to train. "
                f"Raise --max-steps, or take the weights alone with --weights-only."
            )
        if start.how == "load":
            kind = f" ({source.what})" if isinstance(source, Foreign) else ""
            _say(console, f"Starts from {source.folder}{kind}.")
            for note in source.notes:
                _say(console, note)
        if start.how == "weights":
            _say(console, f"Weights from {start.checkpoint}, with a fresh optimizer.")
            _warn_of_another_vocabulary(config, console)
        # Of another tool's folder the ranks look at all that lies there, as was done here.
        return Start(start.how, source.folder if (source.folder / MANIFEST).is_file() else start.checkpoint)
    model = plan.model
    if isinstance(model, ImageModelShape) and (model.pretrained or model.weights_from is not None):
        from ..checkpoint.pretrained import published_by, starting_weights

        lacking = model.parameter_shapes().keys() - (starting_weights(model) or {}).keys()
        afresh = f"; {', '.join(sorted(lacking))} start afresh" if lacking else ""
        _say(console, f"Weights from {model.weights_from or published_by(model)}{afresh}.")
    else:
        refuse_nothing_to_keep(model)
    return start


def _warn_of_another_vocabulary(config: Config, console: Console) -> None:
    """Weights and data of vocabularies that differ fit by their numbers, and mean other text."""
    decided = task_of(config.model).decided_by_data(with_open_vocabulary(config)).get("vocab_size")
    wanted = getattr(config.model, "vocab_size", None)
    if decided is not None and decided != wanted:
        _say(
            console,
            f"Warning: the weights' vocabulary has {wanted} tokens and the data's {decided}. If another tokenizer made "
            f"the data, its ids mean other text than they meant to these weights: prepare it with theirs.",
            style="yellow",
        )


def with_open_vocabulary(config: Config) -> Config:
    """The configuration as if it left the vocabulary to its data."""
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": None})})


def _refuse_another_optimizer(folder: Path, state: Mapping[str, Any], config: Config) -> None:
    """Running means mean something to the optimizer that made them. What other tools write here is AdamW's."""
    made_by, asked = (state.get("config") or {}).get("optimizer", {}).get("kind", "adamw"), config.optimizer.kind
    if made_by != asked:
        raise CheckpointError(
            f"--load-checkpoint {folder}: its optimizer states are {made_by}'s, and optimizer.kind {asked} was asked "
            f"for, which keeps others. Take its weights alone with --weights-only, or use optimizer.kind {made_by}."
        )


def _refuse_another_run(folder: Path, checkpoint: Path) -> None:
    if checkpoint.absolute().parent.parent != folder.absolute():
        raise CheckpointError(
            f"--resume {checkpoint}: that checkpoint belongs to another run than {folder}, and a resumed run goes on "
            f"in its own folder. Name its run with --name, or start a new run with --load-checkpoint {checkpoint}."
        )


def _refuse_tags_ahead(folder: Path, step: int) -> None:
    """A tag promises that its checkpoint stays; going back would train its step again and replace it."""
    root = folder / "checkpoints"
    for name, target in retention.pointers(root).items():
        if name not in retention.POINTERS and target > step_name(step):
            raise CheckpointError(
                f"The tag {name} names {target}, and going on from step {step} would come to that step again with "
                f"other weights. Start a new run with --load-checkpoint {root / step_name(step)}, or take the tag away "
                f"with `zerofit checkpoint tag {folder} {name} --remove`."
            )


def _refuse_a_full_disk(folder: Path, config: Config, plan: Plan) -> None:
    """The plan has warned when the disk may fill up; here it cannot take a single checkpoint.

    Raises:
        ConfigError: not even one fits.
    """
    one = checkpoint_bytes(plan)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    held = sum(path.stat().st_size for path in folder.glob("checkpoints/step-*/*"))
    _, kept = kept_checkpoint_bytes(config, plan.parameters)
    if kept and free + held < one:
        raise ConfigError(
            f"Checkpoints would go to {folder}, where {format_bytes(free)} are free, and one takes "
            f"{format_bytes(one)}. Free some disk, choose another runs_dir, or set save_interval never and "
            f"save_on_improvement false."
        )


def checkpoint_bytes(plan: Plan) -> int:
    """Bytes of one checkpoint over all ranks: masters, means and average in fp32, and the manifest."""
    optimizer = plan.optimizer
    return checkpoint_bytes_a_parameter(optimizer.kind, optimizer.ema_decay is not None) * plan.parameters + 2 * MIB


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False, style=style)
