"""The command line from text to trained model, on the CPU: what a user types, what comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from zerofit.training.events import read_events

CONFIG = """
name: {name}
model: {{n_layer: 2, n_head: 2, n_embd: 32, block_size: 16}}
data: {{path: data, prepare: [play.txt]}}
optimizer: {{learning_rate: 1e-2, grad_clip: 0.5}}
schedule: {{warmup_steps: 2}}
global_batch: 8
max_steps: 12
eval_interval: 4
eval_batches: 2
sample_tokens: 5
sample_prompt: t
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "play.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return tmp_path


def zerofit(work: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line in `work`; fails with its output when the exit code is another one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "zerofit.cli.main", *arguments]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def train(work: Path, name: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    (work / "c.yaml").write_text(CONFIG.format(name=name))
    return zerofit(work, "train", "c.yaml", *arguments, code=code)


def losses(work: Path, name: str) -> dict[int, float]:
    """Step -> training loss; a step that was trained twice must not differ."""
    found: dict[int, float] = {}
    for event in read_events(work / "runs" / name / "events.jsonl"):
        if event["kind"] == "step":
            found[event["step"]] = event["loss"]
    return found


def last(work: Path, name: str, kind: str) -> dict[str, Any]:
    return [e for e in read_events(work / "runs" / name / "events.jsonl") if e["kind"] == kind][-1]


def test_train_eval_generate(work: Path) -> None:
    done = train(work, "a")
    for said in ("Plan for gpt2", "global batch 8 = micro-batch 8", "val_loss", "Sample:", "Run folder: runs/a"):
        assert said in done.stdout
    found = losses(work, "a")
    assert sorted(found) == list(range(1, 13))
    assert found[12] < found[1] - 0.5
    step, evaluated = last(work, "a", "step"), last(work, "a", "eval")
    for key in ("learning_rate", "grad_norm", "step_seconds", "tokens_per_second", "host_peak_bytes", "loss_scale"):
        assert key in step
    assert step["valid_tokens"] == 8 * 16
    assert evaluated["eval_seconds"] > 0
    run = work / "runs" / "a"
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "plan.json", "environment.json", "events.jsonl"}
    assert (run / "checkpoints" / "final").read_text().strip() == "step-00000012"

    again = json.loads(zerofit(work, "eval", "runs/a", "--checkpoint", "final", "--json").stdout)
    assert again["step"] == 12
    assert again["val_loss"] == pytest.approx(evaluated["val_loss"], abs=0.15)  # all of the split, not 16 samples
    texts = [
        json.loads(
            zerofit(work, "generate", "runs/a", "--prompt", "the", "--tokens", "9", "--seed", s, "--json").stdout
        )
        for s in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0]["texts"][0].startswith("the")
    assert len(texts[0]["texts"][0]) == 12


@pytest.mark.parametrize(
    "how",
    [
        ("--strategy", "single"),
        ("--strategy", "ddp", "--num-gpus", "2"),
        ("--strategy", "zero1", "--num-gpus", "2"),
        ("--strategy", "zero2", "--num-gpus", "2", "--offload", "cpu"),
        ("--strategy", "zero3", "--num-gpus", "2"),
        ("--strategy", "fsdp2", "--num-gpus", "2"),
    ],
    ids=lambda how: how[1],
)
def test_stopping_and_resuming_changes_no_bit(work: Path, how: tuple[str, ...]) -> None:
    """12 steps equal 8 steps, a new process, and 4 steps, in fp32 at the same number of ranks."""
    train(work, "whole", *how)
    train(work, "parts", *how, "--max-steps", "8", "--schedule.decay_steps", "12")
    train(work, "parts", *how, "--resume")
    assert losses(work, "parts") == losses(work, "whole")
    assert last(work, "parts", "eval")["val_loss"] == last(work, "whole", "eval")["val_loss"]


def test_a_run_goes_on_under_another_strategy_and_number_of_ranks(work: Path) -> None:
    train(work, "whole", "--strategy", "single")
    train(work, "moved", "--strategy", "zero3", "--num-gpus", "2", "--max-steps", "4", "--schedule.decay_steps", "12")
    train(
        work,
        "moved",
        "--strategy",
        "ddp",
        "--num-gpus",
        "4",
        "--max-steps",
        "8",
        "--schedule.decay_steps",
        "12",
        "--resume",
    )
    train(work, "moved", "--strategy", "single", "--resume")
    whole, moved = losses(work, "whole"), losses(work, "moved")
    assert moved.keys() == whole.keys()
    assert all(moved[step] == pytest.approx(whole[step], abs=1e-5) for step in whole)


def test_evaluation_leaves_training_untouched(work: Path) -> None:
    train(work, "with", "--model.dropout", "0.2", "--eval-interval", "1")
    train(work, "without", "--model.dropout", "0.2", "--eval-interval", "never")
    assert losses(work, "with") == losses(work, "without")
    assert not [e for e in read_events(work / "runs" / "without" / "events.jsonl") if e["kind"] == "eval"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model.n_layers", "3"), "n_layer"),
        (("--max-steps", "many"), "max_steps"),
        (("--global-batch", "7", "--num-gpus", "2"), "multiple of 2"),
        (("--micro-batch", "3"), "no whole solution"),
        (("--preset", "gpt5"), "gpt5"),
        (("--data.path", "nowhere", "--data.prepare", "[]"), "nowhere"),
        (("--data.path", "elsewhere", "--data.prepare", "missing.txt"), "missing.txt"),
        (("--model.vocab_size", "5"), "beyond model.vocab_size 5"),
        (("--block-size", "2000"), "2000"),
        (("--strategy", "ddp", "--offload", "cpu"), "zero2"),
        (("--strategy", "zero2", "--offload", "nvme"), "zero3"),
        (("--device", "cuda"), "NVIDIA"),
        (("--resume",), "no run"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_bad_requests_end_with_2_and_one_paragraph(work: Path, arguments: tuple[str, ...], said: str) -> None:
    done = train(work, "bad", *arguments, code=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (work / "runs" / "bad").exists()


@pytest.mark.parametrize(
    ("path", "said", "remedy"),
    [
        ("new", "data.path new does not exist", "zerofit data prepare TEXT --tokenizer char --out new`"),
        ("empty", "data.path empty is empty", "zerofit data prepare TEXT --tokenizer char --out empty`"),
        ("texts", "holds a text file that is not", "zerofit data prepare texts --tokenizer char --out texts-prepared`"),
        ("play.txt", "play.txt is a file", "zerofit data prepare play.txt --tokenizer char --out play-prepared`"),
    ],
)
def test_a_presets_corpus_is_not_put_into_a_folder_of_ones_own(work: Path, path: str, said: str, remedy: str) -> None:
    (work / "empty").mkdir()
    (work / "texts").mkdir()
    (work / "texts" / "mine.txt").write_text("abc " * 500)
    before = sorted(work.rglob("*"))
    typed = ["train", "--preset", "shakespeare_char", "--data.path", path, "--dry-run"]
    error = zerofit(work, *typed, code=2).stderr
    assert said in error
    assert remedy in error
    assert "--data.prepare shakespeare" in error
    assert error.count("\n") == 1
    assert sorted(work.rglob("*")) == before


def test_ones_own_prepared_text_and_a_corpus_that_was_asked_for_are_used(work: Path) -> None:
    (work / "texts").mkdir()
    (work / "texts" / "mine.txt").write_text("the quick brown fox " * 400)
    zerofit(work, "data", "prepare", "texts", "--tokenizer", "char", "--out", "texts-prepared")
    own = ["train", "--preset", "shakespeare_char", "--data.path", "texts-prepared", "--dry-run"]
    assert "Preparing" not in zerofit(work, *own).stdout
    (work / "mine.yaml").write_text("data: {path: elsewhere}")
    asked = ["train", "mine.yaml", "--preset", "shakespeare_char", "--data.prepare", "play.txt", "--dry-run"]
    assert "elsewhere: " in zerofit(work, *asked).stdout


def test_a_taken_name_is_refused_and_resume_of_another_batch_too(work: Path) -> None:
    train(work, "a")
    assert "--resume" in train(work, "a", code=2).stderr
    assert "global_batch 8" in train(work, "a", "--resume", "--global-batch", "4", code=2).stderr
    assert "another model" in train(work, "a", "--resume", "--n-layer", "1", code=2).stderr


def test_a_dry_run_writes_no_run_folder(work: Path) -> None:
    assert "Dry run" in train(work, "a", "--dry-run").stdout
    assert not (work / "runs").exists()


def test_plan_for_programs(work: Path) -> None:
    (work / "c.yaml").write_text(CONFIG.format(name="a"))
    zerofit(work, "data", "prepare", "play.txt", "--out", "data")
    found = json.loads(zerofit(work, "plan", "c.yaml", "--num-gpus", "2", "--json").stdout)
    assert found["chosen"]["strategy"] == "ddp"
    assert found["chosen"]["accumulation_steps"] * found["chosen"]["micro_batch"] * 2 == 8
    assert {c["strategy"] for c in found["candidates"]} >= {"ddp", "zero1", "zero2", "zero3"}


def test_data_show(work: Path) -> None:
    zerofit(work, "data", "prepare", "play.txt", "--out", "data")
    found = json.loads(zerofit(work, "data", "show", "data", "--samples", "2", "--tokens", "10", "--json").stdout)
    assert len(found["samples"]) == 2
    assert all(
        len(text) == 11 and text in "the quick brown fox jumps over the lazy dog\n" * 3 for text in found["texts"]
    )
    assert "sample 1" in zerofit(work, "data", "show", "data").stdout


def test_sigterm_saves_and_exits_4_and_the_run_goes_on(work: Path) -> None:
    (work / "c.yaml").write_text(CONFIG.format(name="a"))
    command = [sys.executable, "-m", "zerofit.cli.main", "train", "c.yaml", "--num-gpus", "2", "--max-steps", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        events = work / "runs" / "a" / "events.jsonl"
        deadline = time.monotonic() + 90
        while not (events.exists() and events.read_text().count('"step"') > 5):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stdout.read()  # type: ignore[union-attr]
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 4
    stopped = last(work, "a", "interrupted")["step"]
    train(work, "a", "--num-gpus", "2", "--max-steps", str(stopped + 3), "--resume")
    assert sorted(losses(work, "a")) == list(range(1, stopped + 4))


def test_torchrun_starts_workers_without_us(work: Path) -> None:
    (work / "c.yaml").write_text(CONFIG.format(name="a"))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "zerofit.training.worker", "c.yaml", "--strategy", "ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=work, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(losses(work, "a")) == list(range(1, 13))
    train(work, "b", "--strategy", "ddp", "--num-gpus", "2")
    assert losses(work, "b") == losses(work, "a")
