"""What became of the keys of other tools, as people and programs read it: each with the value that is in effect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..config.dialects.notes import Note
from ..config.documents import write_value
from ..config.schema import Config
from .plan import Plan

#: Rows that a person should not overlook.
_STYLES = {"removed": "yellow", "overridden": "yellow", "ignored": "dim"}


def print_translation(console: Console, notes: Sequence[Note], config: Config, plan: Plan | None) -> None:
    """The table; nothing when every name was zerofit's own."""
    if notes:
        console.print(translation_table(notes, config, plan))


def translation_table(notes: Sequence[Note], config: Config, plan: Plan | None) -> Table:
    """One row a key: as it stands there, what it is here, and what to know.

    Args:
        notes: of `ResolvedConfig`.
        config: the configuration that came of them.
        plan: where there is one, what it decided for values left open.
    """
    table = Table(title="Keys of other tools, and what became of them", box=box.SIMPLE_HEAD, header_style="bold",
                  title_justify="left", pad_edge=False)  # fmt: skip
    table.add_column("key", overflow="fold")
    table.add_column("value", overflow="fold")
    table.add_column("from", overflow="fold")
    table.add_column("is", no_wrap=True)
    table.add_column("here", overflow="fold")
    for note in notes:
        here = "; ".join(f"{name} {_text(value)}" for name, value in effective(note, config, plan).items())
        parts = [part for part in (here, note.remark) if part]
        table.add_row(
            *map(escape, (note.key, _text(note.value), PurePath(note.origin).name, note.outcome, ": ".join(parts))),
            style=_STYLES.get(note.outcome),
        )
    return table


def translation_json(notes: Sequence[Note], config: Config, plan: Plan | None) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "key": note.key,
            "value": note.value if isinstance(note.value, str | int | float | list | dict | None) else repr(note.value),
            "origin": note.origin,
            "outcome": note.outcome,
            "here": effective(note, config, plan),
            "remark": note.remark,
        }
        for note in notes
    ]


def effective(note: Note, config: Config, plan: Plan | None) -> dict[str, Any]:
    """zerofit's keys that the note names, each with its value: the plan's where the configuration leaves it open."""
    return {name: _value(name, config, plan) for name in note.targets}


def _value(name: str, config: Config, plan: Plan | None) -> Any:
    section, _, leaf = name.rpartition(".")
    holder: Any = getattr(config, section, None) if section else config
    wish = getattr(holder, leaf, None)
    decided = _decided(section, leaf, plan)
    value = decided if wish in (None, "auto") and decided is not None else wish
    if leaf == "decay_steps" and value is None:
        value = config.max_steps
    return (
        list(value) if isinstance(value, tuple) else value if value is None or isinstance(value, _PLAIN) else str(value)
    )


_PLAIN = (bool, int, float, str, list)


def _decided(section: str, leaf: str, plan: Plan | None) -> Any:
    if plan is None:
        return None
    if section == "zero":
        return getattr(plan.zero, leaf, None)
    return None if section else getattr(plan, leaf, None)


def _text(value: object) -> str:
    if value is None:
        return "not decided"
    return (
        value if isinstance(value, str) else write_value(value) if isinstance(value, (*_PLAIN, dict)) else repr(value)
    )
