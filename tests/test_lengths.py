"""Schedules, how long a run is, early stopping, the average of the weights, and how steps are shown."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from test_end_to_end import last, losses, train, zerofit
from test_training import _config
from zerofit.config.durations import ENDLESS_STEPS, parse_duration
from zerofit.config.load import load_config
from zerofit.config.optimizers import OPTIMIZER_DEFAULTS, OptimizerConfig
from zerofit.config.schema import EarlyStoppingConfig
from zerofit.errors import ConfigError
from zerofit.training.events import read_events
from zerofit.training.loop import Trainer
from zerofit.training.progress import NanoGPTDisplay
from zerofit.training.rank import forget_another_metric
from zerofit.training.schedule import learning_rate
from zerofit.training.state import Progress

# ------------------------------------------------------------------------------------------------ schedules


def rates(*steps: int, **schedule: object) -> list[float]:
    return [learning_rate(_config(**schedule), step) for step in steps]


def test_each_schedule() -> None:
    """100 steps, peak 1."""
    assert rates(0, 50, 75, 100, 500, kind="linear", min_ratio=0.2) == pytest.approx([1.0, 0.6, 0.4, 0.2, 0.2])
    assert rates(0, 50, 100, kind="polynomial") == pytest.approx([1.0, 0.25, 0.0])
    assert rates(50, kind="polynomial", power=1) == rates(50, kind="linear")
    wsd = {"kind": "wsd", "warmup_steps": 10, "cooldown_fraction": 0.25, "min_learning_rate": 0.1}
    assert rates(4, 10, 75, 100, 900, **wsd) == pytest.approx([0.5, 1.0, 1.0, 0.1, 0.1])
    assert rates(81, **wsd)[0] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(6 / 25)))
    assert rates(79, 84, kind="wsd") == pytest.approx([1.0, 1 - math.sqrt(4 / 20)])
    assert rates(0, 15, 30, 65, 100, kind="one_cycle") == pytest.approx([0.04, 0.52, 1.0, 0.5, 0.0])
    assert rates(4, 9, 10, warmup_fraction=0.1) == rates(4, 9, 10, warmup_steps=10)
    assert rates(4, 10, decay_steps=50, warmup_fraction=0.1) == rates(4, 10, decay_steps=50, warmup_steps=5)


def test_one_cycle_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=101, pct_start=0.3, final_div_factor=1e9
    )
    seen = []
    for _ in range(101):
        seen.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = rates(*range(101), kind="one_cycle")
    # torch reaches the peak at step 0.3 * 101 - 1.
    assert ours[0] == pytest.approx(seen[0])
    assert max(abs(a - b) for a, b in zip(ours, seen, strict=True)) < 0.04


@pytest.mark.parametrize("kind", ["cosine", "linear", "polynomial", "wsd", "one_cycle", "constant"])
def test_the_learning_rate_is_between_zero_and_the_peak_and_ends_at_the_minimum(kind: str) -> None:
    found = rates(*range(300), kind=kind, warmup_steps=7, min_ratio=0.05)
    assert all(0 < rate <= 1 for rate in found)
    assert found[-1] == pytest.approx(1.0 if kind == "constant" else 0.05)


def refusal(tmp_path: Path, *overrides: tuple[str, str]) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(None, "shakespeare_char", overrides)
    return str(refused.value)


NVME = [("strategy", "zero3"), ("offload", "nvme"), ("nvme_path", "/x")]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([("schedule.power", "2")], "only polynomial has it"),
        ([("schedule.cooldown_fraction", "0.1")], "only wsd has it"),
        ([("schedule.min_ratio", "0.1"), ("min_learning_rate", "3e-4")], "0.0003: both say the same thing"),
        ([("schedule.warmup_fraction", "0.1"), ("warmup_steps", "100")], "warmup_steps 100: both say the same thing"),
        ([("duration", "3 moons")], "no length of a run"),
        ([("duration", "0ep")], "no length of a run"),
        ([("duration", "90min")], "nobody knows at which step"),
        ([("duration", "90min"), ("schedule.kind", "linear")], "nobody knows at which step"),
        ([("early_stopping.patience", "2"), ("eval_interval", "never")], "nothing would be watched"),
        ([("optimizer.momentum", "0.9")], "adamw has no momentum (it belongs to sgd, muon)"),
        ([("optimizer.kind", "sgd"), ("optimizer.beta2", "0.9")], "sgd has no beta2"),
        ([("optimizer.kind", "muon"), ("optimizer.state", "8bit")], "low-bit states are made for element-wise"),
        ([("optimizer.kind", "muon"), ("strategy", "zero2")], "muon updates whole matrices"),
        ([("optimizer.kind", "adafactor"), ("strategy", "zero3")], "whole matrices"),
        ([("optimizer.state", "8bit"), ("strategy", "zero2"), ("offload", "cpu")], "stay on the GPU"),
        ([("optimizer.master", "bf16"), ("precision", "fp32")], "it must be bf16"),
        (
            [("optimizer.kind", "lion"), ("strategy", "zero3"), ("offload", "nvme"), ("nvme_path", "/x")],
            "swaps AdamW's",
        ),
        ([("ema_decay", "0.9"), *NVME], "lie on the drive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_with_the_reason(tmp_path: Path, overrides: list[tuple[str, str]], said: str) -> None:
    assert said in refusal(tmp_path, *overrides)


def test_the_usual_values_of_each_kind() -> None:
    sgd = load_config(None, "shakespeare_char", [("optimizer.kind", "sgd")]).config.optimizer
    assert (sgd.beta2, sgd.momentum) == (None, 0.9)  # the preset's beta2 is AdamW's
    for kind, usual in OPTIMIZER_DEFAULTS.items():
        found = OptimizerConfig.model_validate({"kind": kind}).model_dump()
        assert {name: found[name] for name in usual} == usual
        assert found["momentum"] is None or kind in ("sgd", "muon")


# ------------------------------------------------------------------------------------------------ durations


@pytest.mark.parametrize(
    ("text", "steps"),
    [("1000", 1000), (7, 7), ("1e3", 1000), ("3ep", 38), ("0.5 epochs", 7), ("2e4tok", 125), ("1_600tok", 10),
     ("90min", ENDLESS_STEPS)],
)  # fmt: skip
def test_durations_become_steps(text: Any, steps: int) -> None:
    assert parse_duration(text).steps(epoch_samples=100, global_batch=8, sample_tokens=20) == steps


def test_times() -> None:
    assert [parse_duration(text).amount for text in ("45s", "90min", "2h")] == [45, 5400, 7200]


def test_epochs_by_the_average_of_an_8_bit_run(tmp_path: Path) -> None:
    """147 samples an epoch: two are 37 steps of 8. With what is kept of it: the average, and nanoGPT's lines."""
    (tmp_path / "play.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    low_bit = ("--optimizer.state", "8bit", "--ema-decay", "0.9", "--eval-interval", "20")
    done = train(tmp_path, "a", "--duration", "2ep", "--log-style", "nanogpt", *low_bit)
    assert "37 steps" in done.stdout
    assert "8-bit moments (running means carry rounding noise" in done.stdout
    assert sorted(losses(tmp_path, "a")) == list(range(1, 38))
    assert re.search(r"^iter 10: loss \d\.\d{4}, time \d+\.\d\dms, mfu -100\.00%$", done.stdout, re.M)
    assert re.search(r"^step 20: train loss \d\.\d{4}, val loss \d\.\d{4}$", done.stdout, re.M)
    found = {
        which: json.loads(zerofit(tmp_path, "eval", "runs/a", "--weights", which, "--json").stdout)["val_loss"]
        for which in ("trained", "ema")
    }
    assert found["ema"] != found["trained"]
    assert abs(found["ema"] - found["trained"]) < 0.5
    for which in ("trained", "ema"):
        zerofit(tmp_path, "export", "runs/a", f"{which}.safetensors", "--to", "safetensors", "--weights", which)
    trained, average = (load_file(tmp_path / f"{which}.safetensors") for which in ("trained", "ema"))
    assert trained.keys() == average.keys()
    assert not torch.equal(trained["wte.weight"], average["wte.weight"])
    assert "keeps no average" not in done.stderr
    refused = train(tmp_path, "b", "--load-checkpoint", "runs/a", "--optimizer.kind", "lion", code=2)
    assert "its optimizer states are adamw's" in refused.stderr
    refused = train(tmp_path, "a", "--resume", "--optimizer.kind", "lion", "--duration", "3ep", code=2)
    assert "trained with optimizer.kind adamw, and optimizer.kind lion was asked for" in refused.stderr
    (tmp_path / "both.yaml").write_text((tmp_path / "c.yaml").read_text() + "duration: 3ep\n")
    said = zerofit(tmp_path, "train", "both.yaml", "--name", "c", code=2).stderr
    assert "comes to 56 steps, and max_steps says 12" in said


def test_a_resumed_low_bit_run_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    low_bit = ("--optimizer.state", "8bit", "--optimizer.master", "bf16", "--bf16", "--ema-decay", "0.9")
    train(tmp_path, "whole", *low_bit)
    train(tmp_path, "parts", *low_bit, "--max-steps", "4", "--schedule.decay_steps", "12")
    train(tmp_path, "parts", *low_bit, "--resume")
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")


def test_the_clock_ends_a_run_on_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    timed = ("--duration", "1s", "--schedule.kind", "constant", "--num-gpus", "2", "--strategy", "ddp")
    done = train(tmp_path, "t", *timed, "--eval-interval", "100000")
    assert "for 1s" in done.stdout
    ending = last(tmp_path, "t", "ending")
    assert ending["reason"] == "the duration 1s is over"
    assert last(tmp_path, "t", "eval")["step"] == ending["step"]
    final = (tmp_path / "runs" / "t" / "checkpoints" / "final").read_text().strip()
    assert int(final.removeprefix("step-")) == ending["step"] == max(losses(tmp_path, "t"))
    again = train(tmp_path, "t", *timed, "--resume")
    assert "was over already" in again.stdout
    assert max(losses(tmp_path, "t")) == ending["step"]


# ------------------------------------------------------------------------------------------------ early stopping


def watch(
    values: list[float], thaws_after: int | None = None, evaluated: str = "val_loss", **settings: object
) -> tuple[Progress, int]:
    """Feed evaluations to the loop's rule; the progress afterwards, and where the run ends. With `thaws_after` the
    backbone is frozen in so many evaluations."""
    early = EarlyStoppingConfig(**{"patience": 2, **settings})  # type: ignore[arg-type]
    config = _config().model_copy(update={"early_stopping": early})
    loop: Any = object.__new__(Trainer)
    loop.config, loop.progress = config, Progress()
    loop.checkpoints = SimpleNamespace(last_step=100)
    loop.events = SimpleNamespace(write=lambda *_, **__: None)
    loop.display = SimpleNamespace(say=lambda _: None)
    loop.phases = None if thaws_after is None else SimpleNamespace()
    for number, value in enumerate(values, 1):
        if thaws_after is not None:
            loop.phases.frozen = number <= thaws_after
        loop._watch_metric(number, {evaluated: value})
        if loop.last_step < 100:
            break
    return loop.progress, loop.last_step


def test_patience() -> None:
    assert watch([3, 2, 2.5, 1.9, 2, 2])[1] == 6
    assert watch([3, 2, 1, 0.5])[1] == 100
    assert watch([3, 2.95, 2.9, 2.85], min_delta=0.2)[1] == 3
    assert watch([1, 2, 3, 2, 2.5], mode="max")[1] == 5
    assert watch([1, 1, 1], patience=3)[1] == 100
    assert watch([math.nan, 3, 2, 1, 0.5])[1] == 100
    assert watch([math.nan, math.nan])[1] == 2
    with pytest.raises(ConfigError, match="an evaluation of this run has val_loss"):
        watch([1.0], metric="val_accuracy")


def test_more_of_an_accuracy_is_better() -> None:
    rising, accuracy = [0.1, 0.2, 0.3, 0.4, 0.5], {"evaluated": "val_accuracy", "metric": "val_accuracy"}
    assert watch(rising, **accuracy)[1] == 100  # type: ignore[arg-type]
    assert watch(rising[::-1], **accuracy)[1] == 3  # type: ignore[arg-type]
    assert watch(rising, mode="min", **accuracy)[1] == 3  # type: ignore[arg-type]


def test_patience_begins_with_the_whole_network() -> None:
    assert watch([3, 3, 3, 3, 4, 3.5, 3, 2], thaws_after=4)[1] == 100
    assert watch([3, 3, 3, 3, 4, 5, 5], thaws_after=4)[1] == 7
    assert watch([3, 3, 3, 3])[1] == 3


def test_another_metric_is_watched_anew() -> None:
    """A best loss of 2.1 says nothing about accuracies, nor a patience that was half used up."""
    config = _config()
    early = config.early_stopping.model_dump()
    for changed, kept in (({}, True), ({"patience": 7}, True), ({"metric": "val_accuracy"}, False),
                          ({"mode": "max"}, False), ({"mode": "min"}, True)):  # fmt: skip
        progress = Progress(watched_best=2.1, evaluations_without_improvement=3)
        source: Any = SimpleNamespace(state={"config": {"early_stopping": early | changed}})
        forget_another_metric(progress, source, config)
        assert (progress.watched_best, progress.evaluations_without_improvement) == ((2.1, 3) if kept else (None, 0))


def test_a_run_that_ends_early_samples_once_at_its_end() -> None:
    loop: Any = object.__new__(Trainer)
    loop.config = _config().model_copy(update={"sample_interval": 5})
    loop.checkpoints = SimpleNamespace(last_step=10)
    assert [loop._sample_is_due(done) for done in (5, 10)] == [True, False]


def test_early_stopping_is_the_same_after_a_resume(tmp_path: Path) -> None:
    """An improvement of 10 never comes after the first evaluation: patience 2 ends the run at the third."""
    (tmp_path / "play.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    early = ("--early-stopping.patience", "2", "--min-delta", "10", "--eval-interval", "2", "--strategy", "ddp")
    train(tmp_path, "e", *early, "--num-gpus", "2", "--max-steps", "4")
    done = train(tmp_path, "e", *early, "--num-gpus", "2", "--resume")
    assert "val_loss has not improved in 2 evaluations" in done.stdout
    assert [e["step"] for e in read_events(tmp_path / "runs" / "e" / "events.jsonl") if e["kind"] == "ending"] == [6]
    assert (tmp_path / "runs" / "e" / "checkpoints" / "final").read_text().strip() == "step-00000006"
    assert "early stopping had ended this run" in train(tmp_path, "e", *early, "--num-gpus", "2", "--resume").stdout
    # A new run from its checkpoint has a patience of its own: 6 + 2 x 3 steps.
    again = train(tmp_path, "f", *early, "--num-gpus", "2", "--load-checkpoint", str(tmp_path / "runs" / "e"))
    assert "early stopping had ended" not in again.stdout
    assert max(losses(tmp_path, "f")) == 12
    assert max(losses(tmp_path, "e")) == 6


def test_nanogpts_lines() -> None:
    with (console := Console(width=120)).capture() as captured:
        display = NanoGPTDisplay(console, 500, 10)
        for step in range(1, 13):
            display.step(step, {"loss": 3.21, "step_seconds": 0.135, "mfu": 0.38})
        display.evaluation(12, {"train_loss": 2.0, "val_loss": 2.25, "val_perplexity": 9.0}, True)
    assert captured.get().splitlines() == [
        "iter 0: loss 3.2100, time 135.00ms, mfu 38.00%",
        "iter 10: loss 3.2100, time 135.00ms, mfu 38.00%",
        "step 12: train loss 2.0000, val loss 2.2500",
    ]
