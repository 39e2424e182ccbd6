"""What one rank does with a prepared run: opens its world, builds its engine, trains, evaluates, samples."""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor
from torch.distributed import Store

from ..checkpoint.model import check_same_model, initial_reader
from ..checkpoint.store import find_checkpoint, open_checkpoint
from ..config.load import load_config
from ..config.schema import Config
from ..data.loader import Share, TrainLoader, evaluation_window
from ..data.tokenizers import load_tokenizer
from ..data.tokens import SPLITS, open_split
from ..engines.base import Engine
from ..engines.build import build
from ..engines.world import open_world
from ..errors import CheckpointError
from ..models import model_spec
from ..planning.plan import Plan
from ..types import Batch, World
from .evaluate import Evaluator
from .events import EventLog
from .loop import Progress, Trainer
from .progress import open_display
from .sampling import generate
from .signals import stop_requests
from .start import PreparedRun


def train_rank(prepared: PreparedRun, store: Store | None) -> None:
    """Train to the end, or until asked to stop. Collective."""
    run, plan = prepared.folder, prepared.plan
    config = load_config(run / "config.yaml", None, ()).config
    with ExitStack() as cleanup:
        world = cleanup.enter_context(open_world(plan, store))
        stop = cleanup.enter_context(stop_requests())
        spec = model_spec(plan.model.kind)
        engine = build(plan, spec, world)
        cleanup.callback(engine.close)
        progress = load_weights(engine, prepared)
        share = Share(plan.micro_batch, plan.accumulation_steps, world.rank, world.world_size)
        splits = {split: open_split(config.data.path, split, plan.model, config.seed) for split in SPLITS}
        loader = TrainLoader(splits["train"], share, pin_memory=plan.device == "cuda")
        cleanup.callback(loader.close)
        evaluator = Evaluator({s: list(evaluation_window(d, share, config.eval_batches)) for s, d in splits.items()})
        events = EventLog(run / "events.jsonl", world.is_main)
        cleanup.callback(events.close)
        display = open_display(world.is_main, config.max_steps, progress.step, config.log_interval)
        cleanup.callback(display.close)
        Trainer(
            config, plan, spec, engine, loader, evaluator, world, run / "checkpoints", display, events, stop, progress
        ).train()
        sample = sample_text(config, plan, engine, world)
        if sample:
            display.say(f"Sample:\n{sample}")
        display.say(f"Run folder: {run}")


def load_weights(engine: Engine, prepared: PreparedRun) -> Progress:
    """Initial values, or those of the checkpoint that is resumed; returns where the loop goes on. Collective.

    Raises:
        CheckpointError: there is none, or it is of another model or batch.
    """
    plan = prepared.plan
    if prepared.resume is None:
        spec = model_spec(plan.model.kind)
        engine.load(initial_reader(spec, plan.model, plan.seed))
        return Progress()
    saved = open_checkpoint(find_checkpoint(prepared.folder, prepared.resume))
    check_same_model(saved, plan.model)
    for name, value in (("global_batch", plan.global_batch), ("seed", plan.seed)):
        if saved.state[name] != value:
            raise CheckpointError(
                f"Checkpoint {saved.folder} was trained with {name} {saved.state[name]}, and {name} {value} was asked "
                f"for: the data would go on somewhere else. Resume with {name} {saved.state[name]}."
            )
    engine.load(saved.read, saved.scalars)
    best = saved.state["best_loss"]
    return Progress(
        step=saved.step,
        best_loss=float("inf") if best is None else best,
        best_step=saved.state["best_step"],
        metrics=dict(saved.state["metrics"]),
    )


def sample_text(config: Config, plan: Plan, engine: Engine, world: World) -> str | None:
    """Text that the trained model writes; None when none was asked for. Collective."""
    tokenizer = load_tokenizer(config.data.path)
    if not config.sample_tokens or tokenizer is None:
        return None

    def predict(tokens: Tensor) -> Tensor:
        return engine.predict(Batch({"tokens": tokens}, tokens.numel()))

    prompt = tokenizer.encode(config.sample_prompt).tolist()
    tokens = generate(predict, prompt, config.sample_tokens, block_size=plan.model.block_size, seed=config.seed)
    return tokenizer.decode(tokens[len(prompt) :])
