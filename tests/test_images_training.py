"""Image classification from the command line to the export, on a ResNet of a few thousand parameters."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pictures import write_folder
from zerofit.checkpoint import pretrained
from zerofit.checkpoint.pretrained import starting_reader, starting_weights
from zerofit.cli.main import main as zerofit_main
from zerofit.config.load import load_config
from zerofit.config.models import ResNetConfig
from zerofit.config.schema import Config
from zerofit.errors import CheckpointError, ConfigError, DataError
from zerofit.models.resnet import SPEC
from zerofit.planning.calibration import constants
from zerofit.planning.described import Description, described_hardware
from zerofit.planning.hardware import Hardware, probe
from zerofit.planning.memory import fits_within
from zerofit.planning.recipes import recipes
from zerofit.planning.template import Alloc, Backward, Free, compose
from zerofit.planning.trace import direct_events, trace_template
from zerofit.reporting.history import history
from zerofit.tasks.base import Best
from zerofit.tasks.image_classification import recalls

SMALL = ResNetConfig(layers=18, base_width=4, num_classes=3, input_size=32)
CLASSES = ("cat", "dog", "owl")


def run_verb(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of ``zerofit ARGUMENTS``."""
    monkeypatch.setattr("sys.argv", ["zerofit", *arguments])
    with pytest.raises(SystemExit) as ended:
        zerofit_main()
    return int(ended.value.code or 0)


# ---------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(("layers", "published"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_shapes_are_those_of_the_module_and_of_the_published_models(layers: Any, published: int) -> None:
    config = ResNetConfig(layers=layers, num_classes=1000, input_size=224)
    with torch.device("meta"):
        model = SPEC.build(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == config.parameter_shapes()
    assert list(dict(model.named_parameters())) == list(config.parameter_shapes())
    assert {name: tuple(b.shape) for name, b in model.named_buffers()} == config.buffer_shapes()
    assert config.parameter_count() == published
    assert {"conv1.weight", "layer2.0.downsample.1.running_var", "layer4.1.bn2.bias"} < set(model.state_dict())


def test_flops_are_those_of_the_published_table() -> None:
    """1.8, 3.6 and 3.8 x 10^9 multiplications for 224 x 224 (He et al. 2016, table 1; 4.1 with the later stride)."""
    found = [ResNetConfig(layers=n, num_classes=1000, input_size=224).flops_per_item() / 6e9 for n in (18, 34, 50)]
    assert found == pytest.approx([1.81, 3.66, 4.09], abs=0.01)


def test_initial_values_are_a_function_of_seed_and_name() -> None:
    config = ResNetConfig(num_classes=10, input_size=32, zero_init_residual=True)
    weight = SPEC.init(config, "layer3.0.conv1.weight", 7)
    assert torch.equal(weight, SPEC.init(config, "layer3.0.conv1.weight", 7))
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    assert SPEC.init(config, "layer1.0.bn2.weight", 7).sum() == 0
    assert SPEC.init(config, "layer1.0.bn1.weight", 7).mean() == 1
    assert SPEC.init(config, "bn1.running_var", 7).mean() == 1
    assert SPEC.init(config, "fc.weight", 7).abs().max() <= 512**-0.5


def test_padding_counts_for_nothing_and_smoothing_is_for_training() -> None:
    model = SPEC.build(SMALL.model_copy(update={"label_smoothing": 0.2})).eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, -100, -100])
    sums = model(images, targets)
    logits = model(images)[:2].double()
    plain = torch.nn.functional.cross_entropy(logits, targets[:2], reduction="sum")
    assert sums["loss"].item() == pytest.approx(plain.item(), rel=1e-5)
    assert sums["correct"].item() == (logits.argmax(1) == targets[:2]).sum().item()
    assert sums["correct_top5"].item() == 2  # three classes


# ------------------------------------------------------------------------------------------- weights to start from


def state_dict(config: ResNetConfig) -> dict[str, torch.Tensor]:
    return SPEC.build(config).state_dict()


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_of_a_file_are_taken_and_another_head_starts_afresh(tmp_path: Path, wrapped: bool) -> None:
    held = state_dict(SMALL.model_copy(update={"num_classes": 7}))
    content: Any = {"state_dict": {f"module.{name}": t for name, t in held.items()}, "epoch": 3} if wrapped else held
    torch.save(content, tmp_path / "seven.pth")
    read = starting_reader(SPEC, SMALL.model_copy(update={"weights_from": tmp_path / "seven.pth"}), 5)
    for name in ("conv1.weight", "layer4.1.bn2.bias"):
        taken = read(name, "parameter", 0, held[name].numel())
        assert taken is not None
        assert torch.equal(taken, held[name].flatten())
    head = read("fc.weight", "parameter", 0, 3 * 32)
    assert head is not None
    assert torch.equal(head, SPEC.init(SMALL, "fc.weight", 5).flatten())
    assert read("conv1.weight", "exp_avg", 0, 3) is None


def test_weights_of_another_model_or_of_no_model_are_refused(tmp_path: Path) -> None:
    torch.save(state_dict(SMALL.model_copy(update={"base_width": 8})), tmp_path / "wide.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for file, words in (("wide.pth", "of another model: conv1.weight"), ("text.pth", "cannot be read"),
                        ("absent.pth", "does not exist")):  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            starting_reader(SPEC, SMALL.model_copy(update={"weights_from": tmp_path / file}), 5)


def test_published_weights_are_for_the_published_width() -> None:
    with pytest.raises(ConfigError, match="base_width 4"):
        starting_reader(SPEC, SMALL.model_copy(update={"pretrained": True}), 5)
    with pytest.raises(ValueError, match="come from one place"):
        ResNetConfig(pretrained=True, weights_from=Path("x"))


def test_published_weights_are_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network's place takes a file: the same way in, the same hash in its name."""
    config = ResNetConfig(layers=18, num_classes=90, input_size=224, pretrained=True)
    published = state_dict(config.model_copy(update={"num_classes": 1000}))
    torch.save(published, tmp_path / "x")
    digest = hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()[:8]
    source = (tmp_path / "x").rename(tmp_path / f"resnet18-{digest}.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(pretrained.PUBLISHED, 18, source.as_uri())
    taken = starting_weights(config)
    assert taken is not None
    assert config.parameter_shapes().keys() - taken.keys() == {"fc.weight", "fc.bias"}
    assert torch.equal(taken["layer4.1.bn2.running_var"], published["layer4.1.bn2.running_var"])
    source.unlink()
    assert starting_weights(config) is not None  # what was fetched stays
    held = tmp_path / "hub" / "checkpoints" / source.name
    held.write_bytes(held.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=f"SHA-256 begins with {digest}, .* Remove it"):
        starting_weights(config)
    held.unlink()
    with pytest.raises(ConfigError, match=r"could not be fetched .* --model\.weights_from"):
        starting_weights(config)
    with pytest.raises(ConfigError, match="layers 18, base_width 32"):
        starting_weights(config.model_copy(update={"base_width": 32}))


def test_published_weights_of_another_shape_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = state_dict(ResNetConfig(layers=18, base_width=8, num_classes=5))
    torch.save(other, tmp_path / "x")
    digest = hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()[:8]
    source = (tmp_path / "x").rename(tmp_path / f"resnet18-{digest}.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(pretrained.PUBLISHED, 18, source.as_uri())
    with pytest.raises(CheckpointError, match=r"of another model: conv1.weight has the shape \(8, 3, 7, 7\) there and"):
        starting_weights(ResNetConfig(layers=18, num_classes=5, pretrained=True))


# -------------------------------------------------------------------------------------------------- configuration


def test_a_model_and_data_of_different_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"set data\.kind images"):
        load_config(None, None, [("model.layers", "18"), ("data.path", "x")])
    with pytest.raises(ConfigError, match=r"set data\.kind tokens"):
        load_config(None, None, [("model.n_layer", "2"), ("data.kind", "images"), ("data.path", "x")])


def test_a_stage_of_pictures_has_no_data_of_its_own() -> None:
    typed = [("stages", "[{until: 3, data: {path: words}}, {learning_rate: 1e-4}]")]
    with pytest.raises(ConfigError, match=r"stages have data of their own with data.kind images"):
        load_config(None, "animals90", typed)


def test_nested_settings_are_read_written_and_refused_by_their_full_name(tmp_path: Path) -> None:
    from zerofit.config.load import dump_resolved

    typed = [("data.augment.flip", "0.25"), ("data.image_size", "64"), ("data.eval_resize", "64")]
    resolved = load_config(None, "animals90", typed)
    (tmp_path / "c.yaml").write_text(dump_resolved(resolved))
    assert load_config(tmp_path / "c.yaml", None).config == resolved.config
    with pytest.raises(ConfigError, match=r"data\.augment\.flip was set to the number 7"):
        load_config(None, "animals90", [("data.augment.flip", "7")])


# ------------------------------------------------------------------------------------------------------- planning


@pytest.mark.parametrize("every", [0, 1, 4])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_traced_resnet_is_the_whole_at_any_batch(device: str, every: int) -> None:
    traced = trace_template(
        SPEC, SMALL, precision="fp32", recompute="full" if every else None, compiled=False, device=device, every=every
    )
    live = peak = saved = 0
    sizes: dict[Any, int] = {}
    for event in compose(traced, None, SMALL.depth, 0, 7):
        if isinstance(event, Alloc):
            assert event.key not in sizes
            sizes[event.key] = event.size_bytes
            live += event.size_bytes
        elif isinstance(event, Free):
            live -= sizes.pop(event.key)
        elif isinstance(event, Backward):
            saved = live
        peak = max(peak, live)
    whole = direct_events(SPEC, SMALL, precision="fp32", every=every, samples=7, device=device, compiled=False)
    assert (saved, peak) == (whole[0], max(whole[1:]))


def small_card(gib: float) -> Hardware:
    hardware = described_hardware(Description(gpu="mx450", gpu_memory=f"{gib}GiB"), probe(Path(), None))
    return hardware.model_copy(update={"has_deepspeed": False})


def test_recipes_are_ordered_by_what_they_save() -> None:
    config: Config = load_config(None, "animals90", [("model.base_width", "8"), ("model.input_size", "64")]).config
    found = recipes(config, small_card(0.7))
    largest = {recipe.name: recipe.micro_batch for recipe in found}
    assert 0 < largest["fp32"] < largest["fp16"] <= largest["fp16, activation_checkpointing full"]
    for recipe in found:
        assert recipe.candidate.fits
        assert recipe.tight_micro_batch >= recipe.micro_batch
        steps = recipe.accumulation_for(64)
        assert steps is not None
        assert 64 % steps == 0
        assert 64 // steps <= recipe.micro_batch


def test_recipes_say_what_fits_tightly() -> None:
    """Where PyTorch gives back what it holds in reserve, and no further."""
    config: Config = load_config(None, "animals90", [("model.input_size", "224")]).config
    card = small_card(1.9)
    for recipe in recipes(config, card):
        assert recipe.tight_micro_batch > recipe.micro_batch > 0
        fits = {
            samples: fits_within(
                recipe.candidate.plan.model_copy(update={"micro_batch": samples}),
                recipe.candidate.limit_bytes,
                constants(card),
            )
            for samples in (recipe.tight_micro_batch, recipe.tight_micro_batch + 1)
        }
        assert list(fits.values()) == [True, False]


# ------------------------------------------------------------------------------------------------ from end to end


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``pictures``, ``data`` and the run ``runs/small``, trained by the command line on two ranks."""
    root = tmp_path_factory.mktemp("classifier")
    write_folder(root / "pictures", CLASSES, each=12, size=(40, 36))
    config = {
        "model": {"kind": "resnet", "layers": 18, "base_width": 4},
        "data": {"kind": "images", "path": str(root / "data"), "prepare": [str(root / "pictures")], "cache_size": 32,
                 "image_size": 32, "eval_resize": 32, "val_fraction": 0.25},
        "optimizer": {"learning_rate": 5e-3}, "global_batch": 8, "max_steps": 8, "eval_interval": "epoch",
        "save_interval": "epoch", "keep_checkpoints": 9, "strategy": "ddp", "num_gpus": 2, "device": "cpu",
        "runs_dir": str(root / "runs"), "seed": 3,
    }  # fmt: skip
    (root / "small.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert run_verb(patch, "train", str(root / "small.json")) == 0
    return root


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["kind"] == kind]


def test_checking_memory_counts_the_steps_of_epochs(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**json.loads((trained / "small.json").read_text()), "strategy": "single", "num_gpus": 1}
    del config["max_steps"]
    (trained / "epochs.json").write_text(json.dumps({**config, "duration": "2ep"}))
    capsys.readouterr()
    assert run_verb(monkeypatch, "train", str(trained / "epochs.json"), "--check-memory") == 0
    assert " 7 steps" in capsys.readouterr().out  # 27 pictures an epoch, 8 a step


def test_a_run_leaves_accuracy_classes_history_and_checkpoints(trained: Path) -> None:
    run = trained / "runs" / "small"
    steps, evaluations = events_of(run, "step"), events_of(run, "eval")
    assert steps[-1]["images_per_second"] > 0
    assert steps[-1]["valid_images"] == 8
    assert "tokens_per_second" not in steps[-1]
    assert [e["step"] for e in evaluations] == [4, 7, 8]  # 27 pictures an epoch, 8 a step
    assert {"val_loss", "val_accuracy", "val_top5_accuracy", "train_accuracy"} < evaluations[-1].keys()
    best = max(evaluations, key=lambda e: e["val_accuracy"])
    assert (run / "checkpoints" / "best").read_text().strip() == f"step-{best['step']:08d}"
    rows = [line.split(",") for line in (run / "confusion_matrix.csv").read_text().splitlines()]
    assert rows[0][1:] == list(CLASSES)
    assert sum(int(cell) for row in rows[1:] for cell in row[1:]) == 9  # every validation picture, once over the ranks
    told = json.loads((run / "classes.json").read_text())
    correct = sum(row["recall"] * row["pictures"] for row in told)
    assert correct / 9 == pytest.approx(evaluations[-1]["val_accuracy"])
    entries = json.loads((run / "training_history.json").read_text())["history"]
    assert [(entry["step"], entry["epoch"]) for entry in entries] == [(4, 1), (7, 2), (8, 3)]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_another_strategy_goes_on_where_the_run_stopped(trained: Path) -> None:
    again = [sys.executable, "-m", "zerofit.cli.main", "train", str(trained / "small.json"), "--name", "single"]
    again += ["--strategy", "single", "--num_gpus", "1", "--micro_batch", "4"]
    for more in (["--max_steps", "4"], ["--resume", "latest"]):
        subprocess.run([*again, *more], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    ours, theirs = (events_of(trained / "runs" / name, "step") for name in ("single", "small"))
    assert [event["step"] for event in ours] == list(range(1, 9))
    # The same pictures, crops and micro-batches; the schedule of the first half was another.
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-4)
    assert events_of(trained / "runs" / "single", "resumed")[0]["probe_loss"] == pytest.approx(
        events_of(trained / "runs" / "single", "resumed")[0]["probe_loss_when_saved"]
    )


def test_classify_names_classes_with_probabilities(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = str(trained / "runs" / "small"), trained / "pictures" / "dog"
    capsys.readouterr()
    assert run_verb(monkeypatch, "classify", run, str(folder), str(trained / "small.json"), "--json") == 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["path"] for row in rows] == [str(path) for path in sorted(folder.iterdir())]
    assert all(sum(c["probability"] for c in row["classes"]) == pytest.approx(1, abs=1e-4) for row in rows)
    assert {c["class"] for c in rows[0]["classes"]} == set(CLASSES)
    assert "small.json cannot be read: not a picture" in printed.err
    assert run_verb(monkeypatch, "classify", run, str(trained / "small.json")) == 2
    assert run_verb(monkeypatch, "classify", run, str(trained / "absent.jpg")) == 2
    assert run_verb(monkeypatch, "generate", run) == 2
    assert "zerofit classify" in capsys.readouterr().err


def test_classify_prints_names_that_are_not_utf8(trained: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.jpg")
    Path(odd).write_bytes(next((trained / "pictures" / "dog").iterdir()).read_bytes())
    Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")
    command = [sys.executable, "-m", "zerofit.cli.main", "classify", str(trained / "runs" / "small"), "--json"]
    done = subprocess.run(
        [*command, odd, str(tmp_path / "bomb.png")],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert json.loads(done.stdout)["path"] == odd
    assert done.stderr.splitlines() == [
        f"{tmp_path / 'bomb.png'} cannot be read: decompression bomb: 12000 x 12000 pixels, above max_pixels 89,478,485"
    ]


def test_eval_repeats_the_last_evaluation(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained / "runs" / "small"
    capsys.readouterr()
    assert run_verb(monkeypatch, "eval", str(run), "--checkpoint", "final", "--json") == 0
    found, last = json.loads(capsys.readouterr().out), events_of(run, "eval")[-1]
    assert found["val_loss"] == pytest.approx(last["val_loss"], rel=1e-4)
    assert found["val_accuracy"] == last["val_accuracy"]


@pytest.mark.parametrize("to", ["pt", "safetensors", "onnx"])
def test_export_loads_elsewhere(
    trained: Path, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if to == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
    run, out = str(trained / "runs" / "small"), tmp_path / f"model.{to}"
    assert run_verb(monkeypatch, "export", run, str(out), "--to", to) == 0
    facts = json.loads((tmp_path / f"model.{to}.json").read_text())
    assert facts["classes"] == list(CLASSES)
    assert (facts["image_size"], facts["mean"][0]) == (32, 0.485)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert ("ResNet(ResNetConfig(layers=18, base_width=4, num_classes=3))" in printed.out) == (to != "onnx")
    if to == "pt":
        model = SPEC.build(SMALL)
        model.load_state_dict(torch.load(out))  # strict: names and buffers are all there
        assert model.get_buffer("bn1.running_mean").abs().max() > 0
    assert run_verb(monkeypatch, "export", run, str(out), "--to", to) == 2
    assert "exists already" in capsys.readouterr().err
    assert run_verb(monkeypatch, "export", run, str(tmp_path / "hf"), "--to", "huggingface") == 2


def test_other_data_is_refused(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(trained / "others", ("ape", "bee"), each=6)
    changed = ["--data.path", str(trained / "other-data"), "--data.prepare", str(trained / "others")]
    typed = ["train", str(trained / "small.json"), *changed]
    assert run_verb(monkeypatch, *typed, "--model.num_classes", "3", "--dry-run") == 2
    assert "num_classes 3" in capsys.readouterr().err
    assert run_verb(monkeypatch, *typed, "--resume", "latest", "--name", "small") == 2
    assert run_verb(monkeypatch, "eval", str(trained / "runs" / "small"), "--data", str(trained / "other-data")) == 2
    assert "they must be the same" in capsys.readouterr().err


def test_pictures_where_tokens_are_wanted_are_named(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = f"[{{until: 5, data: {{path: {trained / 'data'}}}}}, {{}}]"
    before = (trained / "data" / "meta.json").read_bytes()
    typed = ["train", "--preset", "shakespeare_char", "--data.path", str(trained / "words"), "--stages", stages]
    assert run_verb(monkeypatch, *typed, "--data.prepare", "[python-docs]", "--dry-run") == 2
    assert "holds prepared pictures, and tokens are wanted" in capsys.readouterr().err
    typed = ["train", "--preset", "shakespeare_char", "--data.path", str(trained / "data"), "--dry-run"]
    assert run_verb(monkeypatch, *typed) == 2
    assert (trained / "data" / "meta.json").read_bytes() == before


def test_a_presets_pictures_are_not_prepared_beside_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "mine", ("ape", "bee"), each=2)
    monkeypatch.chdir(tmp_path)
    assert run_verb(monkeypatch, "train", "--preset", "animals90", "--data.path", "mine", "--dry-run") == 2
    error = capsys.readouterr().err
    assert "`zerofit data prepare images mine --out mine-prepared`" in error
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["ape", "bee"]


def test_prepared_pictures_decide_what_the_preset_supposes(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["--preset", "animals90", "--data.path", str(trained / "data")]
    assert run_verb(monkeypatch, "train", *typed, "--data.cache_size", "32", "--dry-run") == 0
    assert f"model.num_classes {len(CLASSES)}, as" in " ".join(capsys.readouterr().out.split())
    assert run_verb(monkeypatch, "plan", *typed, "--json") == 0
    parameters = json.loads(capsys.readouterr().out)["model"]["parameters"]
    assert parameters == ResNetConfig(kind="resnet", layers=18, num_classes=len(CLASSES)).parameter_count()
    assert run_verb(monkeypatch, "train", *typed, "--data.prepare", "elsewhere", "--dry-run") == 2
    assert "data.prepare names elsewhere" in " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------------------------------ small parts


def test_the_best_accuracy_is_the_highest_and_the_best_loss_the_lowest() -> None:
    accuracy, loss = Best("val_accuracy", highest=True), Best("val_loss")
    assert accuracy.better(0.2, None)
    assert accuracy.better(0.3, 0.2)
    assert not accuracy.better(0.2, 0.2)
    assert loss.better(1.0, 1.5)
    assert not loss.better(float("nan"), None)


def test_recalls_of_a_confusion_matrix() -> None:
    first, second, third = recalls(["a", "b", "c"], [[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    assert (first["recall"], first["mostly_taken_for"]) == (0.75, "b")
    assert (second["recall"], second["mostly_taken_for"]) == (1.0, None)
    assert (third["recall"], third["pictures"]) == (None, 0)


def test_history_counts_what_came_last() -> None:
    def step(number: int, loss: float) -> dict[str, Any]:
        return {"kind": "step", "step": number, "loss": loss, "learning_rate": 0.1, "images_per_second": 10.0 * number}

    def evaluation(number: int, value: float) -> dict[str, Any]:
        return {"kind": "eval", "step": number, "epoch": 0, "val_accuracy": value, "eval_seconds": 1.0}

    events = [step(1, 3.0), step(2, 1.0), evaluation(2, 0.5), step(3, 1.0), evaluation(4, 0.4), evaluation(3, 0.6)]
    assert history(events)[0] == {
        "step": 2, "epoch": 1, "learning_rate": 0.1, "step_loss": 2.0, "images_per_second": 15.0, "val_accuracy": 0.5
    }  # fmt: skip
    assert [entry["step"] for entry in history(events)] == [2, 3]


def test_a_run_without_pictures_names_the_command(tmp_path: Path) -> None:
    from zerofit.tasks.image_classification import TASK

    config = load_config(None, "animals90", [("data.path", str(tmp_path / "none")), ("data.prepare", "[]")]).config
    with pytest.raises(DataError, match="zerofit data prepare images"):
        TASK.check(config)
