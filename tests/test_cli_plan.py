"""``zerofit plan``: what it says, in which form, and what it refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

import zerofit.cli.calibrate
from zerofit.cli.calibrate import calibration_from
from zerofit.cli.plan import run_plan
from zerofit.config.load import load_config
from zerofit.errors import ConfigError, DataError, ZerofitError
from zerofit.launch.trials import TrialResult
from zerofit.planning.choose import survey
from zerofit.planning.explain import candidate_table
from zerofit.planning.hardware import probe

FIELDS = {
    *(
        "strategy",
        "offload",
        "micro_batch",
        "accumulation_steps",
        "activation_checkpointing",
        "optimizer_state",
        "fits",
    ),
    *("gpu_peak_bytes", "gpu_reserved_bytes", "gpu_items", "host_peak_bytes", "disk_bytes", "step_seconds"),
    *("tokens_per_second", "reason"),
}


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    if code:
        with pytest.raises(typer.Exit) as ended:
            run_plan([*arguments, "--json"])
        assert ended.value.exit_code == code
    else:
        run_plan([*arguments, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("option", ["--resume", "--dry-run", "--run=x"])
def test_what_belongs_to_train_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="belong to `zerofit train`"):
        run_plan(["--preset", "gpt2", option])


@pytest.mark.parametrize("number", [".inf", ".nan"])
def test_infinite_numbers_are_refused(number: str) -> None:
    with pytest.raises(ConfigError, match="takes a number above 0"):
        run_plan(["--preset", "gpt2", "--learning-rate", number])


def test_a_plan_for_hardware_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, "--preset", "gpt2", "--gpus", "4", "--gpu", "rtx4090")
    assert found["model"]["parameters"] == 124_475_904
    assert len(found["hardware"]["gpus"]) == 4
    for candidate in found["candidates"]:
        assert candidate.keys() >= FIELDS
        assert candidate["gpu_peak_bytes"] == sum(candidate["gpu_items"].values()) <= candidate["gpu_reserved_bytes"]
        assert candidate["micro_batch"] * candidate["accumulation_steps"] * candidate["world_size"] == 64
        assert candidate["reason"]
    fitting = [c for c in found["candidates"] if c["fits"] and c["asked"]]
    fastest = max(c["tokens_per_second"] for c in fitting)
    assert found["chosen"]["tokens_per_second"] >= 0.97 * fastest
    assert found["chosen"]["precision"] == "bf16"


def test_a_second_plan_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", "gpt2", "--gpus", "4", "--gpu", "rtx4090"]
    plan_json(capsys, *arguments)
    started = time.process_time()
    plan_json(capsys, *arguments)
    assert time.process_time() - started < 0.5


def test_goals_change_the_choice_and_not_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        goal: plan_json(capsys, "--preset", "gpt2", "--gpus", "2", "--gpu", "t4", "--goal", goal)
        for goal in ("speed", "memory", "balanced", "largest-batch")
    }
    chosen = {goal: document["chosen"] for goal, document in found.items()}
    assert chosen["speed"]["precision"] == "fp16"
    assert chosen["memory"]["gpu_driver_bytes"] < chosen["speed"]["gpu_driver_bytes"]
    assert chosen["largest-batch"]["micro_batch"] == max(
        c["micro_batch"] for c in found["largest-batch"]["candidates"] if c["asked"] and c["fits"]
    )
    assert chosen["balanced"]["tokens_per_second"] >= 0.9 * chosen["speed"]["tokens_per_second"]
    tables = [[c for c in document["candidates"] if c["variant"] == "fastest"] for document in found.values()]
    for table in tables[1:]:
        assert [c["gpu_peak_bytes"] for c in table] == [c["gpu_peak_bytes"] for c in tables[0]]


def test_a_wish_is_respected_and_the_rest_shown_for_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(
        capsys, "--preset", "gpt2", "--gpus", "2", "--gpu", "t4", "--strategy", "zero2", "--micro-batch", "2"
    )
    assert (found["chosen"]["strategy"], found["chosen"]["micro_batch"]) == ("zero2", 2)
    assert {c["strategy"] for c in found["candidates"] if not c["asked"]} >= {"ddp", "zero3"}


def test_nothing_fits_is_exit_code_3_with_ways_out(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--preset",
        "gpt2",
        "--gpus",
        "1",
        "--gpu-memory",
        "1GiB",
        "--strategy",
        "single",
        "--micro-batch",
        "8",
    ]
    with pytest.raises(typer.Exit) as ended:
        run_plan(arguments)
    assert ended.value.exit_code == 3
    said = capsys.readouterr()
    assert "No strategy fits" in said.err
    assert "GiB of GPU memory" in said.err
    document = plan_json(capsys, *arguments, code=3)
    assert document["chosen"] is None
    (single,) = [c for c in document["candidates"] if c["asked"]]
    assert any("fits with" in remedy for remedy in single["remedies"])


def test_a_disk_that_is_too_small_decides(capsys: pytest.CaptureFixture[str]) -> None:
    document = plan_json(capsys, "--preset", "gpt2", "--gpu", "h200", "--disk", "1GB", code=3)
    assert "disk for checkpoints" in document["candidates"][0]["reason"]


def test_a_remedy_for_a_fixed_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ["--strategy", "single", "--micro-batch", "64", "--activation-checkpointing", "none"]
    document = plan_json(capsys, "--preset", "gpt2", "--gpu", "t4", *fixed, code=3)
    (single,) = [c for c in document["candidates"] if c["asked"]]
    assert any(remedy.startswith("fits at micro-batch") for remedy in single["remedies"])


def test_the_table_the_bars_and_the_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    run_plan(["--preset", "gpt2", "--gpus", "2", "--gpu", "v100-32", "--explain"])
    said = capsys.readouterr().out
    for part in ("> DDP", "tokens/s", "p parameters", "global batch 64", "Source:", "CUDA 12.6", "compute "):
        assert part in said


def test_data_is_not_needed_for_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"--model\.vocab_size"):
        run_plan(["--preset", "shakespeare_char", "--gpu", "t4"])
    run_plan(["--preset", "shakespeare_char", "--model.vocab_size", "76", "--json"])


def test_the_ledger_shows_predicted_beside_measured(capsys: pytest.CaptureFixture[str]) -> None:
    run_plan(["--ledger", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    names = {f"{what}_{of}" for what in ("predicted", "measured") for of in ("gpu_peak_bytes", "step_seconds")}
    assert all(names <= row.keys() for row in rows)
    run_plan(["--ledger"])
    assert "2026-11-21" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="takes --json only"):
        run_plan(["--ledger", "--preset", "gpt2"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus"], "without its value"),
        (["--explain=yes"], "takes no value"),
        (["--gpu", "t4", "--gpu", "l4"], "given twice"),
        (["--gpu", "rtx4909"], "nearest known are rtx4090"),
    ],
)
def test_bad_flags_are_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_plan(["--preset", "gpt2", *arguments])


def test_calibrating_needs_gpus_and_a_trial_that_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    from zerofit.planning.hardware import Hardware

    bare = Hardware(cpu_cores=1, host_memory_bytes=1, system="Linux", has_deepspeed=False)
    monkeypatch.setattr(zerofit.cli.calibrate, "probe", lambda: bare)
    with pytest.raises(ConfigError, match="no NVIDIA GPU"):
        run_plan(["--calibrate"])
    with pytest.raises(ZerofitError, match="nothing was stored"):
        calibration_from(TrialResult("timeout", 1.0, None, 0, "tail"), "t4", 1)
    result = {"matrix_flops": 5e13, "device": "Tesla T4", "torch": "2.13", "context_bytes": 300}
    measured = calibration_from(TrialResult("ok", 1.0, result, 0, ""), "t4", 2)
    assert (measured.matrix_flops, measured.context_bytes, measured.all_reduce) == (5e13, 300, None)
    assert "2 x Tesla T4" in measured.source


SMALL_CARDS = ("--preset", "mamba_7b", "--gpus", "4", "--gpu-memory", "24GiB")


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ((*SMALL_CARDS, "--strategy", "zero2", "--offload", "cpu"), "30 GiB of GPU memory"),
        (
            ("--preset", "mamba_7b", "--gpus", "4", "--gpu-memory", "34GiB", "--strategy", "fsdp2"),
            "the blocks' inputs in host memory: --activation-offload cpu",
        ),
    ],
)
def test_what_is_squeezed_in_says_what_that_rests_on(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], remedy: str
) -> None:
    found = plan_json(capsys, *arguments)["chosen"]
    reserve = (found["gpu_reserved_bytes"] - found["gpu_peak_bytes"]) / 2**30
    peak, limit = found["gpu_driver_bytes"] / 2**30, found["gpu_limit_bytes"] / 2**30
    assert found["squeezed"]
    assert peak > limit
    assert f"It needs about {peak - reserve:.2f} GiB of the {limit:.2f} GiB" in found["reason"]
    assert f"It is tight: with the {reserve:.2f} GiB" in found["reason"]
    (way,) = found["remedies"]
    assert way == f"without that it fits with {remedy}"


def test_ways_out_name_the_models_own_key_and_the_best_other_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        run_plan([*SMALL_CARDS, "--strategy", "zero3", "--offload", "none"])
    said = capsys.readouterr().err
    assert "a shorter model.max_seq_length" in said
    assert "strategy zero3, offload cpu fits as it is" in said  # zero2 with offload fits tightly only


def test_a_card_known_by_its_memory_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    run_plan(["--preset", "gpt2", "--gpus", "2", "--gpu-memory", "24GiB"])
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith("on 2 x GPU with 24.00 GiB, PCIe:")
    assert second == "Speeds: assumed to be those of NVIDIA A10G, published rates; expect them within 50%."


def test_the_table_is_whole_on_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a GPU too, where every strategy is shown beside the one that was asked for."""
    settings = [("strategy", "single"), ("model.vocab_size", "76")]
    choice = survey(load_config(None, "shakespeare_char", settings).config, probe())
    if choice.hardware.gpus:
        pytest.skip("a table for GPUs has other columns")
    console = Console(width=80)
    console.print(candidate_table(choice, choice.rows, wide=False))
    said = capsys.readouterr().out
    assert "…" not in said
    assert "  ZeRO-3 + CPU, all " in said
    assert "\n Estimated bytes" not in said  # the caption begins where the table does
