"""Layers, origins, numbers, refusals and the dump of a configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerofit.config.documents import read_scalar, write_value
from zerofit.config.keys import keys
from zerofit.config.load import ResolvedConfig, dump_resolved, load_config
from zerofit.config.presets import preset_names
from zerofit.errors import ConfigError

Write = Callable[..., Path]

#: Text that a YAML file can hold: no lone surrogates, no control characters.
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a configuration file and returns its path."""

    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def load(*overrides: tuple[str, str], source: Path | None = None, preset: str | None = "gpt2") -> ResolvedConfig:
    return load_config(source, preset, overrides)


def refusal(*overrides: tuple[str, str], source: Path | None = None, preset: str | None = "gpt2") -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides, source=source, preset=preset)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("6e-4", 6e-4),
        ("1E5", 1e5),
        ("2.5e+3", 2500.0),
        (".5", 0.5),
        ("-3", -3),
        ("+7", 7),
        ("1:30", "1:30"),
        ("no", "no"),
        ("true", True),
        ("null", None),
        ("2024-01-01", "2024-01-01"),
        ("'1e-4'", "1e-4"),
        ("[a, 1e-4]", ["a", 1e-4]),
        ("a: [", "a: ["),
    ],
)
def test_scalars_are_read_as_yaml_1_2_reads_them(text: str, value: object) -> None:
    read = read_scalar(text)
    assert (read, type(read)) == (value, type(value))


def test_exponents_without_a_point_are_numbers_in_a_file(write: Write) -> None:
    config = load(source=write("optimizer:\n  learning_rate: 1e-4\nzero:\n  reduce_bucket_elements: 5e8\n")).config
    assert config.optimizer.learning_rate == 1e-4
    assert config.zero.reduce_bucket_elements == 500_000_000


def test_later_layers_win_and_every_value_knows_its_origin(write: Write) -> None:
    source = write("preset: gpt2\nmodel:\n  n_layer: 6\n  n_head: 8\nseed: 7\n")
    resolved = load(("n-layer", "3"), source=source, preset=None)
    assert (resolved.config.model.n_layer, resolved.config.model.n_head, resolved.config.model.n_embd) == (3, 8, 768)
    assert resolved.origins["model.n_layer"] == "command line"
    assert resolved.origins["model.n_head"] == f"{source}:4"
    assert resolved.origins["model.n_embd"] == "preset gpt2"
    assert resolved.origins["model.bias"] == "default"
    kinds = {"model": resolved.config.model.kind, "data": resolved.config.data.kind}
    present = {n for n, key in keys().items() if not key.kinds or kinds[n.partition(".")[0]] in key.kinds}
    assert resolved.origins.keys() == present


def test_a_preset_on_the_command_line_replaces_the_one_in_the_file(write: Write) -> None:
    assert load(source=write("preset: gpt2\n"), preset="gpt2_medium").config.model.n_layer == 24


@pytest.mark.parametrize("indent", [2, "\t"])
def test_json_is_read_too(write: Write, indent: int | str) -> None:
    text = json.dumps({"optimizer": {"learning_rate": 1e-7}, "data": {"path": "a\\b"}}, indent=indent)
    config = load(source=write(text, "run.json")).config
    assert (config.optimizer.learning_rate, str(config.data.path)) == (1e-7, "a\\b")


@pytest.mark.parametrize(
    ("spelled", "name"),
    [("learning-rate", "optimizer.learning_rate"), ("model.n-layer", "model.n_layer"), ("max_steps", "max_steps")],
)
def test_short_names_dashes_and_dots(spelled: str, name: str) -> None:
    assert load((spelled, "3")).origins[name] == "command line"


def test_text_on_the_command_line_needs_no_quotes() -> None:
    config = load(("name", "2024"), ("sample_prompt", "ROMEO: "), ("prepare", "plays.txt")).config
    assert (config.name, config.sample_prompt, config.data.prepare) == ("2024", "ROMEO: ", ("plays.txt",))
    assert load(("sample_prompt", r'"a\nb"')).config.sample_prompt == "a\nb"
    assert load(("name", "x"), ("name", "null")).config.name is None


@pytest.mark.parametrize("preset", preset_names())
def test_a_dump_names_origins_and_loads_again_to_the_same_configuration(write: Write, preset: str) -> None:
    resolved = load(("eps", "1e-12"), ("name", "1e-4"), ("sample_prompt", "'# no\n'"), preset=preset)
    dump = dump_resolved(resolved)
    assert load(source=write(dump), preset=None).config == resolved.config
    model = resolved.config.model
    assert f"  {model.depth_key}: {getattr(model, model.depth_key)}  # preset {preset}\n" in dump
    assert "seed: 1337  # default\n" in dump
    assert dump.count("  # ") == len(resolved.origins)


@given(TEXTS | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none() | st.lists(TEXTS))
def test_written_values_are_read_back(value: object) -> None:
    line = write_value(value)
    assert "\n" not in line
    assert read_scalar(f"{line}  # origin") == value


@given(st.floats(min_value=1e-300, max_value=1e300), st.sampled_from(["{!r}", "{:.17e}", "{:.17E}"]))
def test_any_way_to_write_a_float_is_that_float(value: float, form: str) -> None:
    assert load(("learning_rate", form.format(value))).config.optimizer.learning_rate == value


@given(TEXTS.filter(lambda text: text not in ("null", "~") and not text.startswith(("'", '"'))))
def test_any_text_is_taken_as_it_was_typed(text: str) -> None:
    assert load(("sample_prompt", text)).config.sample_prompt == text


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rte", "optimizer.learning_rate"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("model.n_layerz", "model.n_layer"),
        ("max_step", "max_steps"),
        ("global_batch_size", "global_batch"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(key: str, nearest: str) -> None:
    message = refusal((key, "1"))
    assert f"{key!r} is not a configuration key" in message
    assert f"nearest known key is {nearest};" in message


def test_an_unknown_key_in_a_file_names_its_line(write: Write) -> None:
    source = write("model:\n  n_layer: 2\n  n_heads: 4\n")
    assert refusal(source=source).startswith(f"{source}:3: 'model.n_heads' is not")


def test_a_name_in_several_sections_is_refused_with_the_candidates() -> None:
    assert "could mean model.kind, data.kind" in refusal(("kind", "gpt2"))


def test_a_section_is_no_key() -> None:
    assert "optimizer is a section; its keys are optimizer.kind" in refusal(("optimizer", "adamw"))


@pytest.mark.parametrize(
    ("key", "text", "found", "rule"),
    [
        ("n_layer", "four", "the text 'four'", "a whole number of at least 1 (default 12)"),
        ("n_layer", "4.5", "the number 4.5", "a whole number of at least 1"),
        ("n_layer", "0", "the number 0", "a whole number of at least 1"),
        ("n_layer", "true", "true", "a whole number"),
        ("learning_rate", "fast", "the text 'fast'", "a number above 0"),
        ("learning_rate", "[1]", "the list [1]", "a number above 0"),
        ("beta1", "1.5", "the number 1.5", "a number of at least 0 and below 1"),
        ("compile", "3", "the number 3", "true or false"),
        ("strategy", "zero4", "the text 'zero4'", "single, ddp, zero1, zero2, zero3, fsdp2 or auto (default auto)"),
        ("eval_interval", "often", "the text 'often'", "a whole number of at least 1, never or epoch"),
        ("micro_batch", "-1", "the number -1", "a whole number of at least 1 or null"),
    ],
)
def test_a_wrong_value_is_said_in_words(key: str, text: str, found: str, rule: str) -> None:
    message = refusal((key, text))
    assert "\n" not in message
    assert message.startswith("command line: ")
    assert f"{key} was set to {found}, and it takes {rule}" in message


def test_a_number_where_text_belongs_asks_for_quotes(write: Write) -> None:
    source = write("name: 2024\n")
    assert f"{source}:1: name was set to the number 2024" in (message := refusal(source=source))
    assert message.endswith("Put it in quotes to make it text.")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("seed: 1\nseed: 2\n", ":2: the key seed stands already at"),
        ("max_steps: 1\nmax-steps: 2\n", ":2: max-steps sets max_steps, which stands already at"),
        ("model:\n  n_layer: 1\n  n_layer: 2\n", ":3: the key model.n_layer stands already at"),
        ("model:\n\t n_layer: 1\n", ":2 cannot be read as YAML or JSON"),
        ("- model\n", ":1: a configuration must hold keys"),
        ("model: 3\n", ":1: model must hold keys"),
        ("seed: {a: 1}\n", ":1: seed was set to a section with keys"),
        ("preset: [a]\n", ":1: preset takes a preset's name"),
        ("name: \x00\n", "is not a text file in UTF-8"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(write: Write, text: str, complaint: str) -> None:
    assert complaint in refusal(source=write(text))


def test_a_missing_file_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(source=tmp_path / "absent.yaml")
    (tmp_path / "model.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in refusal(source=tmp_path / "model.yaml")


def test_empty_sections_are_empty(write: Write) -> None:
    assert load(source=write("model:\noptimizer: {}\n")).config == load().config


def test_nothing_to_run_is_said_with_the_way_out() -> None:
    assert "Nothing sets model" in refusal(preset=None)
    assert "--preset" in refusal(("n_layer", "2"), preset=None)
    assert "Nothing sets data" in refusal(("n_layer", "2"), preset=None)


def test_an_unknown_preset_names_the_nearest_and_all() -> None:
    message = refusal(preset="gpt2-x")
    assert "did you mean gpt2_xl?" in message
    assert "shakespeare_char" in message


OFFLOAD, PARAMETERS, NVME = "only ZeRO moves", "only ZeRO-3 partitions", "under ZeRO-3 only"


@pytest.mark.parametrize(
    ("strategy", "offload", "parameters", "rule"),
    [
        ("single", "cpu", "none", OFFLOAD),
        ("single", "nvme", "none", OFFLOAD),
        ("ddp", "cpu", "none", OFFLOAD),
        ("ddp", "nvme", "none", OFFLOAD),
        ("fsdp2", "cpu", "none", OFFLOAD),
        ("fsdp2", "none", "cpu", PARAMETERS),
        ("zero1", "nvme", "none", NVME),
        ("zero2", "nvme", "none", NVME),
        ("auto", "nvme", "none", NVME),
        ("single", "none", "cpu", PARAMETERS),
        ("zero1", "cpu", "cpu", PARAMETERS),
        ("zero2", "cpu", "cpu", PARAMETERS),
        ("zero2", "cpu", "nvme", PARAMETERS),
        ("zero3", "none", "cpu", "only after the optimizer states"),
    ],
)
def test_an_offload_that_a_strategy_lacks_is_refused(strategy: str, offload: str, parameters: str, rule: str) -> None:
    message = refusal(
        ("strategy", strategy), ("offload", offload), ("offload_parameters", parameters), ("nvme_path", "nvme")
    )
    assert rule in message
    assert f"strategy {strategy}" in message or strategy == "zero3"


@pytest.mark.parametrize(
    ("strategy", "offload", "parameters"),
    [("zero1", "cpu", "none"), ("zero2", "cpu", "none"), ("zero3", "cpu", "cpu"), ("zero3", "nvme", "nvme")],
)
def test_an_offload_that_a_strategy_has_is_taken(strategy: str, offload: str, parameters: str) -> None:
    overrides = ("strategy", strategy), ("offload", offload), ("offload_parameters", parameters), ("nvme_path", "nvme")
    assert load(*overrides).config.offload == offload


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        ([("strategy", "zero3"), ("offload", "nvme")], "set nvme_path"),
        ([("n_head", "7")], "is not a multiple of n_head 7"),
        ([("strategy", "zero3"), ("compile", "true")], "gradients came out wrong"),
        ([("compile", "true"), ("compile_mode", "reduce-overhead")], "overwrite each other's outputs"),
    ],
)
def test_rules_over_several_keys_speak_for_themselves(overrides: list[tuple[str, str]], rule: str) -> None:
    assert rule in refusal(*overrides)


def test_every_key_documents_itself() -> None:
    undocumented = [key.name for key in keys().values() if not key.description and not key.name.endswith(".kind")]
    assert undocumented == []


def test_the_kind_of_model_decides_its_keys(tmp_path: Path) -> None:
    source = tmp_path / "run.yaml"
    source.write_text("model:\n  d_model: 64\n  n_layers: 2\n  vocab_size: 65\ndata:\n  path: x\nmicro_batch: 1\n")
    found = load_config(source, None)
    assert found.config.model.kind == "mamba"  # the first kind that has all of the keys
    assert "model.n_head" not in found.origins
    again = tmp_path / "again.yaml"
    again.write_text(dump_resolved(found))
    assert load_config(again, None).config == found.config


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "run.yaml"
    source.write_text("model:\n  kind: mamba\n  n_head: 4\ndata:\n  path: x\n")
    with pytest.raises(ConfigError, match=r"run.yaml:3: model.n_head is a setting of model.kind gpt2") as refused:
        load_config(source, None)
    assert "d_state" in str(refused.value)
    with pytest.raises(ConfigError, match=r"Its counterpart there is model\.n_layers\. Take it out"):
        load_config(None, "mamba_130m", [("model.n_layer", "12")])
    with pytest.raises(ConfigError, match=r"model.kind was set to the text 'rwkv'"):
        load_config(source, None, [("model.kind", "rwkv")])
    source.write_text("model:\n  kind: mamba\n  d_state: 0\ndata:\n  path: x\n")
    with pytest.raises(ConfigError, match=r"run.yaml:3: model.d_state was set to the number 0"):
        load_config(source, None)


@pytest.mark.parametrize("name", sorted(keys()))
def test_a_refusal_is_one_paragraph(name: str) -> None:
    """It quotes the key's description, which has the line breaks of its source file."""
    assert "\n" not in keys()[name].description
    with pytest.raises(ConfigError) as found:
        load((name, "{a: [1, {b: 2}]}"), ("data.kind", "text"))
    assert "\n" not in str(found.value)
