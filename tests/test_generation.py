"""Texts from a model: the cache changes nothing, windows follow their rule, rows do not depend on their company."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from processes import run
from zerofit.checkpoint.model import initial_reader
from zerofit.cli.main import load_verb
from zerofit.config.models import GPT2Config
from zerofit.config.schema import Config
from zerofit.engines.build import build
from zerofit.errors import RequestError
from zerofit.models import model_spec, stepper_of
from zerofit.planning.plan import Plan
from zerofit.tasks.decoding import Decoding, draw
from zerofit.tasks.language_modeling import TASK
from zerofit.tasks.sampling import CachedReader, Overflow, PlainReader, stream
from zerofit.tasks.text_stream import TextStream
from zerofit.types import Batch, World

MODEL = GPT2Config(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=29)
PROMPTS = [[3], [5, 1, 4, 1, 5, 9], [2, 7, 1], list(range(15))]
GREEDY = Decoding(temperature=0)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    built = model_spec("gpt2").build(MODEL)
    for name, parameter in built.named_parameters():  # far wider than at the start of training, so that tokens vary
        torch.nn.init.normal_(parameter, std=3.0 if name.startswith("wpe") else 0.4)
    return built.eval()


def write(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    cached: bool,
    rules: Decoding = GREEDY,
    overflow: Overflow = "slide",
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    stepper = stepper_of("gpt2", model)
    assert stepper is not None
    reader = CachedReader(stepper, "cpu") if cached else PlainReader(lambda rows: model(rows))
    seeds = seeds or range(len(prompts))
    steps = stream(
        reader, prompts, tokens, limit=stepper.context_length, rules=rules, seeds=list(seeds), overflow=overflow
    )
    return [list(row) for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("overflow", ["slide", "half"])
@pytest.mark.parametrize("rules", [GREEDY, Decoding(temperature=0.9, top_k=9)], ids=["greedy", "drawn"])
def test_the_cache_changes_nothing_within_and_beyond_the_context(
    model: torch.nn.Module, overflow: Overflow, rules: Decoding
) -> None:
    cached = write(model, PROMPTS, 40, True, rules, overflow)
    plain = write(model, PROMPTS, 40, False, rules, overflow)
    assert cached == plain
    assert len({token for row in cached for token in row}) > 3


@pytest.mark.parametrize("overflow", ["slide", "half"])
def test_a_row_does_not_depend_on_its_company(model: torch.nn.Module, overflow: Overflow) -> None:
    together = write(model, PROMPTS, 25, True, overflow=overflow)
    alone = [write(model, [prompt], 25, True, overflow=overflow)[0] for prompt in PROMPTS]
    assert together == alone


def test_slide_shows_the_last_tokens_and_half_drops_half(model: torch.nn.Module) -> None:
    seen: dict[str, list[int]] = {"slide": [], "half": []}
    for overflow, lengths in seen.items():
        reader = PlainReader(lambda rows, lengths=lengths: (lengths.append(rows.shape[1]), model(rows))[1])
        list(stream(reader, [[1]], 24, limit=12, rules=GREEDY, seeds=[0], overflow=overflow))  # type: ignore[arg-type]
    assert seen["slide"] == [*range(1, 13), *[12] * 12]
    assert seen["half"] == [*range(1, 13), *range(6, 13), *range(6, 11)]


def test_the_cache_reads_a_token_at_a_time(model: torch.nn.Module) -> None:
    stepper: Any = stepper_of("gpt2", model)
    lengths: list[int] = []
    step = stepper.step
    stepper.step = lambda tokens, *rest: (lengths.append(tokens.shape[1]), step(tokens, *rest))[1]
    list(stream(CachedReader(stepper, "cpu"), [[1, 2, 3]], 15, limit=12, rules=GREEDY, seeds=[0], overflow="half"))
    assert lengths == [3, *[1] * 9, 6, *[1] * 4]


LOGITS = torch.log(torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]))


def drawn(rules: Decoding, seen: Sequence[int] = ()) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {draw(LOGITS, seen, rules, generator) for _ in range(300)}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (Decoding(), {0, 1, 2, 3, 4}),
        (Decoding(temperature=0), {0}),
        (Decoding(top_k=2), {0, 1}),
        (Decoding(top_k=99), {0, 1, 2, 3, 4}),
        (Decoding(top_p=0.7), {0, 1}),
        (Decoding(top_p=0.71), {0, 1, 2}),
        (Decoding(top_p=1e-6), {0}),
        (Decoding(min_p=0.3), {0, 1, 2}),
        (Decoding(min_p=1.0), {0}),
        (Decoding(temperature=1e-3), {0}),
        (Decoding(top_k=4, top_p=0.9, min_p=0.5), {0, 1}),
    ],
)
def test_which_tokens_can_be_drawn(rules: Decoding, expected: set[int]) -> None:
    assert drawn(rules) == expected


def test_shares_are_those_of_the_softmax() -> None:
    generator = torch.Generator().manual_seed(1)
    counts = Counter(draw(LOGITS, (), Decoding(top_k=2), generator) for _ in range(4000))
    assert counts[0] / 4000 == pytest.approx(4 / 7, abs=0.03)


def test_repetition_penalty_lowers_what_was_said() -> None:
    assert drawn(Decoding(temperature=0, repetition_penalty=1.5), seen=[0]) == {1}
    assert drawn(Decoding(temperature=0, repetition_penalty=1.0), seen=[0]) == {0}
    positive = torch.tensor([3.0, 2.5])
    assert draw(positive, [0], Decoding(temperature=0, repetition_penalty=2.0), torch.Generator()) == 1


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_streamed_text_is_the_whole_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    row = TextStream(decode_bytes, stops)
    shown = "".join(row.push(token) for token in text.encode("utf-8")) + row.finish()
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    assert shown == row.text == (text[: min(places)] if places else text)
    assert row.stopped == bool(places)


def test_a_character_is_shown_when_it_is_whole() -> None:
    row = TextStream(decode_bytes)
    assert [row.push(token) for token in "aé€😀".encode()] == ["a", "", "é", "", "", "€", "", "", "", "😀"]
    broken = TextStream(decode_bytes)
    assert "".join(broken.push(token) for token in [255, 255, 65, 66]) + broken.finish() == "\ufffd\ufffdAB"


def test_nothing_of_a_stop_text_is_shown() -> None:
    row = TextStream(decode_bytes, ["STOP"])
    assert [row.push(token) for token in b"aST STOPx"] == ["a", "", "", "ST ", "", "", "", "", ""]
    assert row.stopped


def sampled(world: World, plan: Plan, config: Config) -> list[str | None]:
    """What each rank writes, in the middle of training and after it."""
    engine = build(plan, model_spec("gpt2"), world)
    engine.load(initial_reader(model_spec("gpt2"), plan.model, 1))
    tokens = torch.arange(16).reshape(2, 8) % 7
    batch = Batch({"tokens": tokens, "targets": tokens}, 16)

    def predict(inputs: torch.Tensor) -> torch.Tensor:
        return engine.predict(Batch({"tokens": inputs}, 1))

    texts = []
    for step in range(2):
        engine.train_step([batch], 1e-3, step)
        texts.append(TASK.words(config, plan.model, predict))
    engine.close()
    return texts


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_all_ranks_write_the_same_text_while_training(strategy: str, tmp_path: Path) -> None:
    meta = {"tokenizer": "char", "characters": "abcdefg", "vocab_size": 7, "dtype": "uint16"}
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    shape = GPT2Config(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=7)
    config = Config.model_validate(
        {"model": shape.model_dump(), "data": {"path": str(tmp_path)}, "sample_tokens": 12, "sample_prompt": "ab"}
    )
    plan = Plan.model_validate(
        {
            "model": shape,
            "parameters": shape.parameter_count(),
            "strategy": strategy,
            "device": "cpu",
            "world_size": 2,
            "micro_batch": 2,
            "accumulation_steps": 1,
            "precision": "fp32",
        }
    )
    first, second = run(2, sampled, plan, config)
    assert first == second
    assert all(text is not None and len(text) == 12 for text in first)


CONFIG = """
name: a
model: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 16}
data: {path: data, prepare: [play.txt]}
global_batch: 4
max_steps: 4
eval_interval: never
save_interval: 4
sample_tokens: 6
sample_interval: 2
sample_prompt: t
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "play.txt").write_text("the quick brown fox jümps over the lazy dog\n" * 60, encoding="utf-8")
    (folder / "a.yaml").write_text(CONFIG, encoding="utf-8")
    done = zerofit(folder, "train", "a.yaml", "--device", "cpu")
    assert "Sample after step 2:\n" in done.stdout
    return folder


def write_in_this_process(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> str:
    """What ``zerofit generate runs/a`` prints."""
    monkeypatch.chdir(work)
    capsys.readouterr()
    load_verb("generate").main(["runs/a", *arguments], standalone_mode=False)
    return capsys.readouterr().out


@pytest.fixture
def generate(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    return partial(write_in_this_process, work, capsys, monkeypatch)


def zerofit(work: Path, *arguments: str, code: int = 0, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "zerofit.cli.main", *arguments]
    done = subprocess.run(
        command, cwd=work, capture_output=True, text=True, timeout=120, env=environment, encoding=encoding, check=False
    )
    assert done.returncode == code, done.stderr
    return done


def test_samples_are_events(work: Path) -> None:
    lines = (work / "runs" / "a" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    found = [event for event in map(json.loads, lines) if event["kind"] == "sample"]
    assert [(event["step"], len(event["text"])) for event in found] == [(2, 6), (4, 6)]


def test_several_prompts_with_and_without_cache(work: Path, generate: Callable[..., str]) -> None:
    (work / "prompts.txt").write_text("quick brown fox jümps over\nlazy\n", encoding="utf-8")
    arguments = ["--prompt", "the", "--prompts-file", "prompts.txt", "--samples", "2"]
    arguments += ["--tokens", "20", "--seed", "5", "--top-p", "0.9", "--repetition-penalty", "1.2", "--json"]
    cached, plain = json.loads(generate(*arguments)), json.loads(generate(*arguments, "--no-cache"))
    assert cached == plain
    assert [len(text) for text in cached["texts"]] == [23, 23, 46, 46, 24, 24]
    assert cached["texts"][0] != cached["texts"][1]


def test_streaming_shows_the_same_text_in_any_encoding(work: Path, generate: Callable[..., str]) -> None:
    arguments = ["--prompt", "jü", "--tokens", "20", "--temperature", "0"]
    assert generate(*arguments, "--stream") == generate(*arguments)
    done = zerofit(work, "generate", "runs/a", *arguments, "--stream", encoding="ascii")
    assert done.stdout.startswith("j?")


def test_stop_texts(generate: Callable[..., str]) -> None:
    arguments = ["--prompt", "the", "--tokens", "30", "--temperature", "0"]
    whole = json.loads(generate(*arguments, "--json"))["samples"][0]
    stop = whole["text"][4:6]
    cut = json.loads(generate(*arguments, "--stop", stop, "--json"))["samples"][0]
    assert cut["stopped"]
    assert cut["text"] == whole["text"][: whole["text"].find(stop)]
    assert cut["tokens"] < 30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", ""], "empty"),
        (["--overflow", "wrap"], "slide or half"),
        (["--json", "--stream"], "both given"),
        (["--prompts-file", "none.txt"], "none.txt cannot be read"),
        (["--prompt", "#"], "lacks"),
        (["--device", "tpu"], "auto, cpu"),
    ],
)
def test_bad_requests(generate: Callable[..., str], arguments: list[str], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        generate(*arguments)
