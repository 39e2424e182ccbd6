"""Going on, from the command line: what may change, what must not, and what is said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from foreign_writers import save_nanogpt
from test_checkpoint import flip
from test_end_to_end import CONFIG, last, losses, train, zerofit
from zerofit.checkpoint.source import open_source
from zerofit.config.image_models import ResNetConfig
from zerofit.config.keys import keys
from zerofit.config.models import GPT2Config
from zerofit.errors import CheckpointError
from zerofit.training.events import read_events
from zerofit.training.resume import MAY_CHANGE, may_change


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of 8 steps, checkpoints at 4 and 8."""
    work = tmp_path_factory.mktemp("resume")
    (work / "play.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    train(work, "a", "--max-steps", "8", "--schedule.decay_steps", "12")
    return work


@pytest.fixture
def work(trained: Path, tmp_path: Path) -> Path:
    """A copy of its own."""
    shutil.copytree(trained, tmp_path / "work")
    return tmp_path / "work"


def test_the_list_of_what_may_change_names_real_keys() -> None:
    for pattern in MAY_CHANGE:
        inside = any(pattern.startswith(f"{key}.") for key in keys())  # of a value that is a mapping of names
        assert inside or any(may_change(key) and (key == pattern or pattern.endswith("*")) for key in keys()), pattern
    fixed = {key for key in keys() if not may_change(key)}
    assert fixed >= {"seed", "model.n_layer", "model.dropout", "optimizer.weight_decay", "optimizer.beta2"}
    assert not fixed & {"max_steps", "optimizer.learning_rate", "strategy", "micro_batch", "precision", "num_gpus"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--weight-decay", "0.3"), ("optimizer.weight_decay 0.1", "optimizer.weight_decay 0.3")),
        (("--grad-clip", "0"), ("optimizer.grad_clip 0.5", "optimizer.grad_clip 0.0")),
        (("--seed", "5"), ("seed 1337", "seed 5")),
        (("--model.dropout", "0.1"), ("model.dropout 0.0", "model.dropout 0.1")),
        (("--global-batch", "4"), ("global_batch 8", "global_batch 4")),
        (("--resume", "best", "--load-checkpoint", "runs/a"), ("--resume and --load-checkpoint",)),
        (("--weights-only",), ("without --load-checkpoint",)),
        (("--resume", "99"), ("No checkpoint '99'", "step-00000004, step-00000008")),
        (("--resume", "nonsense"), ("No checkpoint 'nonsense'",)),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, tuple) else None,
)
def test_what_must_not_change_is_refused_with_both_values(
    trained: Path, arguments: tuple[str, ...], said: tuple[str, ...]
) -> None:
    before = sorted(path.name for path in (trained / "runs" / "a").iterdir())
    resume = () if "--resume" in arguments else ("--resume",)
    done = train(trained, "a", *resume, *arguments, code=2)
    assert all(text in done.stderr for text in said), done.stderr
    assert sorted(path.name for path in (trained / "runs" / "a").iterdir()) == before


def test_other_data_is_refused(work: Path) -> None:
    shutil.rmtree(work / "data")
    (work / "play.txt").write_text("the quick brown fox jumps over the lazy god\n" * 61)
    assert "trained on other data" in train(work, "a", "--resume", code=2).stderr


def test_what_may_change_does(work: Path) -> None:
    train(
        work, "a", "--resume", "--learning-rate", "1e-3", "--max-steps", "9", "--micro-batch", "2", "--keep-best", "1"
    )
    assert sorted(losses(work, "a")) == list(range(1, 10))
    assert last(work, "a", "step")["learning_rate"] < 1e-3


def test_the_probe_has_the_same_loss_after_a_resume(work: Path) -> None:
    done = train(work, "a", "--resume", "--strategy", "zero2", "--num-gpus", "2")
    resumed = last(work, "a", "resumed")
    assert resumed["probe_loss"] == pytest.approx(resumed["probe_loss_when_saved"], rel=1e-6)
    assert resumed["saved_under"] == {"strategy": "single", "world_size": 1, "precision": "fp32"}
    assert "loss of the stored probe" in done.stdout


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(work: Path) -> None:
    whole = work / "runs" / "whole"
    shutil.copytree(work / "runs" / "a", whole)
    train(work, "whole", "--resume")
    flip(next((work / "runs" / "a" / "checkpoints" / "step-00000008").glob("rank-*")))
    done = train(work, "a", "--resume")
    assert "passed over a damaged checkpoint, step-00000008: rank-00000-0000.safetensors was changed" in done.stdout
    assert last(work, "a", "resumed")["step"] == 4
    assert losses(work, "a") == losses(work, "whole")


def test_without_a_whole_checkpoint_nothing_starts(work: Path) -> None:
    for folder in (work / "runs" / "a" / "checkpoints").glob("step-*"):
        (folder / "manifest.json").unlink()
    events = read_events(work / "runs" / "a" / "events.jsonl")
    assert "no whole checkpoint" in train(work, "a", "--resume", code=2).stderr
    assert read_events(work / "runs" / "a" / "events.jsonl") == events


def test_leftovers_of_an_interrupted_save_go(work: Path) -> None:
    torn = work / "runs" / "a" / "checkpoints" / ".step-00000012.1.partial"
    torn.mkdir()
    assert "an interrupted save had left" in train(work, "a", "--resume").stdout
    assert not torn.exists()


def test_a_finished_run_says_so(work: Path) -> None:
    assert "Step 8 of 8 is done" in train(work, "a", "--resume", "--max-steps", "8").stdout


def test_a_new_run_from_a_checkpoint(work: Path) -> None:
    done = train(work, "b", "--load-checkpoint", "runs/a")
    assert "step 8, optimizer included" in done.stdout
    assert sorted(losses(work, "b")) == [9, 10, 11, 12]
    train(work, "a", "--resume")
    assert losses(work, "b") == {step: loss for step, loss in losses(work, "a").items() if step > 8}
    train(work, "c", "--load-checkpoint", "runs/a/checkpoints/step-00000008", "--weights-only", "--weight-decay", "0.2")
    fresh = losses(work, "c")
    assert sorted(fresh) == list(range(1, 13))
    assert fresh[1] < losses(work, "a")[1] - 0.5  # trained weights, at the first step of a new schedule


def test_a_new_run_from_nanogpt(work: Path) -> None:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=28)
    expected = save_nanogpt(work / "ckpt.pt", config)
    done = train(work, "n", "--load-checkpoint", "ckpt.pt")
    steps = sorted(losses(work, "n"))
    assert steps[0] > 1, done.stdout  # its step was carried over
    assert expected
    assert "another model" in train(work, "m", "--load-checkpoint", "runs/n", "--n-layer", "1", code=2).stderr
    assert "nothing at" in train(work, "m", "--load-checkpoint", "nowhere.pt", code=2).stderr
    torch.save({"x": os.system}, work / "hostile.pt")
    hostile = train(work, "m", "--load-checkpoint", "hostile.pt", code=2)
    assert "system" in hostile.stderr
    assert not (work / "runs" / "m").exists()


MAMBA = "model: {kind: mamba, n_layers: 1, d_model: 16, max_seq_length: 16}"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--load-checkpoint", "runs/a"),
        ("--load-checkpoint", "runs/a", "--weights-only"),
        ("--load-checkpoint", "ckpt.pt"),
        ("--resume", "--name", "a"),
        ("--resume", "runs/a/checkpoints/step-00000008"),
    ],
    ids=" ".join,
)
def test_another_kind_of_model_is_refused_before_anything_is_prepared(work: Path, arguments: tuple[str, ...]) -> None:
    save_nanogpt(work / "ckpt.pt", GPT2Config(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=28))
    (work / "m.yaml").write_text(f"{MAMBA}\ndata: {{path: fresh, prepare: [play.txt]}}\nmax_steps: 2")
    done = zerofit(work, "train", "m.yaml", *arguments, code=2)
    assert "holds a model of kind gpt2, and model.kind is mamba (m.yaml:1)" in done.stderr
    assert done.stdout == ""
    assert not (work / "fresh").exists()
    assert [path.name for path in (work / "runs").iterdir()] == ["a"]


def test_another_programs_weights_for_a_classifier_are_refused_in_words(work: Path) -> None:
    torch.save({"fc.weight": torch.ones(2, 3)}, work / "odd.pt")
    model = ResNetConfig(kind="resnet", layers=18, num_classes=2)
    with pytest.raises(CheckpointError, match=r"model\.weights_from"):
        open_source(work / "odd.pt", model)


def test_going_back_behind_a_tag_is_refused(work: Path) -> None:
    zerofit(work, "checkpoint", "tag", "runs/a", "paper")
    said = train(work, "a", "--resume", "4", code=2).stderr
    assert "The tag paper names step-00000008" in said
    zerofit(work, "checkpoint", "tag", "runs/a", "paper", "--remove")
    train(work, "a", "--resume", "4")


def test_resuming_by_path(work: Path) -> None:
    (work / "c.yaml").write_text(CONFIG.replace("name: {name}\n", "").format())
    zerofit(work, "train", "c.yaml", "--resume", "runs/a/checkpoints/step-00000008", "--max-steps", "9")
    assert max(losses(work, "a")) == 9
    shutil.copytree(work / "runs" / "a", work / "runs" / "z")
    assert "another run" in train(work, "z", "--resume", "runs/a/checkpoints/step-00000008", code=2).stderr


def test_wrong_places_are_refused(work: Path) -> None:
    for place in ("runs/typo", "checkpoints"):
        done = subprocess.run(
            [sys.executable, "-m", "zerofit.cli.main", "checkpoint", "prune", place, "--keep", "1"],
            cwd=work / "runs" / "a", capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode == 2) is (place == "runs/typo")
    step = "runs/a/checkpoints/step-00000008"
    assert (
        "no run with several" in zerofit(work, "export", step, "o.pt", "--to", "pt", "--checkpoint", "4", code=2).stderr
    )
    assert (
        "leaves nothing to train" in train(work, "b", "--load-checkpoint", "runs/a", "--max-steps", "8", code=2).stderr
    )
    assert "no name of a folder" in train(work, "../out", code=2).stderr


def test_one_command_at_a_time(work: Path) -> None:
    (work / "c.yaml").write_text(CONFIG.format(name="a"))
    command = [sys.executable, "-m", "zerofit.cli.main", "train", "c.yaml", "--resume", "--max-steps", "1000000"]
    with subprocess.Popen(
        command, cwd=work, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as p:
        deadline = time.monotonic() + 60
        while len(losses(work, "a")) < 10:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        done = train(work, "a", "--resume", code=2)
        assert "is being trained by process" in done.stderr
        assert "is being trained by" in zerofit(work, "checkpoint", "prune", "runs/a", code=2).stderr
        p.send_signal(signal.SIGTERM)
        assert p.wait(timeout=30) == 4
    train(work, "a", "--resume", "--max-steps", str(max(losses(work, "a")) + 1))


def test_the_checkpoint_verb(work: Path) -> None:
    rows = json.loads(zerofit(work, "checkpoint", "list", "runs/a", "--json").stdout)
    assert [row["step"] for row in rows] == [4, 8]
    assert rows[1]["strategy"] == "single"
    assert rows[1]["damage"] is None
    assert {"latest", "final"} <= set(rows[1]["names"])
    assert "whole" in zerofit(work, "checkpoint", "list", "runs/a").stdout
    assert "step-00000004: whole" in zerofit(work, "checkpoint", "verify", "runs/a").stdout
    assert "names step 4" in zerofit(work, "checkpoint", "tag", "runs/a", "paper", "--step", "4").stdout
    assert "nothing" in zerofit(work, "checkpoint", "prune", "runs/a", "--keep", "1").stdout
    zerofit(work, "checkpoint", "tag", "runs/a", "paper", "--remove")
    flip(next((work / "runs/a/checkpoints/step-00000008").glob("rank-*")))
    assert "was changed" in zerofit(work, "checkpoint", "verify", "runs/a", code=2).stdout
    (work / "runs/a/checkpoints/step-00000004/probe.safetensors").unlink()
    assert "is missing" in zerofit(work, "checkpoint", "list", "runs/a", "--json").stdout
    gone = json.loads(zerofit(work, "checkpoint", "prune", "runs/a", "--damaged", "--json").stdout)
    assert gone["removed"] == ["step-00000004"]
    assert "no run folder" in zerofit(work, "checkpoint", "list", "nowhere", code=2).stderr
