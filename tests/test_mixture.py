"""Mixtures and stages: exact shares, and the same samples on any number of ranks and from any position."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from zerofit.checkpoint.retention import untag
from zerofit.cli.evaluate import evaluate
from zerofit.config.load import dump_resolved, load_config
from zerofit.config.schema import Config
from zerofit.config.stages import describe_stages, span_at, stage_ending_at
from zerofit.data.loader import Share, TrainLoader
from zerofit.data.mixture import Mixture, Staged, interleave, whole_weights
from zerofit.data.tokens import TokenDataset
from zerofit.errors import ConfigError, DataError
from zerofit.training.schedule import learning_rate
from zerofit.training.start import with_data

BLOCK = 4
WEIGHTS = st.lists(
    st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0, 2.0, 5.5, 1 / 3, 0.123456]), min_size=1, max_size=6
).filter(any)


def _dataset(source: int, tokens: int = 400) -> TokenDataset:
    """Tokens that tell their source and their place: source * 10,000 + place."""
    return TokenDataset((source * 10_000 + np.arange(tokens)).astype(np.uint32), BLOCK, seed=5)


def _mixture(weights: list[float]) -> Mixture:
    return Mixture([_dataset(i, 100 + 60 * i) for i in range(len(weights))], weights)


@settings(max_examples=25, deadline=None)
@given(WEIGHTS)
def test_shares_are_within_one_sample_after_any_number_of_samples(weights: list[float]) -> None:
    mixture = _mixture(weights)
    sources = mixture.sources_of(np.arange(10_000))
    counts = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    shares = np.array(weights) / sum(weights)
    expected = np.arange(1, 10_001)[:, None] * shares
    rounding = np.arange(1, 10_001)[:, None] / 10_000  # of weights that no period of 10,000 holds exactly
    exact = sum(whole_weights(weights)) < 10_000
    assert (np.abs(counts - expected) < 1 + (0 if exact else rounding) + 1e-6).all()
    assert np.abs(counts[-1] / 10_000 - shares).max() < 0.005
    assert (counts[:, np.array(weights) == 0] == 0).all()


def test_decimal_weights_are_exact() -> None:
    assert whole_weights([0.3, 0.7]) == [3, 7]
    assert whole_weights([1, 2, 0]) == [1, 2, 0]
    assert sum(whole_weights([1 / 3, 0.5, 0.1234567])) == 10_000
    assert np.bincount(interleave([3, 7])).tolist() == [3, 7]


def _rows(samples: Any, step: int, world_size: int, micro_batch: int, accumulation: int) -> list[list[int]]:
    """Tokens of a step's samples, micro-step by micro-step and rank by rank; each loader starts at this step."""
    loaders = [TrainLoader(samples, Share(micro_batch, accumulation, r, world_size), False) for r in range(world_size)]
    windows = [loader.window(step) for loader in loaders]
    for loader in loaders:
        loader.close()
    return [row for m in range(accumulation) for window in windows for row in window[m].inputs["tokens"].tolist()]


def _staged(weights: list[float]) -> Staged:
    mixture, other = _mixture(weights), _dataset(8, 300)
    return Staged([mixture, other], [0, 1, 0], [0, 5 * 8, 9 * 8])


@settings(max_examples=25, deadline=None)
@given(weights=WEIGHTS, step=st.integers(0, 60), staged=st.booleans())
def test_the_same_samples_on_any_number_of_ranks_and_from_any_position(
    weights: list[float], step: int, staged: bool
) -> None:
    samples = _staged(weights) if staged else _mixture(weights)
    walked = np.concatenate([samples.starts(i, 1) for i in range(step * 8, step * 8 + 8)])  # one by one
    alone = _rows(samples, step, 1, 8, 1)
    assert alone == samples.window(walked)[:, :-1].tolist()
    for world_size, micro_batch, accumulation in ((2, 4, 1), (4, 2, 1), (4, 1, 2)):
        assert _rows(samples, step, world_size, micro_batch, accumulation) == alone


@given(weights=WEIGHTS)
def test_each_source_is_read_in_its_own_order(weights: list[float]) -> None:
    """What a mixture takes of a source is what the source alone would give, sample after sample."""
    mixture = _mixture(weights)
    numbers = np.arange(300)
    windows, sources = mixture.window(mixture.starts_of(numbers)), mixture.sources_of(numbers)
    for source, part in enumerate(mixture.parts):
        mine = windows[sources == source]
        assert (mine == part.window(part.starts(0, len(mine)))).all()


def test_data_that_comes_again_goes_on_where_it_was() -> None:
    a, b = _dataset(0), _dataset(1)
    staged = Staged([a, b], [0, 1, 0], [0, 10, 15])
    found = staged.window(staged.starts(0, 40)).tolist()
    assert found[:10] + found[15:] == a.window(a.starts(0, 35)).tolist()
    assert found[10:15] == b.window(b.starts(0, 5)).tolist()


def test_evaluation_takes_each_source_in_its_share() -> None:
    mixture = _mixture([1, 3])
    tokens = mixture.window(mixture.spread_starts(16))[:, 0]
    assert np.bincount(tokens // 10_000).tolist() == [4, 12]
    assert len(mixture.spread_starts(10**6)) <= mixture.blocks


# Configuration


def _corpus(folder: Path, largest: int = 6, tokens: int = 600, meta: dict[str, Any] | None = None) -> None:
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        (np.arange(tokens) % (largest + 1)).astype(np.uint16).tofile(folder / f"{split}.bin")
    known = {"dtype": "uint16", "vocab_size": 7, "tokenizer": "char", "characters": "abcdefg"}
    (folder / "meta.json").write_text(json.dumps(known | (meta or {})))


def _yaml(tmp_path: Path, data: Any, **settings: Any) -> Path:
    tiny = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8}
    content = {"runs_dir": str(tmp_path / "runs"), "model": tiny, "data": data, "global_batch": 4, **settings}
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    )
    return path


def test_a_mixture_is_read_and_written_back(tmp_path: Path) -> None:
    path = _yaml(tmp_path, {"path": "d", "sources": {"a": 0.3, "b": {"weight": 0.7, "path": "elsewhere/b"}}})
    resolved = load_config(path, None)
    assert resolved.config.data.folders() == {"a": Path("d/a"), "b": Path("elsewhere/b")}
    again = tmp_path / "again.yaml"
    again.write_text(dump_resolved(resolved))
    assert load_config(again, None).config == resolved.config
    typed = load_config(path, None, [("data.sources", "{a: 1, c: 3}")]).config
    assert {name: source.weight for name, source in typed.data.sources.items()} == {"a": 1, "c": 3}
    assert load_config(_yaml(tmp_path, {"sources": {"a": 1}}), None).config.data.path == Path("data")


def test_mixtures_and_stages_from_python() -> None:
    from zerofit.api import _resolve

    tiny = {"n_layer": 1, "n_head": 1, "n_embd": 8}
    stages = [{"until": 5, "data": {"path": "x"}}, {"learning_rate": 0.1}]
    config = _resolve(None, None, {"model": tiny, "data": {"sources": {"a": 1, "b": 2}}, "stages": stages}).config
    assert config.data.sources["b"].weight == 2
    assert [stage.until for stage in config.stages] == [5, None]


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ({"a": -0.3, "b": 1}, r"run\.yaml:\d+: data\.sources\.a\.weight.*greater than or equal to 0.*-0\.3"),
        ({"a": 0, "b": 0}, r"run\.yaml:\d+: data\.sources.*add up to 0"),
        ({"a": {"weight": 1, "wieght": 2}}, r"run\.yaml:\d+: data\.sources\.a\.wieght is not known"),
        ({"a": {"path": "x"}}, r"run\.yaml:\d+: data\.sources\.a\.weight.*required"),
        ({"a": "much"}, r"run\.yaml:\d+: data\.sources\.a"),
        ([1, 2], r"run\.yaml:\d+: data\.sources was set to the list"),
    ],
)
def test_bad_mixtures_are_refused_with_file_and_line(tmp_path: Path, sources: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(_yaml(tmp_path, {"path": "d", "sources": sources}), None)


def test_an_unknown_source_and_another_tokenizer_are_refused(tmp_path: Path) -> None:
    from rich.console import Console

    _corpus(tmp_path / "d" / "a")
    _corpus(tmp_path / "d" / "b", meta={"characters": "gfedcba"})
    path = _yaml(tmp_path, {"path": str(tmp_path / "d"), "sources": {"a": 1, "web": 1}})
    with pytest.raises(
        DataError, match=r"run\.yaml:\d+: data\.sources names web.*there are: a, b.*zerofit data prepare"
    ):
        with_data(load_config(path, None), Console())
    path = _yaml(tmp_path, {"path": str(tmp_path / "d"), "sources": {"a": 1, "b": 1}})
    with pytest.raises(DataError, match="different tokenizers or alphabets"):
        with_data(load_config(path, None), Console())


STAGES = [
    {"until": 10, "data": {"path": "a"}},
    {"until": 20, "name": "middle", "learning_rate": 0.5},
    {"data": {"path": "b"}, "learning_rate": 0.25, "schedule": {"warmup_steps": 5}},
]


def _staged_config(tmp_path: Path, stages: Any, **settings: Any) -> Config:
    return load_config(_yaml(tmp_path, {"path": "base"}, stages=stages, **({"max_steps": 40} | settings)), None).config


def test_stages_are_a_function_of_the_step(tmp_path: Path) -> None:
    config = _staged_config(tmp_path, STAGES, optimizer={"learning_rate": 1.0}, schedule={"kind": "constant"})
    names = [span_at(config, step).name for step in (0, 9, 10, 19, 20, 39)]
    assert names == ["stage-1", "stage-1", "middle", "middle", "stage-3", "stage-3"]
    assert [span_at(config, step).data.path.name for step in (0, 10, 20)] == ["a", "base", "b"]
    assert [stage_ending_at(config, step) for step in (9, 10, 20, 40)] == [None, "stage-1", "middle", "stage-3"]
    # A run that ends early ends the stage that it is in, and no other.
    early = [stage_ending_at(config, step, last_step=15) for step in (9, 10, 14, 15, 20)]
    assert early == [None, "stage-1", None, "middle", "middle"]
    assert stage_ending_at(config, 10, last_step=10) == "stage-1"
    # The run's schedule goes on; a schedule of its own counts from the start of its stage, to its end.
    assert [learning_rate(config, step) for step in (0, 12)] == [1.0, 0.5]
    assert learning_rate(config, 20) == pytest.approx(0.25 / 5)
    assert learning_rate(config, 24) == pytest.approx(0.25)
    assert learning_rate(config, 39) < 0.01
    lines = list(describe_stages(config))
    assert "steps 11 to 20, base, peak learning rate 0.5" in lines[1]


def test_the_end_of_a_timed_run_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither in the plan, nor in its JSON, nor in a refusal."""
    from zerofit.cli.plan import run_plan

    _corpus(tmp_path / "a")
    settings = {"max_steps": None, "schedule": {"kind": "constant"}, "device": "cpu", "strategy": "single"}
    data, stages = {"path": str(tmp_path / "a")}, [{"until": 10}, {"name": "rest"}]
    path = str(_yaml(tmp_path, data, stages=stages, **settings))
    run_plan([path, "--duration", "10s"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Stage stage-1: steps 1 to 10, " in said
    assert "Stage rest: step 11 on, to the end of the run, " in said
    assert "for 10s" in said
    assert "000,000" not in said
    run_plan([path, "--duration", "10s", "--json"])
    assert [stage["stop"] for stage in json.loads(capsys.readouterr().out)["stages"]] == [10, None]
    with pytest.raises(ConfigError, match="number 1 ends at step 10, and the duration 8 comes to 8 steps"):
        run_plan([path, "--duration", "8"])
    assert "Stage" not in capsys.readouterr().out
    path = str(_yaml(tmp_path, data, stages=[{"until": 10}, {"until": 20}], duration="10s", **settings))
    with pytest.raises(ConfigError, match=r"number 2 ends at step 20, and after the duration 10s nobody knows"):
        run_plan([path])
    path = str(_yaml(tmp_path, data, duration="10s", **{**settings, "max_steps": 7}))
    with pytest.raises(ConfigError, match=r"duration 10s .* is a time, and max_steps says 7"):
        _train(Path(path), "x")


def test_the_ends_of_stages_count_in_the_disk_that_a_run_needs(tmp_path: Path) -> None:
    from zerofit.planning.candidates import checkpoint_bytes

    with_stages, without = _staged_config(tmp_path, STAGES), _staged_config(tmp_path, [])
    assert (
        checkpoint_bytes(with_stages, 100)[1] - checkpoint_bytes(without, 100)[1]
        == 2 * checkpoint_bytes(without, 100)[0]
    )


def test_the_last_stage_ends_the_run_and_gives_its_data(tmp_path: Path) -> None:
    path = _yaml(tmp_path, None, stages=[{"until": 5, "data": {"path": "a"}}, {"until": 9, "data": {"path": "b"}}])
    config = load_config(path, None).config
    assert (config.max_steps, config.data.path) == (9, Path("b"))


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"until": 10}, {"until": 10}], "number 2 ends at step 10, and the one before at 10"),
        ([{}, {"until": 40}], "number 1 says not until when"),
        ([{"until": 10}, {"until": 30}], "ends at step 30, and max_steps is 40"),
        ([{"until": 10, "name": "x"}, {"name": "x"}], "the name x is taken"),
        ([{"until": 10, "name": "best"}, {}], "the name best is taken"),
        ([{"until": 10, "learning_rate": -1}, {}], r"run\.yaml:\d+: stages\.0\.learning_rate.*greater than 0"),
        ([{"until": 10, "lerning_rate": 1}, {}], r"run\.yaml:\d+: stages\.0\.lerning_rate is not known"),
    ],
)
def test_bad_stages_are_refused(tmp_path: Path, stages: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _staged_config(tmp_path, stages)


@pytest.mark.parametrize(
    ("duration", "end", "said"),
    [
        (20_000, "leave", None),
        ("1e9tok", "leave", None),
        (15_000, "leave", "number 2 ends at step 15000, and the one before at 15000"),
        (100, "leave", "number 1 ends at step 15000, and the duration 100 comes to 100 steps"),
        (20_000, 30_000, "number 2 ends at step 30000, and the duration 20000 comes to 20000 steps"),
        (30_000, 30_000, None),
    ],
)
def test_stages_fit_the_duration_whatever_max_steps_would_have_been(
    tmp_path: Path, duration: Any, end: Any, said: str | None
) -> None:
    from zerofit.training.start import with_duration

    stages = [{"until": 15_000}, {} if end == "leave" else {"until": end}]
    path = _yaml(tmp_path, {"path": "base"}, stages=stages, duration=duration)
    resolved = load_config(path, None)
    plan: Any = SimpleNamespace(global_batch=8, model=SimpleNamespace(items_per_sample=16))
    if said is None:
        steps = with_duration(resolved, plan).config.max_steps
        assert steps == (duration if isinstance(duration, int) else 1e9 / 8 / 16)
        return
    with pytest.raises(ConfigError, match=said):
        with_duration(resolved, plan)


def test_a_timed_run_decays_to_no_end_in_a_stage_either(tmp_path: Path) -> None:
    timed = {"duration": "2h", "schedule": {"kind": "constant"}}
    path = _yaml(tmp_path, {"path": "base"}, stages=[{"until": 15_000}, {}], **timed)
    assert load_config(path, None).config.duration == "2h"
    path = _yaml(tmp_path, {"path": "base"}, stages=[{"until": 5}, {"schedule": {"kind": "linear"}}], **timed)
    with pytest.raises(ConfigError, match=r"schedule\.kind linear: nobody knows at which step"):
        load_config(path, None)


# Runs


def _train(path: Path, name: str, *arguments: str) -> Path:
    """One rank, in this process."""
    from zerofit.config.arguments import parse_arguments
    from zerofit.training.rank import train_rank
    from zerofit.training.start import prepare_run

    request = parse_arguments([str(path), "--name", name, "--num-gpus", "1", *arguments])
    prepared = prepare_run(load_config(request.source, None, request.overrides), request)
    assert prepared is not None
    try:
        train_rank(prepared, None)
    finally:
        assert prepared.lock is not None
        prepared.lock.give_up(prepared.folder)
    return prepared.folder


def _events(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["kind"] == kind]


def _losses(run: Path) -> list[float]:
    return [event["loss"] for event in _events(run, "step")]


@pytest.mark.parametrize("end", ["clock", "patience", "patience in the first"])
def test_a_run_that_ends_early_names_the_checkpoint_of_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Retention keeps it, and a run that is made longer moves the name to where the stage then ends."""
    import zerofit.training.loop as loop

    _corpus(tmp_path / "a")
    stages = [{"until": 30 if end.endswith("first") else 4, "name": "warm"}, {"name": "rest", "learning_rate": 1e-3}]
    path = _yaml(tmp_path, {"path": str(tmp_path / "a")}, stages=stages, schedule={"kind": "constant"},
                 keep_checkpoints=1, save_interval=3, eval_batches=1, runs_dir=str(tmp_path / "runs"))  # fmt: skip
    if end == "clock":
        arguments = ["--duration", "1h", "--eval-interval", "never"]
        ticks = iter(range(10**6))
        monkeypatch.setattr(loop.time, "perf_counter", lambda: 100.0 * next(ticks))
    else:
        arguments = ["--max-steps", "60", "--eval-interval", "2", "--early-stopping.patience", "2"]
        arguments += ["--early-stopping.min-delta", "10"]
    run = _train(path, "e", *arguments)
    ending = _events(run, "ending")[-1]["step"]
    assert 4 < ending < 30
    names = {name: (run / "checkpoints" / name).read_text().strip() for name in ("final", "latest")}
    stage = "warm" if end.endswith("first") else "rest"
    assert {*names.values(), (run / "checkpoints" / stage).read_text().strip()} == {f"step-{ending:08d}"}
    kept = {folder.name for folder in (run / "checkpoints").glob("step-*")}
    assert kept == {f"step-{ending:08d}"} | ({"step-00000004"} if stage == "rest" else set())
    assert (run / "checkpoints" / "rest").exists() is (stage == "rest")
    if stage == "warm":
        longer = [*arguments[:2], "--eval-interval", "never", "--early-stopping.patience", "null", "--resume"]
        longer[1] = "35"
        _train(path, "e", *longer)
        assert (run / "checkpoints" / "warm").read_text().strip() == "step-00000030"
        assert (run / "checkpoints" / "rest").read_text().strip() == "step-00000035"


def test_a_run_with_a_mixture_and_stages_resumes_inside_a_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On two ranks, and on one from a checkpoint inside the second stage: the losses of the run on one rank."""
    for name in ("a", "b", "c"):
        _corpus(tmp_path / "d" / name)
    own = {"path": str(tmp_path / "d"), "sources": {"a": 0.25, "b": 0.75}}
    stages = [
        {"until": 3, "name": "warm", "data": {"path": str(tmp_path / "d" / "c")}},
        {"until": 6, "learning_rate": 1e-3},
        {},
    ]
    path = _yaml(
        tmp_path, own, stages=stages, max_steps=8, eval_interval=4, eval_batches=2, save_interval=5, keep_checkpoints=1,
        device="cpu", precision="fp32", optimizer={"learning_rate": 1e-2}, save_on_improvement=False, keep_every=5,
    )  # fmt: skip
    run = _train(path, "whole")
    assert "Stage warm: steps 1 to 3" in capsys.readouterr().out
    evaluation = _events(run, "eval")[-1]
    assert {"val_loss", "val_loss_a", "val_loss_b", "val_loss_c", "train_loss"} <= evaluation.keys()
    there = {path.name for path in (run / "checkpoints").iterdir()}
    assert {"warm", "stage-2", "stage-3", "final"} <= there
    assert (run / "checkpoints" / "warm").read_text().strip() == "step-00000003"
    assert "step-00000003" in there  # kept, though only the newest one is asked for
    command = [sys.executable, "-m", "zerofit.cli.main", "train", str(path), "--name", "two", "--num-gpus", "2"]
    done = subprocess.run([*command, "--strategy", "ddp"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "runs" / "two"
    assert _losses(two) == pytest.approx(_losses(run), abs=1e-5)
    for name in ("stage-2", "stage-3"):  # a resume from before them would replace what they name
        untag(two / "checkpoints", name)
    _train(path, "two", "--resume", "5")
    assert _losses(two)[8:] == pytest.approx(_losses(run)[5:], abs=1e-5)
    capsys.readouterr()
    evaluate(run, "latest", batches=2, micro_batch=4, as_json=True)
    assert {"val_loss", "val_loss_a", "val_loss_c"} <= json.loads(capsys.readouterr().out).keys()
