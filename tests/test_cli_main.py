"""The command line as a process: help, exit codes, messages, presets."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zerofit.cli.main import VERBS
from zerofit.config.keys import keys
from zerofit.config.presets import preset_names


def zerofit(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zerofit.cli.main", *arguments], capture_output=True, text=True, timeout=60, cwd=cwd
    )


def test_help_answers_within_half_a_second_and_names_every_verb() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = zerofit("--help")
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout and verb.help in done.stdout for name, verb in VERBS.items())
    assert min(seconds) < 0.5


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_can_be_called_for_help(name: str) -> None:
    done = zerofit(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: zerofit {name} " in done.stdout


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_help_of_a_configured_verb_documents_every_key(verb: str) -> None:
    words = zerofit(verb, "--help").stdout.split()
    assert {f"--{name}" for name in keys()} - set(words) == set()
    assert "SGD 0.1 and more. [a number above 0; default 0.0006]" in " ".join(words)


def test_version() -> None:
    from zerofit import __version__

    assert zerofit("--version").stdout == f"zerofit {__version__}\n"
    assert zerofit("version").stdout.startswith(f"zerofit {__version__}\npython 3.")
    assert json.loads(zerofit("version", "--json").stdout)["torch"] == importlib.metadata.version("torch")


def test_the_package_can_be_run_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "zerofit", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, zerofit("--version").stdout)


def test_a_misspelt_verb_names_the_nearest_one() -> None:
    done = zerofit("trian")
    assert done.returncode == 2
    assert "Did you mean 'train'?" in done.stderr


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("xqz", "zerofit: No such command 'xqz'. There are: train, plan, "),
        ("checkpoint lst", "zerofit checkpoint: No such command 'lst'. Did you mean 'list'?"),
        ("--versoin", "zerofit has no option --versoin. The nearest is --version. `zerofit --help`"),
        ("eval", "zerofit eval: Missing argument 'RUN'. It is called as `zerofit eval [OPTIONS] RUN`"),
        ("checkpoint tag runs/a", "zerofit checkpoint tag: Missing argument 'NAME'."),
        ("eval a --micro_batches 3", "zerofit eval has no option --micro_batches. The nearest is --micro-batch. `"),
        ("eval a --colour", "zerofit eval has no option --colour. Its options are --checkpoint, --weights, --data, "),
        ("eval a --micro-batch x", "zerofit eval --micro-batch x was asked for. Invalid value for '--micro-batch': "),
        ("data prepare a --val-fraction=2", "zerofit data prepare --val-fraction=2 was asked for. Invalid value"),
        ("data prepare a --split middle", "'middle' is not one of 'tail', 'documents'. `zerofit data prepare --help`"),
        ("data prepare a --out", "zerofit data prepare: Option '--out' requires an argument. `zerofit data prepare -"),
        ("presets gpt2 more", "zerofit presets: Got unexpected extra argument"),
        ("generate", "zerofit generate: Missing argument 'RUN'."),
    ],
)
def test_typers_own_errors_are_one_paragraph_too(typed: str, said: str) -> None:
    done = zerofit(*typed.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    # Versions of typer write the names of arguments in braces or capitals.
    assert said.lower() in done.stderr.replace("{", "").replace("}", "").lower()


def test_an_error_is_one_paragraph_on_stderr_with_its_exit_code() -> None:
    done = zerofit("train", "--preset", "gpt2", "--learning-rte", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "nearest known key is optimizer.learning_rate" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--debug", "train", "--no-such"], ["train", "--no-such", "--debug"], ["eval", "--no-such", "--debug"]],
)
def test_debug_shows_the_traceback_and_keeps_the_exit_code(arguments: list[str]) -> None:
    done = zerofit(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback")


def test_train_without_a_job_lists_the_presets(tmp_path: Path) -> None:
    done = zerofit("train", cwd=tmp_path)
    assert done.returncode == 2
    assert all(name in done.stderr for name in preset_names())
    assert "holds" not in done.stderr


def test_train_beside_class_folders_names_the_command(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
    done = zerofit("train", cwd=tmp_path)
    assert done.returncode == 2
    assert "holds 2 folders" in done.stderr
    assert "--preset animals90 --model.num_classes 2" in done.stderr


@pytest.mark.parametrize("option", [["--json"], ["--run", "x"]])
def test_train_refuses_what_it_does_not_have(option: list[str]) -> None:
    done = zerofit("train", "--preset", "gpt2", *option)
    assert done.returncode == 2
    assert "zerofit plan --json" in done.stderr


def test_presets_are_listed_with_their_parameters() -> None:
    listed = zerofit("presets").stdout
    # 124,439,808 parameters and 47 padding rows of 768.
    assert "  124,475,904  GPT-2 124M" in listed
    assert "801,536 + 128 a token" in listed
    # Whole sentences, over as many lines of the file as they take.
    assert all(line.endswith(".") for line in listed.splitlines())


def test_a_preset_is_printed_as_yaml_and_as_json() -> None:
    assert "learning_rate: 6e-4 #" in zerofit("presets", "gpt2").stdout
    assert json.loads(zerofit("presets", "gpt2", "--json").stdout)["optimizer"]["learning_rate"] == 6e-4
    assert json.loads(zerofit("presets", "--json").stdout).keys() == set(preset_names())


def test_an_unknown_preset_is_refused() -> None:
    done = zerofit("presets", "gpt3")
    assert done.returncode == 2
    assert "The presets are animals90, gpt2" in done.stderr
