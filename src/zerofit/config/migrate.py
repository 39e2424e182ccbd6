"""A configuration of another tool, or in an older shape, as a file in zerofit's own keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .derived import SILENCE, Merged, derive
from .dialects import aliases
from .dialects.deepspeed_json import looks_like_deepspeed, read_deepspeed
from .dialects.notes import Note, Reading
from .documents import Entry, read_entries, read_text, write_value
from .keys import keys
from .load import (
    BASE,
    DEEPSPEED,
    FILE,
    read_config_file,
    read_named_deepspeed,
    read_preset,
    refuse_contradictions,
    without_ignored,
)

_LINE = 120


def migrate(source: Path) -> str:
    """YAML in native keys that loads as `source` does, with a comment on what became of each of its keys.

    Args:
        source: YAML or JSON, nanoGPT's Python, or a DeepSpeed JSON (whose model and data stay open). A DeepSpeed JSON
            that it names is taken in.

    Raises:
        ConfigError: as for loading.
    """
    base, merged, notes, is_partial = _read(source)
    title = [f"# Written by `zerofit config migrate {source}`."]
    if is_partial:
        title.append(
            "# A DeepSpeed file says nothing about model and data: add the sections model and data, or a preset."
        )
    lines = [*title, *([f"preset: {base}"] if base else []), *_settings(merged, notes)]
    without = [note for note in notes if not any(name in merged.settings for name in note.targets)]
    if without:
        lines += ["", "# Keys that set nothing here:", *(_comment(note) for note in without)]
    return "\n".join(lines) + "\n"


def _read(source: Path) -> tuple[str | None, Merged, list[Note], bool]:
    """The preset that `source` names, its settings and notes, and whether it is a DeepSpeed JSON alone."""
    if source.suffix == ".json":
        names = {entry.name for entry in read_entries(read_text(source), str(source), frozenset())}
        if looks_like_deepspeed(sorted(names)):
            reading = read_deepspeed(read_text(source), source)
            return None, _merge([(SILENCE, reading.defaults), (DEEPSPEED, reading.entries)]), reading.notes, True
    file = read_config_file(source)
    foreign = read_named_deepspeed(file.entries, (), source)
    refuse_contradictions(file.entries, foreign.entries, ())
    own = file.reading or Reading()
    # What DeepSpeed takes in silence yields to the preset, which the new file names too.
    named = {entry.name for entry in read_preset(file.base)} if file.base else set()
    silence = [entry for entry in foreign.defaults if entry.name not in named]
    layers = [(SILENCE, silence), (BASE, list(file.defaults)), (FILE, own.entries), (DEEPSPEED, foreign.entries)]
    merged = _merge(layers)
    return file.base, merged, without_ignored([*own.notes, *foreign.notes], merged), False


def _merge(layers: Sequence[tuple[int, Sequence[Entry]]]) -> Merged:
    merged = Merged()
    for level, entries in layers:
        for entry in entries:
            merged.put(entry, level)
    derive(merged, DEEPSPEED)
    merged.drop(aliases.DEEPSPEED_FILE)
    return merged


def _settings(merged: Merged, notes: Sequence[Note]) -> Iterator[str]:
    """``key: value  # what it was``, keys outside any section first."""
    section, order = "", list(keys())
    for name in sorted(merged.settings, key=lambda name: ("." in name, order.index(name))):
        outer, _, leaf = name.rpartition(".")
        if outer != section:
            section = outer
            yield f"{outer}:"
        line = f"{'  ' if outer else ''}{leaf}: {write_value(merged.settings[name].value)}"
        was = [note for note in notes if name in note.targets and note.outcome not in ("auto", "overridden")]
        said = [_was(note, leaf) for note in was] or [merged.settings[name].origin]
        comment = "; ".join(part for part in said if part)
        if len(line) + len(comment) > _LINE:
            yield f"{'  ' if outer else ''}# {comment}"
            comment = ""
        yield f"{line}  # {comment}" if comment else line


def _was(note: Note, leaf: str) -> str:
    same = note.key == leaf and not note.remark
    return "" if same else f"{note.key} {_text(note.value)}{f': {note.remark}' if note.remark else ''}"


def _comment(note: Note) -> str:
    what = note.remark or {"auto": "left open", "used": "as here"}.get(note.outcome, note.outcome)
    return f"#   {note.key} {_text(note.value)} ({note.origin}): {what}"


def _text(value: object) -> str:
    text = value if isinstance(value, str) else write_value(value) if _is_plain(value) else repr(value)
    return " ".join(text.split())


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | list | dict)
