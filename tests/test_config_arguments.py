"""What the verbs and the worker make of their arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerofit.config.arguments import Request, parse_arguments
from zerofit.config.keys import keys
from zerofit.errors import ConfigError


def parse(line: str) -> Request:
    return parse_arguments(line.split())


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        ("", Request()),
        ("run.yaml", Request(source=Path("run.yaml"))),
        ("--config run.yaml --preset gpt2", Request(source=Path("run.yaml"), preset="gpt2")),
        ("--dry-run --json --debug", Request(dry_run=True, as_json=True, debug=True)),
        ("--run runs/a --resume", Request(run=Path("runs/a"), resume="latest")),
        ("--resume best", Request(resume="best")),
        ("--resume=runs/a/checkpoints/step-000100", Request(resume="runs/a/checkpoints/step-000100")),
        ("--resume run.yaml", Request(resume="latest", source=Path("run.yaml"))),
        ("--resume --seed 1", Request(resume="latest", overrides=(("seed", "1"),))),
        ("--local_rank 3 --seed 1", Request(overrides=(("seed", "1"),))),
        ("--local-rank=3", Request()),
        ("--bf16", Request(overrides=(("precision", "bf16"),))),
        ("--seed -1", Request(overrides=(("seed", "-1"),))),
        ("--sample-prompt=--a=b", Request(overrides=(("sample_prompt", "--a=b"),))),
        ("--compile run.yaml", Request(source=Path("run.yaml"), overrides=(("compile", "true"),))),
        ("--compile true", Request(overrides=(("compile", "true"),))),
        ("--compile false", Request(overrides=(("compile", "false"),))),
        ("--cuda-graphs auto", Request(overrides=(("cuda_graphs", "auto"),))),
        ("--zero.pin_memory null", Request(overrides=(("zero.pin_memory", "null"),))),
        ("--cuda-graphs run.yaml", Request(source=Path("run.yaml"), overrides=(("cuda_graphs", "true"),))),
        ("--no-compile --no_bias", Request(overrides=(("compile", "false"), ("model.bias", "false")))),
        ("--zero.no-such-thing", None),
    ],
)
def test_arguments(line: str, request_: Request | None) -> None:
    if request_ is None:
        with pytest.raises(ConfigError):
            parse(line)
    else:
        assert parse(line) == request_


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("a.yaml b.yaml", "Two configuration files were given, a.yaml and b.yaml"),
        ("a.yaml --config b.yaml", "Two configuration files"),
        ("--seed", "--seed was given without its value"),
        ("--seed --compile", "--seed was given without its value"),
        ("--preset", "--preset was given without its value"),
        ("-x", "-x was given, and options are spelt out with two dashes"),
        ("--dry-run=yes", "--dry-run takes no value"),
        ("--fp16=1", "--fp16 takes no value"),
        ("--no-seed", "seed takes a whole number"),
        ("--no-compile=1", "takes no value"),
        ("--learning-rte 1", "nearest known key is optimizer.learning_rate"),
        ("--no-compil", "nearest known key is compile"),
        ("--no-such-key", r"\(--no-such-key\): 'such_key' is not a configuration key"),
    ],
)
def test_refusals(line: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse(line)


def test_the_run_is_named_after_the_preset_or_the_file() -> None:
    names = [parse(line).default_name for line in ("--preset gpt2", "conf/mine.yaml", "--seed 1")]
    assert names == ["gpt2", "mine", "run"]


@given(
    st.sampled_from([key for key in keys().values() if not key.is_boolean]),
    st.text().filter(lambda text: not text.startswith("--")),
    st.booleans(),
    st.booleans(),
)
def test_any_key_takes_any_text_in_either_form(key: object, text: str, attached: bool, dashes: bool) -> None:
    name = key.name  # type: ignore[attr-defined]
    option = "--" + (name.replace("_", "-") if dashes else name)
    argv = [f"{option}={text}"] if attached else [option, text]
    assert parse_arguments([*argv, "run.yaml"]) == Request(source=Path("run.yaml"), overrides=((name, text),))
