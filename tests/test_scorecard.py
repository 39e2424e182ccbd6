"""Predicted beside measured: at the end of a run, and with ``train --check-memory``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import zerofit.training.scorecard
from zerofit.config.models import GPT2Config
from zerofit.launch.trials import Trial, run_trial
from zerofit.planning.ledger import Row
from zerofit.planning.plan import Plan, Prediction
from zerofit.training.events import EventLog, read_events
from zerofit.training.progress import SilentDisplay
from zerofit.training.scorecard import Scorecard
from zerofit.types import World

TINY = """
model: {n_layer: 2, n_head: 2, n_embd: 16, block_size: 8, vocab_size: 60}
data: {path: tokens}
global_batch: 4
"""
MODEL = GPT2Config(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=60)


def a_plan(device: str) -> Plan:
    prediction = Prediction(
        gpu_peak_bytes=1100, gpu_reserved_bytes=1200, gpu_driver_bytes=1300, gpu_items={"a": 1100},
        peak_phase="backward", memory_basis="traced", host_peak_bytes=0, step_seconds=0.2,
    )  # fmt: skip
    return Plan(model=MODEL, parameters=MODEL.parameter_count(), strategy="single", device=device, world_size=1,
                micro_batch=4, accumulation_steps=1, precision="fp32", prediction=prediction)  # fmt: skip


def test_a_run_on_a_gpu_is_scored_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Row] = []
    monkeypatch.setattr(zerofit.training.scorecard, "append_row", kept.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    properties = SimpleNamespace(total_memory=150 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    said: list[str] = []
    display = SilentDisplay()
    monkeypatch.setattr(display, "say", said.append)
    scorecard = Scorecard(a_plan("cuda"), World(0, 1, 0, torch.device("cuda", 0)))
    for seconds in (9.0, 3.0, 1.0, 0.25, 0.26, 0.24):
        scorecard.step(seconds)
    events = EventLog(tmp_path / "events.jsonl", enabled=True)
    peaks = {"gpu_peak_bytes": 1000, "gpu_reserved_bytes": 1150, "host_peak_bytes": 5}
    scorecard.finish(peaks, events, display)
    events.close()
    (event,) = read_events(tmp_path / "events.jsonl")
    assert event["kind"] == "scorecard"
    assert event["measured_step_seconds"] == 0.25  # without the warm-up
    assert event["gpu_peak_error"] == pytest.approx(0.1)
    assert event["step_error"] == pytest.approx(-0.2)
    assert (event["predicted_gpu_reserved_bytes"], event["measured_gpu_reserved_bytes"]) == (1200, 1150)
    assert kept[0].gpu == "h200"
    assert any("+10.0%" in line for line in said)


def test_a_ledger_that_cannot_be_written_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(row: Row) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(zerofit.training.scorecard, "append_row", full)
    monkeypatch.setattr(Scorecard, "_gpu", lambda self: "h200")
    scorecard = Scorecard(a_plan("cuda"), World(0, 1, 0, torch.device("cuda", 0)))
    scorecard.step(1.0)
    events = EventLog(tmp_path / "events.jsonl", enabled=True)
    peaks = {"gpu_peak_bytes": 1000, "gpu_reserved_bytes": 1150, "host_peak_bytes": 5}
    scorecard.finish(peaks, events, SilentDisplay())
    events.close()
    assert [event["kind"] for event in read_events(tmp_path / "events.jsonl")] == ["scorecard", "warning"]


def check_memory(folder: Path, *arguments: str) -> dict[str, Any]:
    (folder / "tiny.yaml").write_text(TINY, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "zerofit.cli.main",
        "train",
        "tiny.yaml",
        "--device",
        "cpu",
        "--check-memory",
        "--json",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=120, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert not (folder / "runs").exists()
    return found


@pytest.mark.parametrize("strategy", ["single", "zero2"])
def test_a_few_real_steps_need_the_states_that_were_predicted(tmp_path: Path, strategy: str) -> None:
    if strategy == "zero2":
        pytest.importorskip("deepspeed", exc_type=ImportError)
    found = check_memory(tmp_path, "--strategy", strategy, *(["--num-gpus", "2"] if strategy == "zero2" else []))
    states = {name: row for name, row in found.items() if name.startswith("states: ")}
    assert states
    assert all(row["predicted"] == row["measured"] for row in states.values())
    assert found["step_seconds"]["measured"] > 0


def test_the_rates_are_measured_in_processes_of_their_own() -> None:
    """Without a GPU the trial measures the CPU in its place: the same code, two ranks and gloo."""
    outcome = run_trial(Trial("zerofit.launch.rates_trial", ["0"], 2, 100.0, {"CUDA_VISIBLE_DEVICES": ""}))
    assert outcome.status == "ok", outcome.log_tail
    assert outcome.result is not None
    for name in ("matrix_flops", "memory_bandwidth", "all_reduce", "all_gather", "adam_bytes_a_node"):
        assert outcome.result[name] > 1e6
