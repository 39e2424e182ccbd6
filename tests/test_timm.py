"""Classifiers of timm from the plan to the export, on timm's own small test models.

Skipped where timm is not installed: it brings torchvision, see pyproject.toml. Beside a CPU build of PyTorch:
``pip install --no-deps --target FOLDER timm torchvision`` and PYTHONPATH=FOLDER for this file alone.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pictures import write_folder
from processes import run
from test_conformance import assert_close
from test_freezing import FROZEN, WHOLE, folder
from test_images_training import CLASSES, events_of, run_verb
from test_matrix import save
from zerofit.checkpoint.model import initial_reader
from zerofit.checkpoint.pretrained import starting_weights
from zerofit.checkpoint.store import open_checkpoint
from zerofit.config.load import load_config
from zerofit.config.models import TimmConfig
from zerofit.engines.buffers import Buffers
from zerofit.engines.build import build
from zerofit.engines.common import build_model
from zerofit.engines.fsdp import _meta_model
from zerofit.errors import CheckpointError, ConfigError, MissingDependency
from zerofit.models import model_spec
from zerofit.models.timm_buffers import keep_exact
from zerofit.models.timm_models import create, import_timm
from zerofit.planning.memory import predict_memory, state_bytes
from zerofit.planning.plan import Plan
from zerofit.planning.timm_models import described
from zerofit.training.phases import PhasedEngine
from zerofit.types import Batch, World

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed (pip install 'zerofit[timm]')"
)
#: With batch norms that hold their activation; with layer norms, a class token and positions of its own.
NAMES = ("test_efficientnet", "test_vit")
SAMPLES, MICRO, STEPS, LR, PIXELS = 8, 4, 3, 1e-3, 32
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


@functools.cache
def model_of(name: str, **settings: Any) -> TimmConfig:
    return described(TimmConfig(name=name, num_classes=5, input_size=PIXELS, **settings))


def make_plan(name: str, strategy: str, ranks: int, **fields: Any) -> Plan:
    model = fields.pop("model", None) or model_of(name)
    base: dict[str, Any] = {
        "model": model, "parameters": model.parameter_count(), "device": "cpu", "strategy": strategy,
        "world_size": ranks, "micro_batch": MICRO, "accumulation_steps": SAMPLES // MICRO // ranks, "precision": "fp32",
        "optimizer": {"grad_clip": 0.5, "eps": 1e-2},
        "zero": {"pin_memory": False, "reduce_bucket_elements": 20_000, "persistence_threshold_elements": 100},
    }  # fmt: skip
    return Plan.model_validate(base | fields)


def window(plan: Plan, step: int, rank: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn((SAMPLES, 3, PIXELS, PIXELS), generator=generator)
    targets = torch.randint(0, 5, (SAMPLES,), generator=generator)
    parts = list(zip(images.split(MICRO), targets.split(MICRO), strict=True))
    return [Batch({"images": x, "targets": y}, len(y)) for x, y in parts[rank :: plan.world_size]]


# ---------------------------------------------------------------------------------------------------------- the model


def test_without_timm_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from zerofit.models import timm_models

    def absent() -> Any:
        raise ImportError("No module named 'timm'")

    monkeypatch.setattr(timm_models, "_imported", absent)
    timm_models.import_timm.cache_clear()
    with pytest.raises(MissingDependency, match=r"pip install 'zerofit\[timm\]'"):
        timm_models.describe(TimmConfig(name="resnet18", num_classes=5, input_size=32))
    timm_models.import_timm.cache_clear()


@needs_timm
@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_timm_computes(name: str) -> None:
    from zerofit.models.timm_models import create

    config = model_of(name, drop_path_rate=0.0)
    spec = model_spec("timm")
    ours, theirs = spec.build(config), create(config)
    values = {name: spec.init(config, name, 3) for name in ours.state_dict()}
    for model in (ours, theirs):
        model.load_state_dict(values)
    assert list(dict(ours.named_parameters())) == list(config.parameter_shapes())
    assert {n: tuple(b.shape) for n, b in ours.named_buffers() if n in values} == config.buffer_shapes()
    batch = window(make_plan(name, "single", 1), 0, 0)[0].inputs
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        torch.testing.assert_close(ours(batch["images"]), theirs(batch["images"]), rtol=1e-3, atol=1e-4)
    for name_, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name_), buffer)
    sums = ours(**batch)
    assert set(sums) == {"loss", "correct", "correct_top5"}
    assert spec.init(config, "conv_stem.weight" if "eff" in name else "pos_embed", 3).std() > 0


@needs_timm
def test_recomputed_blocks_move_statistics_once_and_compute_the_same() -> None:
    config, spec = model_of("test_efficientnet"), model_spec("timm")
    batch = window(make_plan("test_efficientnet", "single", 1), 0, 0)[0].inputs
    held = []
    for every in (0, 1):
        model = spec.build(config, checkpoint_every=every)
        model.load_state_dict({name: spec.init(config, name, 3) for name in model.state_dict()})
        loss = model(**batch)["loss"]
        loss.backward()
        held.append((loss, *(p.grad for p in model.parameters()), *model.buffers()))
    for plain, recomputed in zip(*held, strict=True):
        torch.testing.assert_close(plain, recomputed)


@needs_timm
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_keeps_statistics_in_fp32(name: str) -> None:
    (found,) = run(1, train, make_plan(name, "single", 1, precision="bf16"))
    (reference,) = run(1, train, make_plan(name, "single", 1))
    assert_close(found[0], reference[0], 5e-2, 0.5)


@needs_timm
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_no_checkpoint_holds_has_timms_values(device: str) -> None:
    """BEiT's, EVA-02's and Swin v2's attention has a bias that is a buffer of zeros, filled after it was made; under
    FSDP2 the model is made on the meta device."""
    timm = import_timm()
    model = described(TimmConfig(name="eva02_tiny_patch14_224", num_classes=5, input_size=224))
    plan = make_plan("", "fsdp2" if device == "meta" else "single", 1, model=model)
    torch.use_deterministic_algorithms(True)  # what is not filled is NaN
    try:
        if device == "meta":
            built = _meta_model(plan, model_spec("timm"), torch.device("cpu"))
        else:
            built = build_model(plan, model_spec("timm"), torch.device("cpu"))
        wanted = dict(timm.create_model("eva02_tiny_patch14_224", num_classes=5).named_buffers())
    finally:
        torch.use_deterministic_algorithms(False)
    assert "blocks.0.attn.k_bias" in wanted
    for name, buffer in built.named_buffers():
        assert torch.equal(buffer, wanted[name]), name


def a_half_step(world: World, plan: Plan) -> Any:
    """The loss of a step, the rotary tables after it, and the types of what all other layers returned."""
    engine: Any = build(plan, model_spec("timm"), world)
    engine.load(initial_reader(model_spec("timm"), plan.model, plan.seed))
    wide = set()
    for module in engine.model.modules():
        if next(module.children(), None) is None and "Rotary" not in type(module).__name__:
            module.register_forward_hook(lambda module, args, out: wide.add(out.dtype))
    pictures = torch.randn((1, 3, 224, 224), generator=torch.Generator().manual_seed(1))
    loss = engine.train_step([Batch({"images": pictures, "targets": torch.tensor([1])}, 1)], LR, 0).read().loss
    rope = engine.model.get_submodule("rope")
    tables = {name: (str(buffer.dtype), buffer.float().tolist()) for name, buffer in rope.named_buffers()}
    engine.close()
    return loss, tables, {str(dtype) for dtype in wide}


@needs_timm
@pytest.mark.parametrize("strategy", ["single", "zero1", "zero3", "fsdp2"])
def test_rotary_positions_are_not_rounded(strategy: str) -> None:
    """In fp32 as timm's own, while everything after them is in half precision."""
    name = "eva02_tiny_patch14_224"
    model = described(TimmConfig(name=name, num_classes=5, input_size=224, drop_path_rate=0.0))
    fields: dict[str, Any] = {"model": model, "micro_batch": 1, "accumulation_steps": 1, "precision": "bf16"}
    ((loss, tables, dtypes),) = run(1, a_half_step, make_plan("", strategy, 1, **fields))
    exact = dict(import_timm().create_model(name, num_classes=5).rope.named_buffers())
    assert "pos_embed" in tables
    assert not torch.equal(exact["pos_embed"].bfloat16().float(), exact["pos_embed"])  # rounding would show
    for table, (dtype, values) in tables.items():
        assert dtype == "torch.float32"
        assert torch.equal(torch.tensor(values), exact[table]), table
    assert dtypes == {"torch.bfloat16"}
    assert 0 < loss < 10


@needs_timm
def test_what_a_matrix_product_reads_is_rounded_once() -> None:
    """Swin v2's logarithmic coordinates in half precision are timm's in fp32, rounded; and the forward pass runs."""
    config = described(TimmConfig(name="swinv2_cr_tiny_ns_224", num_classes=5, input_size=224))
    plan = make_plan("", "single", 1, model=config, precision="bf16")
    built = build_model(plan, model_spec("timm"), torch.device("cpu"))
    exact = dict(create(config).named_buffers())
    floating = {name: buffer for name, buffer in built.named_buffers() if buffer.is_floating_point()}
    assert any("relative_coordinates_log" in name for name in floating)
    for name, buffer in floating.items():
        assert torch.equal(buffer, exact[name].to(torch.bfloat16)), name
    assert built(torch.zeros(1, 3, 224, 224)).dtype == torch.bfloat16


@needs_timm
def test_a_model_that_timm_makes_in_fp32_alone_says_so() -> None:
    config = described(TimmConfig(name="csatv2", num_classes=5, input_size=224))
    with pytest.raises(ConfigError, match=r"cannot build it in bfloat16 .* Set precision fp32"):
        build_model(make_plan("", "single", 1, model=config, precision="bf16"), model_spec("timm"), torch.device("cpu"))


class _Constant(torch.nn.Module):
    """A persistent constant that takes part in the forward pass, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((3,), 1 / 3))
        self.norm = torch.nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.get_buffer("scale")


def test_a_constant_of_checkpoints_is_rounded_in_the_model_alone() -> None:
    model = _Constant().to(torch.bfloat16)
    keep_exact(model, _Constant)
    buffers = Buffers(model, World(0, 1, 0, torch.device("cpu")))
    third = torch.full((3,), 1 / 3)
    buffers.load(lambda name, role, start, stop: third.clone() if name == "scale" else torch.ones(stop - start))
    assert model.get_buffer("norm.running_var").dtype == torch.float32
    assert model(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(model.get_buffer("scale"), third.bfloat16())
    (saved,) = [fragment.data for fragment in buffers.fragments() if fragment.name == "scale"]
    assert torch.equal(saved, third)


@needs_timm
def test_the_plan_is_traced_and_knows_head_blocks_and_decay() -> None:
    model = model_of("test_vit")
    assert model.head_parameters() == {"head.weight", "head.bias"}
    assert not {"pos_embed", "cls_token", "norm.weight"} & model.decaying()
    assert len(model.block_names) == model.depth > 1
    assert model.flops_per_item() > 0
    for name in NAMES:
        plan = make_plan(name, "single", 1, device="cuda", precision="bf16")
        whole, recomputed = (
            predict_memory(plan.model_copy(update={"activation_checkpointing_every": n})) for n in (0, 1)
        )
        frozen = predict_memory(plan.frozen_phase())
        assert {found.basis for found in (whole, recomputed, frozen)} == {"traced"}
        larger, smaller = (sum(found.phases["forward"].values()) for found in (whole, recomputed))
        assert larger > smaller


@needs_timm
def test_a_model_that_timm_lacks_and_pictures_that_it_refuses_are_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean resnet18"):
        described(TimmConfig(name="resnet81", num_classes=5, input_size=32))
    with pytest.raises(ConfigError, match="drop_path_rate"):
        described(TimmConfig(name="vgg11", num_classes=5, input_size=32, drop_path_rate=0.1))


@needs_timm
@pytest.mark.parametrize(("rate", "found"), [(None, 0.1), (0.0, 0.0), (0.2, 0.2)])
def test_stochastic_depth_is_the_models_own_or_what_was_asked_for(rate: float | None, found: float) -> None:
    model = create(TimmConfig(name="swin_tiny_patch4_window7_224", num_classes=5, input_size=224, drop_path_rate=rate))
    last = model.layers[-1].blocks[-1]
    assert getattr(last.drop_path1, "drop_prob", 0.0) == pytest.approx(found)


@needs_timm
def test_weights_of_a_file_and_published_ones_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    made = timm.create_model("test_vit", num_classes=9, img_size=PIXELS)
    torch.save(made.state_dict(), tmp_path / "nine.pth")
    config = model_of("test_vit").model_copy(update={"weights_from": tmp_path / "nine.pth"})
    weights = starting_weights(config)
    assert weights is not None
    assert config.parameter_shapes().keys() - weights.keys() == {"head.weight", "head.bias"}
    assert torch.equal(weights["blocks.0.attn.qkv.weight"], made.state_dict()["blocks.0.attn.qkv.weight"])
    torch.save({"wrong": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError, match="of another model"):
        starting_weights(config.model_copy(update={"weights_from": tmp_path / "wrong.pth"}))

    asked = []

    def create_model(name: str, pretrained: bool = False, **settings: Any) -> Any:
        """In place of a download."""
        asked.append(pretrained)
        if settings["num_classes"] != 1000:
            raise OSError("no network")
        return made

    published = config.model_copy(update={"weights_from": None, "pretrained": True})
    monkeypatch.setattr(timm, "create_model", create_model)
    found = starting_weights(published)
    assert found is not None
    assert asked == [True]
    assert torch.equal(found["pos_embed"], made.state_dict()["pos_embed"])
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ConfigError, match=r"could not be fetched \(OSError: no network\)"):
        starting_weights(published)


# --------------------------------------------------------------------------------------------------------- strategies


def train(world: World, plan: Plan, root: Path | None = None) -> Any:
    """Steps, memory, losses after a checkpoint and after going on from it."""
    engine: Any = build(plan, model_spec("timm"), world)
    engine.load(initial_reader(model_spec("timm"), plan.model, plan.seed))
    steps = [engine.train_step(window(plan, s, world.rank), LR, s).read() for s in range(STEPS)]
    memory = dict(engine.memory())
    later = again = None
    if root is not None:
        save(engine, world, root, STEPS)
        later = engine.train_step(window(plan, STEPS, world.rank), LR, STEPS).read().loss
        saved = open_checkpoint(folder(root, STEPS))
        engine.load(saved.read, saved.scalars)
        again = engine.train_step(window(plan, STEPS, world.rank), LR, STEPS).read().loss
    engine.close()
    return steps, memory, later, again


@functools.cache
def alone(name: str) -> Any:
    return run(1, train, make_plan(name, "single", 1))[0]


@needs_timm
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_the_same(strategy: str, name: str, tmp_path: Path) -> None:
    plan = make_plan(name, strategy, 2)
    steps, memory, later, again = run(2, train, plan, tmp_path)[0]
    assert_close(steps, alone(name)[0], 1e-4, 1e-3)
    assert memory == state_bytes(plan)
    assert later == again


def compiled_and_evaluated(world: World, plan: Plan) -> list[float]:
    """A step, two evaluations as written, logits; with what the compiler would make replaced by the function itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: lambda *args, **kwargs: function(*args, **kwargs))
        engine: Any = build(plan, model_spec("timm"), world)
    engine.load(initial_reader(model_spec("timm"), plan.model, plan.seed))
    batch = window(plan, 0, world.rank)[:1]
    found = [engine.train_step(window(plan, 0, world.rank), LR, 0).read().loss]
    found += [engine.eval_step(batch, compiled=way).read()["loss"].total for way in (False, True, False)]
    found.append(engine.predict(Batch({"images": batch[0].inputs["images"]}, 1)).float().sum().item())
    engine.close()
    return found


@needs_timm
def test_a_compiled_model_is_evaluated_as_written_under_fsdp2() -> None:
    """timm's models take targets by a forward function of their own, not their class's."""
    reference, compiled = (
        run(1, compiled_and_evaluated, make_plan("test_vit", strategy, 1, compile=compile))[0]
        for strategy, compile in (("single", False), ("fsdp2", True))
    )
    assert compiled == pytest.approx(reference, rel=1e-4)
    assert compiled[1] == compiled[2] == compiled[3]


def frozen_then_whole(world: World, plan: Plan, root: Path) -> list[float]:
    spec = model_spec("timm")
    engine: Any = PhasedEngine(plan, spec, world, 0, FROZEN)
    engine.load(initial_reader(spec, plan.model, plan.seed))
    losses = []
    for step in range(FROZEN + WHOLE):
        losses.append(engine.train_step(window(plan, step, world.rank), LR, step).read().loss)
        if step + 1 == FROZEN:
            save(engine, world, root, FROZEN)
            engine.thaw(open_checkpoint(folder(root, FROZEN)))
    engine.close()
    return losses


@needs_timm
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_frozen_backbone_thaws(strategy: str, tmp_path: Path) -> None:
    model = model_of("test_efficientnet").model_copy(update={"freeze_epochs": 1})
    (reference,) = run(1, frozen_then_whole, make_plan("", "single", 1, model=model), tmp_path / "single")
    found = run(2, frozen_then_whole, make_plan("", strategy, 2, model=model), tmp_path / strategy)
    assert found[0] == pytest.approx(reference, rel=1e-3)


# ----------------------------------------------------------------------------------------------------- from end to end


@needs_timm
def test_a_run_trains_classifies_evaluates_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "pictures", CLASSES, each=8, size=(40, 36))
    config = {
        "model": {"kind": "timm", "name": "test_efficientnet", "drop_rate": 0.1},
        "data": {"kind": "images", "path": str(tmp_path / "data"), "prepare": [str(tmp_path / "pictures")],
                 "cache_size": 32, "image_size": 32, "eval_resize": 32, "val_fraction": 0.25},
        "optimizer": {"learning_rate": 1e-3}, "global_batch": 6, "max_steps": 3, "eval_interval": "epoch",
        "strategy": "single", "device": "cpu", "runs_dir": str(tmp_path / "runs"), "seed": 3,
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(config))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_folder = tmp_path / "runs" / "job"
    assert run_verb(monkeypatch, "train", str(tmp_path / "job.json")) == 0
    assert "architecture" not in (run_folder / "config.yaml").read_text()
    assert load_config(run_folder / "config.yaml", None).config.model.kind == "timm"
    typed = ["train", str(tmp_path / "job.json"), "--resume", "latest", "--max-steps", "4", "--dry-run"]
    assert run_verb(monkeypatch, *typed) == 0
    capsys.readouterr()
    assert run_verb(monkeypatch, "classify", str(run_folder), str(tmp_path / "pictures" / "dog"), "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {c["class"] for c in rows[0]["classes"]} == set(CLASSES)
    assert run_verb(monkeypatch, "eval", str(run_folder), "--checkpoint", "final", "--json") == 0
    last = events_of(run_folder, "eval")[-1]
    assert json.loads(capsys.readouterr().out)["val_loss"] == pytest.approx(last["val_loss"], rel=1e-4)
    out = tmp_path / "model.pt"
    assert run_verb(monkeypatch, "export", str(run_folder), str(out), "--to", "pt") == 0
    assert "timm.create_model('test_efficientnet', num_classes=3)" in " ".join(capsys.readouterr().out.split())
    import timm

    timm.create_model("test_efficientnet", num_classes=3).load_state_dict(torch.load(out))
