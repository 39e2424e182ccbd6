"""Help for everything that ``train`` and ``plan`` take, from the schema's own docstrings."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic_core import PydanticUndefined

from ..config.dialects.aliases import rows
from ..config.documents import write_value
from ..config.keys import Key, keys, sections


def flag_rows() -> list[tuple[str, str]]:
    """The flags that are no configuration keys."""
    return [
        ("CONFIG, --config FILE", "YAML, JSON or nanoGPT's config/*.py; `preset: NAME` in it names its base."),
        ("--deepspeed-config FILE", "A DeepSpeed JSON: each of its keys is used, translated or named, in a table."),
        ("--preset NAME", "Start from a preset; `zerofit presets` lists them."),
        ("--fp32, --bf16, --fp16", "Short for --precision."),
        ("--resume [WHICH]", "train: continue a run from `latest` (default), `best`, a tag, a step or a path."),
        ("--load-checkpoint PATH", "train: start a new run from a checkpoint of zerofit's or of another tool."),
        ("--weights-only", "train: with --load-checkpoint, take the weights alone; fresh optimizer and schedule."),
        ("--dry-run", "train: stop before anything is started or written to a run folder."),
        ("--gpus N", "plan: GPUs of one node of described hardware."),
        ("--gpu KIND", "plan: h200, h100, a100-80, rtx4090, rtx3090, l4, t4, v100-16, …"),
        ("--gpu-memory SIZE", "plan: memory of one GPU, as 24GiB, 24GB or 24564MiB."),
        ("--nodes N", "plan: nodes of described hardware."),
        ("--link LINK", "plan: nvlink, pcie, ethernet:100gbit or infiniband:400gbit; two of them with a comma."),
        ("--host-memory SIZE, --cpu-cores N", "plan: of one described node."),
        ("--disk SIZE, --nvme SIZE", "plan: free where checkpoints and offloaded states go."),
        ("--explain", "plan: every formula and its source."),
        ("--all", "plan: every candidate, not one a strategy."),
        ("--calibrate", "plan: measure this machine's GPUs once, and remember."),
        ("--ledger", "plan: predicted beside measured, shipped and of your own runs."),
        ("--check-memory", "train: run a few steps, and print predicted beside measured."),
        ("--json", "plan: print JSON."),
        ("--debug", "Show the traceback of an error."),
        ("-h, --help", "Show this message."),
    ]


def alias_rows() -> list[tuple[str, str]]:
    """Familiar names of other tools: what they are here."""
    return [(f"--{name}", f"{dialects}: {becomes}.") for name, dialects, becomes in rows()]


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
