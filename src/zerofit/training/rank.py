"""What one rank does with a prepared run: opens its world, builds its engine, trains, evaluates, samples."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import cast

from torch.distributed import Store

from ..checkpoint.initial import open_initial
from ..checkpoint.model import initial_reader, parameters_only
from ..checkpoint.pretrained import starting_reader
from ..checkpoint.retention import Retention
from ..checkpoint.saver import Saver
from ..checkpoint.source import Source, open_source
from ..checkpoint.store import open_checkpoint
from ..config.image_models import ImageModelShape
from ..config.load import load_config
from ..config.schema import Config, EarlyStoppingConfig
from ..data.loader import Share
from ..engines.base import Engine
from ..engines.common import add_over_ranks
from ..engines.world import open_world
from ..models import model_spec
from ..planning.plan import Plan
from ..tasks import task_of
from ..tasks.base import Ending
from ..types import Batch
from .checkpoints import Checkpoints
from .evaluate import Evaluator
from .events import EventLog
from .freezing import thaw_step
from .loop import Trainer
from .phases import PhasedEngine, load_source
from .probe import differs, probe_loss, stored_probe
from .progress import Display, open_display
from .signals import stop_requests
from .start import PreparedRun, checkpoint_bytes
from .state import Progress


def train_rank(prepared: PreparedRun, store: Store | None) -> None:
    """Train to the end, or until asked to stop. Collective."""
    run, plan = prepared.folder, prepared.plan
    config = load_config(run / "config.yaml", None, ()).config
    with ExitStack() as cleanup:
        world = cleanup.enter_context(open_world(plan, store))
        stop = cleanup.enter_context(stop_requests())
        spec, task = model_spec(plan.model.kind), task_of(plan.model)
        source = open_start(prepared)
        begins_at = (source.step or 0) if source is not None and prepared.start.how != "weights" else 0
        phases = PhasedEngine(plan, spec, world, begins_at, thaw_step(config, plan))
        cleanup.callback(lambda: phases.close())
        engine = cast(Engine, phases)
        progress = load_weights(engine, prepared, source, frozen=phases.frozen)
        if source is not None:
            forget_another_metric(progress, source, config)
        share = Share(plan.micro_batch, plan.accumulation_steps, world.rank, world.world_size)
        feed = task.open(config, plan.model, share, pin_memory=plan.device == "cuda")
        cleanup.callback(feed.train.close)
        engine.inputs.transform = feed.transform
        evaluator = Evaluator(task, feed.evaluation)
        events = EventLog(run / "events.jsonl", world.is_main)
        cleanup.callback(events.close)
        display = open_display(world.is_main, config, progress.step)
        cleanup.callback(display.close)
        tell_start(engine, source, plan, events, display)
        saver = Saver(
            run / "checkpoints",
            world,
            Retention(config.keep_checkpoints, config.keep_every, config.keep_best),
            checkpoint_bytes(plan),
            asynchronous=config.save_asynchronously and plan.offload != "nvme",
            patience_seconds=config.collective_timeout_seconds,
        )
        cleanup.callback(saver.close)
        data = task.fingerprint(config)
        words = partial(task.words, config, plan.model, lambda inputs: engine.predict(Batch({"tokens": inputs}, 1)))
        checkpoints = Checkpoints(saver, engine, config, plan, world, task, data, feed.probe, events, display)
        Trainer(
            config,
            plan,
            spec,
            task,
            engine,
            feed.train,
            evaluator,
            world,
            checkpoints,
            display,
            events,
            stop,
            progress,
            words,
            phases,
        ).train()
        ending = Ending(
            config,
            plan.model,
            feed,
            lambda inputs: engine.predict(Batch(inputs, 1)),
            lambda tensor: add_over_ranks(tensor, world),
            run,
            world.is_main,
        )
        if last := task.finish(ending):
            display.say(last)
        display.say(f"Run folder: {run}")


def open_start(prepared: PreparedRun) -> Source | None:
    """What the run starts from; None for initial values.

    Raises:
        CheckpointError: it cannot be read any more.
    """
    plan, start = prepared.plan, prepared.start
    if start.checkpoint is None:
        return None
    if start.how == "resume":
        return open_checkpoint(start.checkpoint)  # its bytes were checked when the run was prepared
    open_it = open_initial if start.how == "weights" else open_source
    return open_it(start.checkpoint, plan.model, verified=True)


def load_weights(engine: Engine, prepared: PreparedRun, source: Source | None, *, frozen: bool) -> Progress:
    """Initial values, or those that the run starts from; returns where the loop goes on. Collective.

    Args:
        source: from `open_start`.
        frozen: whether the backbone is frozen now.
    """
    plan, start = prepared.plan, prepared.start
    if source is None:
        spec = model_spec(plan.model.kind)
        if isinstance(plan.model, ImageModelShape):
            engine.load(starting_reader(spec, plan.model, plan.seed))
        else:
            engine.load(initial_reader(spec, plan.model, plan.seed))
        return Progress()
    if start.how == "weights":
        engine.load(parameters_only(source.read))
        return Progress()
    load_source(engine, source, frozen=frozen)
    progress = progress_of(source)
    if start.how == "load":
        count_anew(progress)
    return progress


def count_anew(progress: Progress) -> None:
    """A new run that begins at another's checkpoint has its own clock and its own patience."""
    progress.train_seconds = 0.0
    progress.watched_best, progress.evaluations_without_improvement = None, 0


def progress_of(source: Source) -> Progress:
    """What the loop remembered when the source was written, as far as the source tells."""
    state = source.state
    return Progress(
        step=source.step or 0,
        best_value=state.get("best_value", state.get("best_loss")),
        best_step=state.get("best_step"),
        metrics=dict(state.get("metrics") or {}),
        metrics_step=state.get("metrics_step"),
        skips_in_a_row=state.get("skips_in_a_row", 0),
        train_seconds=state.get("train_seconds") or 0.0,
        watched_best=state.get("watched_best"),
        evaluations_without_improvement=state.get("evaluations_without_improvement", 0),
    )


def forget_another_metric(progress: Progress, source: Source, config: Config) -> None:
    """Early stopping begins anew when the run goes on with another metric, or another direction of it."""
    saved, now = (source.state.get("config") or {}).get("early_stopping"), config.early_stopping
    before = EarlyStoppingConfig(**saved) if saved else now
    if (before.metric, before.better) != (now.metric, now.better):
        progress.watched_best, progress.evaluations_without_improvement = None, 0


def tell_start(engine: Engine, source: Source | None, plan: Plan, events: EventLog, display: Display) -> None:
    """Say what the run goes on from, with the loss of the probe when it was saved and now. Collective."""
    if source is None:
        return
    before = source.state.get("probe_loss")
    probe = stored_probe(source.folder, task_of(plan.model)) if before is not None else None
    now = probe_loss(engine, probe).read() if probe is not None else None
    world = {key: source.state.get(key) for key in ("strategy", "world_size", "precision")}
    events.write("resumed", folder=str(source.folder), step=source.step, saved_under=world, probe_loss=now,
                 probe_loss_when_saved=before)  # fmt: skip
    if before is None or now is None:
        return
    display.say(f"From {source.folder.name}: loss of the stored probe {before:.6f} when it was saved, {now:.6f} now.")
    if differs(before, now, plan.precision, source.state.get("precision") or plan.precision):
        message = (
            f"the stored probe's loss was {before:.6f} when {source.folder.name} was saved and is {now:.6f} now, more "
            f"than rounding explains: other weights or other code"
        )
        events.write("warning", step=source.step, message=message)
        display.say(f"Warning: {message}.")
