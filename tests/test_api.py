"""The three functions that users call from Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zerofit
from zerofit.errors import CheckpointError, ConfigError

SETTINGS = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8},
    "data": {"path": Path("data"), "prepare": ("play.txt",)},
    "optimizer__learning_rate": 1e-2,
    "global_batch": 4,
    "max_steps": 4,
    "eval_interval": 2,
    "num_gpus": 1,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "play.txt").write_text("to be or not to be, that is the question\n" * 40)
    return tmp_path


def test_train_then_load_the_model() -> None:
    run = zerofit.train(name="a", **SETTINGS)
    assert run == Path("runs/a")
    model = zerofit.load_model(run)
    assert not model.training
    logits = model(torch.tensor([[1, 2, 3]]))
    assert logits.shape == (1, 3, len(set((Path("play.txt")).read_text())))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    earlier = zerofit.load_model(run, checkpoint="2")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), earlier.parameters(), strict=True))
    by_step = zerofit.load_model(run / "checkpoints" / "step-00000004")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_step.parameters(), strict=True))
    zerofit.train(name="a", resume="latest", **{**SETTINGS, "max_steps": 6})
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-00000006"


def test_plan_tells_what_would_run() -> None:
    zerofit.train(name="a", **SETTINGS)
    choice = zerofit.plan(**SETTINGS)
    assert choice.plan.strategy == "single"
    assert choice.plan.global_batch == 4


def test_mistakes_are_exceptions() -> None:
    with pytest.raises(ConfigError, match="n_layerz"):
        zerofit.plan(model={"n_layerz": 3})
    with pytest.raises(CheckpointError, match="nothing at"):
        zerofit.load_model("runs/none")
    with pytest.raises(AttributeError, match="fly"):
        zerofit.fly  # noqa: B018
