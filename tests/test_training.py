"""The loop's parts that need no process of their own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zerofit.checkpoint.saver import Outcome, Request
from zerofit.config.models import GPT2Config
from zerofit.config.schema import Config, DataConfig, LossScaleConfig, OptimizerConfig, ScheduleConfig
from zerofit.engines.loss_scale import LossScaler
from zerofit.errors import Interrupted
from zerofit.planning.plan import Plan
from zerofit.tasks.language_modeling import TASK
from zerofit.tasks.sampling import generate
from zerofit.training import checkpoints
from zerofit.training.events import EventLog, read_events
from zerofit.training.loop import Trainer
from zerofit.training.progress import SilentDisplay
from zerofit.training.schedule import learning_rate
from zerofit.training.state import Progress
from zerofit.types import SAVE, STOP, Batch, Pending, StepResult, World


def _config(**schedule: object) -> Config:
    return Config(
        model=GPT2Config(n_layer=1, n_head=1, n_embd=8),
        data=DataConfig(path=Path("d")),
        optimizer=OptimizerConfig(learning_rate=1.0),
        schedule=ScheduleConfig.model_validate(schedule),
        max_steps=100,
    )


def test_cosine_with_warmup() -> None:
    config = _config(warmup_steps=10, min_learning_rate=0.1)
    assert [learning_rate(config, step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(config, 10) == pytest.approx(1.0)
    assert learning_rate(config, 55) == pytest.approx(0.55)
    assert learning_rate(config, 100) == pytest.approx(0.1)
    assert learning_rate(config, 5000) == pytest.approx(0.1)


def test_decay_may_end_before_the_run_and_constant_stays() -> None:
    assert learning_rate(_config(decay_steps=50), 75) == 0.0
    assert learning_rate(_config(kind="constant", warmup_steps=2), 99) == 1.0


def test_the_loss_scale_follows_deepspeeds_law(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed_scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler", exc_type=ImportError)
    monkeypatch.setattr(deepspeed_scaler.dist, "get_rank", lambda: 1)  # it logs overflows on rank 0
    config = LossScaleConfig(initial_power=8, window=3, hysteresis=2)
    ours = LossScaler(config, enabled=True, device=torch.device("cpu"))
    theirs = deepspeed_scaler.DynamicLossScaler(
        init_scale=2**8, scale_window=3, min_scale=1, delayed_shift=2, consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    scales = []
    for _ in range(200):
        overflow = bool(torch.rand((), generator=generator) < 0.3)
        ours.update(torch.tensor(overflow))
        theirs.update_scale(overflow)
        assert ours.scale.item() == theirs.cur_scale
        scales.append(ours.scale.item())
    assert len(set(scales)) > 4  # it went up and down
    again = LossScaler(config, enabled=True, device=torch.device("cpu"))
    again.load(ours.scalars())
    assert again.scalars() == ours.scalars()


def test_events_are_json_even_when_numbers_are_not_finite(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", enabled=True)
    log.write("step", step=1, loss=math.nan, grad_norm=math.inf)
    log.close()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind": "st')  # a crash in the middle of a line
    assert read_events(tmp_path / "events.jsonl") == [{"kind": "step", "step": 1, "loss": "nan", "grad_norm": "inf"}]
    json.loads((tmp_path / "events.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)


def test_a_full_disk_loses_events_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    log = EventLog(Path("/dev/full"), enabled=True)
    for step in (1, 2):
        log.write("step", step=step)
    log.close()
    assert capsys.readouterr().err.count("events are lost") == 1


class FullDisk:
    """A saver whose disk has no room until `free` is set; its saves are durable at once."""

    def __init__(self) -> None:
        self.free, self.checkpoint_bytes, self.root = False, 10, Path("somewhere")
        self.outcomes: list[Outcome] = []

    def begin(self, request: Any, fragments: Any, hold_updates: Any) -> bool:
        if self.free:
            self.outcomes.append(Outcome(request.step, f"step-{request.step}", 0.1))
        return self.free

    def finish(self) -> bool:
        return True

    def told(self) -> list[Outcome]:
        told, self.outcomes = self.outcomes, []
        return told

    def has_room(self) -> bool:
        return self.free


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_pauses_saving_and_is_told_once(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "probe_loss", lambda engine, probe: Pending(lambda: 1.0))
    monkeypatch.setattr(checkpoints, "RETRY_SECONDS", 0.0)
    disk, log = FullDisk(), EventLog(tmp_path / "events.jsonl", enabled=True)
    engine: Any = SimpleNamespace(scalars=dict, fragments=list, hold_updates=None)
    config = _config()
    plan = Plan(model=config.model, parameters=1, strategy="ddp", device="cpu", world_size=2, micro_batch=1,
                accumulation_steps=1, precision="fp32")  # fmt: skip
    world = World(rank, 2, rank, torch.device("cpu"))
    probe = Batch({}, 1)
    own = checkpoints.Checkpoints(disk, engine, config, plan, world, TASK, {}, probe, log, SilentDisplay())  # type: ignore[arg-type]
    assert own.wishes() == 0
    for step in (1, 2):
        assert not own.save(Progress(step=step))
    assert own.wishes() == 0  # still no room
    disk.free = True
    assert own.wishes() == (SAVE if rank == 0 else 0)
    assert own.save(Progress(step=3))
    own.tell()
    assert own.wishes() == 0
    log.close()
    events = read_events(tmp_path / "events.jsonl")
    assert [(event["kind"], event["step"]) for event in events] == [("warning", 1), ("checkpoint", 3)]


def test_an_interrupted_run_saves_the_best_evaluation_as_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request to stop comes in the step whose evaluation is the best so far; neither a save nor an improvement
    would save then. Another one comes where the evaluation got worse."""
    monkeypatch.setattr(checkpoints, "probe_loss", lambda engine, probe: Pending(lambda: 1.0))
    monkeypatch.setattr("zerofit.training.loop._peaks", lambda world: {})
    config = _config().model_copy(
        update={"save_interval": 100, "eval_interval": 2, "save_on_improvement": False, "max_steps": 50}
    )
    plan = Plan(model=config.model, parameters=1, strategy="single", device="cpu", world_size=1, micro_batch=1,
                accumulation_steps=1, precision="fp32")  # fmt: skip
    losses = {2: 3.0, 4: 2.0, 6: 2.5}
    for stopped, names in ((4, ("latest", "best")), (6, ("latest",)), (5, ("latest",))):
        requests: list[Request] = []
        disk, log = FullDisk(), EventLog(tmp_path / "events.jsonl", enabled=True)
        disk.free = True
        monkeypatch.setattr(disk, "begin", lambda request, *_, requests=requests: requests.append(request) or True)
        engine: Any = SimpleNamespace(scalars=dict, fragments=list, hold_updates=None)
        world = World(0, 1, 0, torch.device("cpu"))
        own = checkpoints.Checkpoints(disk, engine, config, plan, world, TASK, {}, Batch({}, 1), log, SilentDisplay())  # type: ignore[arg-type]
        progress, stop = Progress(), SimpleNamespace(wishes=0)

        def train_step(window: Any, lr: float, step: int, wishes: int, stop: Any = stop, at: int = stopped) -> Any:
            stop.wishes = STOP if step + 2 == at else 0  # seen at the start of the step after
            return Pending(lambda: StepResult(1.0, 1.0, 4, wishes, False, 1.0))

        engine.train_step = train_step
        loader: Any = SimpleNamespace(window=lambda step: [], epoch_of_step=lambda step: 0)
        evaluator: Any = SimpleNamespace(evaluate=lambda engine, p=progress: {"val_loss": losses[p.step]})
        spec: Any = SimpleNamespace(flops_per_item=lambda model: 1)
        trainer = Trainer(config, plan, spec, TASK, engine, loader, evaluator, world, own, SilentDisplay(), log,
                          stop, progress)  # type: ignore[arg-type]  # fmt: skip
        with pytest.raises(Interrupted, match=f"Stopped at step {stopped}"):
            trainer.train()
        log.close()
        assert [(request.step, request.pointers) for request in requests] == [(stopped, names)]


def _counting(tokens: torch.Tensor) -> torch.Tensor:
    """Logits that favour the next number, over a vocabulary of 5."""
    return torch.nn.functional.one_hot((tokens + 1) % 5, 5).float() * 3


def test_sampling() -> None:
    assert generate(_counting, [3], 4, block_size=8, temperature=0) == [3, 4, 0, 1, 2]
    assert generate(_counting, [3], 20, block_size=8, top_k=1) == [(3 + i) % 5 for i in range(21)]
    free = [generate(_counting, [3], 50, block_size=8, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert free[0] == free[1] != free[2]
    assert set(free[0]) == {0, 1, 2, 3, 4}


def test_sampling_shows_the_model_its_block_only() -> None:
    lengths = []

    def predict(tokens: torch.Tensor) -> torch.Tensor:
        lengths.append(tokens.shape[1])
        return _counting(tokens)

    generate(predict, [1, 2, 3], 6, block_size=4)
    assert lengths == [3, 4, 4, 4, 4, 4]
