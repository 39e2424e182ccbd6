"""YAML in shapes that older training scripts used: a ``training`` section, a ``dataloader`` block, ``model_type``."""

from __future__ import annotations

from ...errors import ConfigError
from ..documents import Entry
from .notes import Reading, noted, translated

#: Sections that are walked into, beside zerofit's own.
SECTIONS = frozenset({"training", "training.dataloader", "training.deepspeed", "training.optimizer", "dataloader"})
_PREFIXES = ("training.dataloader.", "training.deepspeed.", "training.optimizer.", "training.", "dataloader.")


def is_older(names: list[str]) -> bool:
    """Whether a document has one of the shapes."""
    return any(name in ("model_type", *SECTIONS) or name.startswith(_PREFIXES) for name in names)


def modern_name(name: str) -> str:
    """The name without the sections that zerofit does not have: ``training.max_steps`` is ``max_steps``."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return {"training.deepspeed.": "deepspeed_config" if rest == "config_path" else name}.get(prefix, rest)
    return name


def read_older(entry: Entry, names: list[str]) -> Reading | None:
    """What only these shapes have; None for everything else.

    Raises:
        ConfigError: a strategy that no such file names.
    """
    value = entry.value
    match entry.name:
        case "model_type":
            return translated(entry, [("model.kind", value)])
        case "training.distributed":
            if value is False:
                return translated(entry, [("strategy", "single")], "one process")
            return noted(entry, "used", "the strategy is what distributed_strategy or the plan says")
        case "training.distributed_strategy":
            return _strategy(entry, names)
        case "training.deepspeed.enabled":
            return noted(entry, "ignored", "the plan decides whether DeepSpeed is used")
        case "training.dataloader.pin_memory" | "dataloader.pin_memory" | "training.pin_memory":
            return noted(entry, "ignored", "batches are page-locked whenever training is on a GPU")
        case _ if entry.name in SECTIONS and value in (None, {}):
            return noted(entry, "ignored", "an empty section")
    return None


def _strategy(entry: Entry, names: list[str]) -> Reading:
    match entry.value:
        case "auto":
            return translated(entry, [("strategy", "auto")])
        case "ddp":
            return translated(entry, [("strategy", "ddp")])
        case "deepspeed" if "training.deepspeed.config_path" in names:
            return noted(entry, "used", "the stage is that of deepspeed.config_path", "strategy")
        case "deepspeed":
            return translated(entry, [("strategy", "zero2")], "without deepspeed.config_path: ZeRO-2")
    raise ConfigError(
        f"{entry.origin}: distributed_strategy was set to {entry.value!r}, and it takes auto, ddp or deepspeed; "
        f"zerofit's own names are those of the key strategy."
    )
