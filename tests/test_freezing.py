"""A backbone that is frozen for the first epochs: what it computes, what it holds, and how a run goes on from there."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pictures import write_folder
from processes import run
from test_conformance_images import LR, MODEL, make_plan, window
from test_images_training import CLASSES, events_of, run_verb
from test_memory_engines import measured
from zerofit.checkpoint.model import initial_reader
from zerofit.checkpoint.retention import Retention
from zerofit.checkpoint.saver import Request, Saver
from zerofit.checkpoint.store import open_checkpoint
from zerofit.cli.check_memory import frozen_comparison
from zerofit.config.load import load_config
from zerofit.config.models import ResNetConfig
from zerofit.engines.build import build
from zerofit.models.freezing import freeze
from zerofit.models.resnet import SPEC
from zerofit.planning import candidates
from zerofit.planning.choose import survey
from zerofit.planning.described import Description, described_hardware
from zerofit.planning.explain import describe_frozen, frozen_json
from zerofit.planning.hardware import probe
from zerofit.planning.memory import MemoryPrediction, predict_memory, state_bytes
from zerofit.planning.plan import Plan
from zerofit.planning.sizes import format_seconds
from zerofit.training.phases import STATE, PhasedEngine, load_source
from zerofit.types import World

HEAD = {"fc.weight", "fc.bias"}
#: Steps with a frozen backbone, and with the whole network after it.
FROZEN, WHOLE = 2, 2
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


def initialised(config: ResNetConfig) -> Any:
    model = SPEC.build(config)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(SPEC.init(config, name, 3))
    return model


# -------------------------------------------------------------------------------------------------------- the module


def test_a_frozen_backbone_computes_as_in_evaluation_and_keeps_its_statistics() -> None:
    batch = window(make_plan("single", 1), 0, 0)[0].inputs
    whole, frozen = initialised(MODEL), initialised(MODEL)
    before = frozen.state_dict()
    freeze(frozen, HEAD)
    assert set(dict(frozen.named_parameters())) == HEAD
    assert set(frozen.state_dict()) == set(before)
    frozen.train()
    loss = frozen(**batch)["loss"]
    loss.backward()
    with torch.no_grad():
        assert loss.item() == whole.eval()(**batch)["loss"].item()  # the head has no dropout
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())
    features = whole.features(batch["images"])
    torch.nn.functional.cross_entropy(whole.fc(features.detach()), batch["targets"], reduction="sum").backward()
    torch.testing.assert_close(frozen.fc.weight.grad, whole.fc.weight.grad)


def test_what_holds_nothing_beside_the_head_follows_the_mode() -> None:
    head = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(3, 2))
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5)), head)
    freeze(model, {"1.1.weight", "1.1.bias"})
    model.eval()
    model.train()
    assert not model[0].training
    assert not model[0][1].training
    assert head.training
    assert head[0].training


# --------------------------------------------------------------------------------------------------------- the engine


@dataclass(frozen=True)
class Seen:
    """One rank's run through both phases."""

    losses: list[float]
    again: dict[int, list[float]]
    """Step of a checkpoint -> losses after it, of a run that goes on from it."""
    kept: bool
    """The frozen phase's checkpoints hold the initial backbone and its statistics, bit for bit."""
    phases: list[str]
    memory: dict[str, int]
    roles: set[str]


def save(engine: Any, world: World, root: Path, step: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    saver = Saver(root, world, Retention(9), 0, asynchronous=True, patience_seconds=30)
    state = {STATE: engine.frozen}
    saver.begin(Request(step, engine.scalars(), state, {}, ("latest",)), engine.fragments(), engine.hold_updates)
    assert saver.finish()
    saver.close()


def folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def both_phases(world: World, plan: Any, root: Path) -> Seen:
    engine: Any = PhasedEngine(plan, SPEC, world, 0, FROZEN)
    initial = initial_reader(SPEC, plan.model, plan.seed)
    engine.load(initial)
    memory, phases = {}, [type(engine.current).__name__]
    losses = []
    for step in range(FROZEN + WHOLE):
        losses.append(engine.train_step(window(plan, step, world.rank), LR, step).read().loss)
        if step == 0:
            memory = dict(engine.memory())
        save(engine, world, root, step + 1)
        if step + 1 == FROZEN:
            engine.thaw(open_checkpoint(folder(root, FROZEN)))
            phases.append(type(engine.current).__name__)
    engine.close()
    again = {}
    for first in (1, FROZEN, FROZEN + 1):
        source = open_checkpoint(folder(root, first))
        resumed: Any = PhasedEngine(plan, SPEC, world, first, FROZEN)
        load_source(resumed, source, frozen=resumed.frozen)
        again[first] = []
        for step in range(first, FROZEN + WHOLE):
            again[first].append(resumed.train_step(window(plan, step, world.rank), LR, step).read().loss)
            if step + 1 == FROZEN:
                resumed.thaw(open_checkpoint(folder(root, FROZEN)))
        resumed.close()
    saved = open_checkpoint(folder(root, FROZEN))
    shapes = {**plan.frozen_phase().frozen_shapes(), **plan.model.buffer_shapes()}
    kept = all(
        torch.equal(saved.read(name, role, 0, size), initial(name, role, 0, size))  # type: ignore[arg-type]
        for name, shape in shapes.items()
        for role, size in [("buffer" if name in plan.model.buffer_shapes() else "parameter", int(np.prod(shape)))]
    )
    roles = {role for role, name in saved.manifest.tensors if name in HEAD}
    return Seen(losses, again, kept, phases, memory, roles)


def phased_plan(strategy: str, ranks: int, **fields: Any) -> Any:
    return make_plan(strategy, ranks, model=MODEL.model_copy(update={"freeze_epochs": 1}), **fields)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    (seen,) = run(1, both_phases, phased_plan("single", 1), tmp_path_factory.mktemp("single"))
    return seen


def test_one_process_resumes_exactly_in_and_after_the_frozen_phase(reference: Seen) -> None:
    for first, losses in reference.again.items():
        assert losses == reference.losses[first:], first
    assert reference.kept
    assert reference.roles == {"parameter", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_both_phases_alike(strategy: str, reference: Seen, tmp_path: Path) -> None:
    seen = run(2, both_phases, phased_plan(strategy, 2), tmp_path)
    for rank in seen:
        assert rank.losses == pytest.approx(reference.losses, rel=1e-4)
        for first, losses in rank.again.items():
            assert losses == rank.losses[first:], first
        assert rank.kept
        whole = {"ddp": "DDPEngine", "fsdp2": "FSDPEngine"}.get(strategy, "DeepSpeedEngine")
        assert rank.phases == ["DDPEngine", whole]


def test_half_precision_rounds_no_frozen_weight_and_holds_what_the_planner_says(tmp_path: Path) -> None:
    plan = phased_plan("ddp", 2, precision="bf16", optimizer={"ema_decay": 0.9, "eps": 1e-2})
    first, second = run(2, both_phases, plan, tmp_path)
    assert first.kept
    assert first.roles == {"parameter", "exp_avg", "exp_avg_sq", "ema"}
    predicted = state_bytes(plan.frozen_phase())
    assert predicted["frozen"] == 2 * (plan.parameters - plan.frozen_phase().parameters)
    for seen in (first, second):
        assert seen.memory == predicted
        for step, losses in seen.again.items():
            assert losses == seen.losses[step:], step
    saved = open_checkpoint(folder(tmp_path, FROZEN))
    average = saved.read("conv1.weight", "ema", 0, 12)
    assert average is not None
    assert torch.equal(average, SPEC.init(MODEL, "conv1.weight", plan.seed).reshape(-1)[:12])


def test_a_whole_network_starts_its_optimizer_afresh_and_the_frozen_one_goes_on(tmp_path: Path) -> None:
    run(1, both_phases, phased_plan("single", 1), tmp_path)
    counted = [open_checkpoint(folder(tmp_path, step)).scalars["optimizer_steps"] for step in (1, 2, 3, 4)]
    assert counted == [1, 2, 1, 2]


def test_what_keeps_the_whole_network_from_being_built_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And not that there is no engine to close."""
    plan = make_plan("single", 1, model=MODEL.model_copy(update={"freeze_epochs": 1}))
    engine: Any = PhasedEngine(plan, SPEC, World(0, 1, 0, torch.device("cpu")), 0, FROZEN)
    engine.load(initial_reader(SPEC, plan.model, plan.seed))

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("the GPU is full")

    monkeypatch.setattr("zerofit.training.phases.build", full)
    with pytest.raises(torch.OutOfMemoryError, match="the GPU is full"):
        engine.thaw(None)
    engine.close()


def test_freezing_saves_the_memory_that_the_planner_says() -> None:
    """Differences, because a process on the CPU holds a constant beside what is planned."""
    whole = phased_plan("single", 1)
    real, planned = [], []
    for plan in (whole, whole.frozen_phase()):
        real.append(max(run(1, measured, plan)[0].values()))
        planned.append(predict_memory(plan).allocated_bytes)
    assert planned[1] < planned[0] / 2
    assert real[0] - real[1] == pytest.approx(planned[0] - planned[1], rel=0.06)


# ------------------------------------------------------------------------------------------------ averaged statistics


def averaged(world: World, plan: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Buffer -> its average as the engine saves it, and as it follows from the statistics after every step."""
    engine: Any = build(plan, SPEC, world)
    engine.load(initial_reader(SPEC, plan.model, plan.seed))

    def held(role: str) -> dict[str, np.ndarray]:
        """Of rank 0, which saves them; collective."""
        names = plan.model.buffer_shapes()
        return {f.name: f.data.numpy() for f in engine.fragments() if f.role == role and f.name in names}

    expected = held("buffer")
    for step in range(3):
        engine.train_step(window(plan, step, world.rank), LR, step).read()
        weight = 1 - min(plan.optimizer.ema_decay, (2 + step) / (11 + step))
        now = held("buffer")
        expected = {name: expected[name] + weight * (now[name] - expected[name]) for name in now}
    found, memory = held("ema"), engine.memory()
    engine.close()
    assert memory["buffers"] == state_bytes(plan)["buffers"]
    return {name: (values, expected[name]) for name, values in found.items()}


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero2", "zero3", "fsdp2"])
def test_statistics_are_averaged_as_the_weights_are(strategy: str) -> None:
    ranks = 1 if strategy == "single" else 2
    plan = make_plan(strategy, ranks, optimizer={"ema_decay": 0.5, "eps": 1e-2})
    seen = run(ranks, averaged, plan)[0]
    assert set(seen) == {name for name, shape in MODEL.buffer_shapes().items() if shape}  # counters are not averaged
    for name, (found, expected) in seen.items():
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=name)


# ------------------------------------------------------------------------------------------------------------ the plan


def test_the_plan_tells_what_the_frozen_phase_needs() -> None:
    typed = [("model.freeze_epochs", "2"), ("model.input_size", "224"), ("max_steps", "9"), ("duration", "null")]
    config = load_config(None, "animals90", [*typed, ("micro_batch", "16")]).config
    hardware = described_hardware(Description(gpu="rtx4090"), probe(Path(), None))
    chosen = survey(config, hardware).chosen
    assert chosen is not None
    assert chosen.frozen is not None
    whole, frozen = chosen.memory, chosen.frozen
    assert (whole.basis, frozen.basis) == ("traced", "traced")
    assert frozen.items["activations"] < whole.items["activations"] / 2
    assert frozen.items.get("gradients", 0) < whole.items["gradients"] / 100
    assert frozen.driver_bytes < whole.driver_bytes
    words = describe_frozen(chosen, None)
    assert "46,170 of 11,222,682 parameters" in words
    assert "less than the whole network" in words
    assert chosen.step is not None
    assert chosen.frozen_step is not None
    assert f"One of its steps takes about {format_seconds(chosen.frozen_step.step_seconds)}" in words
    # The forward pass is a third of both; the head's gradient and its update are next to nothing.
    compute, whole_compute = (found.parts["compute"] for found in (chosen.frozen_step, chosen.step))
    assert whole_compute / 3 < compute < whole_compute / 3 * 1.01
    assert chosen.frozen_step.parts["optimizer"] < chosen.step.parts["optimizer"] / 100
    assert (
        chosen.frozen_step.mfu * 3 < chosen.step.mfu * chosen.step.step_seconds / chosen.frozen_step.step_seconds * 1.01
    )
    found = frozen_json(chosen)
    assert found is not None
    assert found["step_seconds"] == chosen.frozen_step.step_seconds
    assert found["images_per_second"] == pytest.approx(chosen.plan.global_batch / found["step_seconds"])


def test_checking_the_memory_runs_the_frozen_phase_too() -> None:
    typed = [("model.freeze_epochs", "2"), ("model.input_size", "224"), ("max_steps", "9"), ("duration", "null")]
    config = load_config(None, "animals90", [*typed, ("micro_batch", "16")]).config
    chosen = survey(config, described_hardware(Description(gpu="rtx4090"), probe(Path(), None))).chosen
    assert chosen is not None
    assert chosen.frozen is not None
    assert chosen.frozen_step is not None
    measured = {"allocated": 1, "reserved": 2, "driver": 3, "seconds": [9.0, 1.0, 2.0, 3.0], "states": {}}
    rows = frozen_comparison(chosen, chosen.plan.frozen_phase(), measured)
    assert rows["frozen: gpu_driver_bytes"] == {"predicted": chosen.frozen.driver_bytes, "measured": 3}
    assert rows["frozen: step_seconds"] == {"predicted": chosen.frozen_step.step_seconds, "measured": 2.0}


def test_the_peak_is_that_of_the_larger_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-3 with everything offloaded a replicated backbone may be the larger one."""

    def predict(plan: Plan, *arguments: Any, **named: Any) -> MemoryPrediction:
        found = predict_memory(plan, *arguments, **named)
        return replace(found, driver_bytes=found.driver_bytes + 30 * 2**30) if plan.frozen else found

    monkeypatch.setattr(candidates, "predict_memory", predict)
    typed = [("model.freeze_epochs", "2"), ("model.input_size", "224"), ("max_steps", "9"), ("duration", "null")]
    config = load_config(None, "animals90", typed).config
    found = survey(config, described_hardware(Description(gpu="rtx4090"), probe(Path(), None)))
    assert found.chosen is None
    assert all(candidate.memory is candidate.frozen for candidate in found.candidates)
    assert all(candidate.peak_bytes > 30 * 2**30 for candidate in found.candidates)


def test_host_memory_is_that_of_the_phase_that_needs_most_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole network's optimizer lies in host memory, also where the frozen phase is larger on the GPU."""

    def predict(plan: Plan, *arguments: Any, **named: Any) -> MemoryPrediction:
        found = predict_memory(plan, *arguments, **named)
        return replace(found, driver_bytes=found.driver_bytes + 2**30) if plan.frozen else found

    typed = [("model.input_size", "224"), ("max_steps", "9"), ("duration", "null"), ("micro_batch", "8")]
    typed += [("strategy", "zero2"), ("offload", "cpu"), ("num_gpus", "2")]
    hardware = described_hardware(Description(gpus="2", gpu="rtx4090"), probe(Path(), None))
    plain = survey(load_config(None, "animals90", typed).config, hardware).chosen
    monkeypatch.setattr(candidates, "predict_memory", predict)
    chosen = survey(load_config(None, "animals90", [*typed, ("model.freeze_epochs", "2")]).config, hardware).chosen
    assert plain is not None
    assert chosen is not None
    assert chosen.memory is chosen.frozen
    assert chosen.host_peak_bytes == plain.host_peak_bytes > 2**26
    assert chosen.memory.host_items == plain.memory.host_items


# ----------------------------------------------------------------------------------------------------- from end to end


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with ``job.json``, whose run starts from ``weights.pth``: 27 pictures an epoch, 8 a step."""
    write_folder(tmp_path / "pictures", CLASSES, each=12, size=(40, 36))
    start = ResNetConfig(layers=18, base_width=4, num_classes=7, input_size=32)
    torch.save(initialised(start).state_dict(), tmp_path / "weights.pth")
    config = {
        "model": {"kind": "resnet", "layers": 18, "base_width": 4, "freeze_epochs": 1,
                  "weights_from": str(tmp_path / "weights.pth")},
        "data": {"kind": "images", "path": str(tmp_path / "data"), "prepare": [str(tmp_path / "pictures")],
                 "cache_size": 32, "image_size": 32, "eval_resize": 32, "val_fraction": 0.25},
        "optimizer": {"learning_rate": 5e-3}, "schedule": {"kind": "constant"}, "global_batch": 8, "max_steps": 6,
        "eval_interval": "never", "save_interval": 1, "keep_checkpoints": 9, "strategy": "single", "device": "cpu",
        "runs_dir": str(tmp_path / "runs"), "seed": 3, "ema_decay": 0.9,
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(config))
    return tmp_path


def parameters(run_folder: Path, step: int) -> dict[str, torch.Tensor]:
    saved = open_checkpoint(run_folder / "checkpoints" / f"step-{step:08d}")
    found = {name: saved.read(name, "parameter", 0, int(np.prod(shape))) for name, shape in saved.shapes().items()}
    return {name: values for name, values in found.items() if values is not None}


def test_a_run_thaws_where_its_epoch_ends_and_resumes_exactly(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, steps in (("job", ("6",)), ("pieces", ("2", "4", "6"))):
        for number, last_step in enumerate(steps):
            arguments = [str(job / "job.json"), "--name", name, "--max-steps", last_step]
            arguments += ["--resume", "latest"] if number else []
            subprocess.run(
                [sys.executable, "-m", "zerofit.cli.main", "train", *arguments], check=True, capture_output=True
            )
    capsys.readouterr()
    whole, pieces = job / "runs" / "job", job / "runs" / "pieces"
    assert [event["step"] for event in events_of(whole, "thawed")] == [4]  # the epoch of 27 pictures ends in step 4
    assert [e["loss"] for e in events_of(whole, "step")] == [e["loss"] for e in events_of(pieces, "step")]
    first, thawing, last = (parameters(whole, step) for step in (1, 4, 6))
    for name, values in first.items():
        assert torch.equal(values, thawing[name]) is (name not in HEAD), name
        assert not torch.equal(thawing[name], last[name]), name
    for name, values in parameters(pieces, 6).items():
        assert torch.equal(values, last[name]), name
    assert run_verb(monkeypatch, "eval", str(whole), "--checkpoint", "latest", "--weights", "ema", "--json") == 0
    assert np.isfinite(json.loads(capsys.readouterr().out)["val_loss"])


def test_a_run_says_what_is_frozen_and_refuses_where_nothing_can_be_kept(
    job: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    typed = ["train", str(job / "job.json"), "--dry-run"]
    assert run_verb(monkeypatch, *typed) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "trains for 4 steps, then the whole network from step 5" in said
    assert run_verb(monkeypatch, *typed, "--model.freeze_epochs", "9") == 0
    assert "trains for 6 steps, and the run ends with it" in " ".join(capfd.readouterr().out.split())
    assert run_verb(monkeypatch, *typed, "--model.weights_from", "null") == 2
    assert "these would be random numbers" in " ".join(capfd.readouterr().err.split())
    assert run_verb(monkeypatch, "train", "--preset", "shakespeare_char", "--model.freeze_epochs", "1") == 2
