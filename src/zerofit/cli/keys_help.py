"""Help for everything that ``train`` and ``plan`` take, from the schema's own docstrings."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic_core import PydanticUndefined

from ..config.documents import write_value
from ..config.keys import Key, keys, sections


def flag_rows() -> list[tuple[str, str]]:
    """The flags that are no configuration keys."""
    return [
        ("CONFIG, --config FILE", "YAML or JSON; `preset: NAME` in it names its base."),
        ("--preset NAME", "Start from a preset; `zerofit presets` lists them."),
        ("--fp32, --bf16, --fp16", "Short for --precision."),
        ("--resume [WHICH]", "train: continue a run from `latest` (default), `best`, a tag, a step or a path."),
        ("--load-checkpoint PATH", "train: start a new run from a checkpoint of zerofit's or of another tool."),
        ("--weights-only", "train: with --load-checkpoint, take the weights alone; fresh optimizer and schedule."),
        ("--dry-run", "train: stop before anything is started or written to a run folder."),
        ("--json", "plan: print JSON."),
        ("--debug", "Show the traceback of an error."),
        ("-h, --help", "Show this message."),
    ]


def key_rows() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Title and rows of each group of keys, those outside any section first."""
    yield "Configuration keys (dashes and underscores are the same; short names work where unique)", _rows("")
    for section, description in sections().items():
        yield f"{section}: {description}", _rows(section)


def _rows(section: str) -> list[tuple[str, str]]:
    return [(f"--{key.name}", _describe(key)) for key in keys().values() if key.name.rpartition(".")[0] == section]


def _describe(key: Key) -> str:
    default = "required" if key.default is PydanticUndefined else f"default {write_value(key.plain_default)}"
    return f"{key.description} [{key.rule}; {default}]".lstrip().replace("``", "`")
