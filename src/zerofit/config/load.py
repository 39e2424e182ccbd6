"""From files, presets and overrides to one frozen `Config`, with the origin of every value.

Later layers win: default < preset < file < command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from ..errors import ConfigError
from .documents import Entry, describe_value, read_entries, read_scalar, read_text, write_value
from .keys import Key, find_key, keys, kinds, sections
from .optimizers import OPTIMIZER_DEFAULTS
from .presets import preset_text
from .schema import Config

DEFAULT = "default"
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration and where each of its values came from.

    Attributes:
        config: the wishes.
        origins: dotted key -> ``default`` | ``preset NAME`` | ``FILE:LINE`` | ``command line``.
    """

    config: Config
    origins: dict[str, str]


def load_config(
    source: Path | None,
    preset: str | None,
    overrides: Sequence[tuple[str, str]] = (),
    fallbacks: Sequence[tuple[str, str]] = (),
) -> ResolvedConfig:
    """Merge a preset, a file and overrides, and validate the outcome.

    Args:
        source: YAML or JSON file; it may name its base with ``preset: NAME``.
        preset: name of a preset; wins over the one that the file names.
        overrides: key and value as typed; the key dotted or short, the value a YAML scalar. The last one wins.
        fallbacks: the same, for what nothing else sets.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a wrong type or value, an illegal combination.
    """
    base, entries = _read_file(source)
    low, high = ([_read_override(name, text) for name, text in typed] for typed in (fallbacks, overrides))
    layers = low, _read_preset(preset or base), entries, high
    settings: dict[str, Entry] = {}
    for layer in layers:
        entries_of_layer = {entry.name: entry for entry in layer}
        settings = _of_the_same_optimizer(settings, entries_of_layer) | entries_of_layer
    config = _validate(settings)
    present = [key for key in keys().values() if not key.kinds or _kind_in(config, key) in key.kinds]
    origins = {key.name: settings[key.name].origin if key.name in settings else DEFAULT for key in present}
    return ResolvedConfig(config, origins)


def _of_the_same_optimizer(below: dict[str, Entry], layer: dict[str, Entry]) -> dict[str, Entry]:
    """`below` without the constants (betas and the like) of another optimizer than the one that `layer` chooses."""
    kind = layer.get("optimizer.kind")
    before = below["optimizer.kind"].value if "optimizer.kind" in below else "adamw"
    if kind is None or kind.value == before:
        return below
    constants = {f"optimizer.{name}" for fields in OPTIMIZER_DEFAULTS.values() for name in fields}
    return {name: entry for name, entry in below.items() if name not in constants}


def _kind_in(config: Config, key: Key) -> str:
    kind: str = getattr(config, key.name.partition(".")[0]).kind
    return kind


def dump_resolved(resolved: ResolvedConfig) -> str:
    """YAML with the origin of every value as a comment; `load_config` reads it back as the same configuration."""
    values = resolved.config.model_dump(mode="json")
    lines = ["# Every value of this run, and where it came from."]
    section = ""
    # Keys outside any section first: after a section's heading, YAML would take them for its own by eye.
    for name in sorted(resolved.origins, key=lambda name: "." in name):
        outer, _, leaf = name.rpartition(".")
        if outer != section:
            section = outer
            lines.append(f"{'  ' * outer.count('.')}{outer.rpartition('.')[2]}:")
        value: Any = values
        for part in name.split("."):
            value = value[part]
        lines.append(f"{'  ' * name.count('.')}{leaf}: {write_value(value)}  # {resolved.origins[name]}")
    return "\n".join(lines) + "\n"


def _read_file(source: Path | None) -> tuple[str | None, list[Entry]]:
    """The preset that the file names, and the file's entries."""
    if source is None:
        return None, []
    entries = list(read_entries(read_text(source), str(source), frozenset(sections())))
    bases = [entry for entry in entries if entry.name == "preset"]
    for base in bases:
        if not isinstance(base.value, str):
            raise ConfigError(
                f"{base.origin}: preset takes a preset's name, and {describe_value(base.value)} was found."
            )
    return (str(bases[0].value) if bases else None), _named(entry for entry in entries if entry.name != "preset")


def _read_preset(name: str | None) -> list[Entry]:
    if name is None:
        return []
    origin = f"preset {name}"
    return [
        Entry(entry.name, entry.value, origin)
        for entry in _named(read_entries(preset_text(name), origin, frozenset(sections())))
    ]


def _named(entries: Iterable[Entry]) -> list[Entry]:
    """The entries under their keys' full names.

    Raises:
        ConfigError: an unknown key, or one that stands there under two spellings.
    """
    found: dict[str, Entry] = {}
    for entry in entries:
        if entry.name in sections() and entry.value in (None, {}):
            continue
        key = find_key(entry.name, entry.origin)
        if key.name in found:
            raise ConfigError(
                f"{entry.origin}: {entry.name} sets {key.name}, which stands already at {found[key.name].origin}. "
                f"Keep one of the two."
            )
        found[key.name] = Entry(key.name, entry.value, entry.origin)
    return list(found.values())


def _read_override(spelled: str, text: str) -> Entry:
    key = find_key(spelled, COMMAND_LINE)
    return Entry(key.name, _read_typed(key, text), COMMAND_LINE)


def _read_typed(key: Key, text: str) -> object:
    """A value from the command line. A key that takes text takes ``2024`` and ``a: b`` too; quotes still quote."""
    is_unset = NoneType in key.types and text in ("null", "~")
    if key.is_text and not is_unset and not text.startswith(("'", '"')):
        return text
    value = read_scalar(text)
    return [text] if tuple in key.types and not isinstance(value, list) else value


def _validate(settings: dict[str, Entry]) -> Config:
    for entry in settings.values():
        # pydantic takes true for 1; nobody who writes it means that.
        if isinstance(entry.value, bool) and not keys()[entry.name].is_boolean:
            raise _wrong_value(keys()[entry.name], entry)
    settings = _with_kinds(settings)
    try:
        return Config.model_validate(_nested(settings))
    except ValidationError as error:
        raise _in_words(error, settings) from error


def _with_kinds(settings: dict[str, Entry]) -> dict[str, Entry]:
    """The settings with the kind of every section that has several: its own, or the first that has all its keys.

    Raises:
        ConfigError: a key of another kind.
    """
    for section in sections():
        known, name = kinds(section), f"{section}.kind"
        given = {entry.name.split(".")[1]: entry for entry in settings.values() if entry.name.startswith(f"{section}.")}
        if not known or not given:
            continue
        if name not in settings:
            fitting = [kind for kind, leaves in known.items() if given.keys() <= leaves]
            settings = {**settings, name: Entry(name, (fitting or list(known))[0], DEFAULT)}
        kind = settings[name].value
        if kind not in known:
            raise _wrong_value(keys()[name], settings[name])
        for leaf, entry in given.items():
            if leaf not in known[str(kind)]:
                owners = " and ".join(sorted(keys()[entry.name].kinds))
                raise ConfigError(
                    f"{entry.origin}: {entry.name} is a setting of {section}.kind {owners}, and {section}.kind is "
                    f"{kind} ({settings[name].origin}). Take it out, or set {section}.kind {owners}; the keys of "
                    f"{kind} are {', '.join(sorted(known[str(kind)] - {'kind'}))}."
                )
    return settings


def _nested(settings: dict[str, Entry]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for entry in settings.values():
        *outer, leaf = entry.name.split(".")
        place = tree
        for part in outer:
            place = place.setdefault(part, {})
        place[leaf] = entry.value
    return tree


def _in_words(error: ValidationError, settings: dict[str, Entry]) -> ConfigError:
    """pydantic's first complaint as one paragraph. A model validator's message is one already."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if len(path) > 1 and path[1] in kinds(path[0]):
        del path[1]
    if first["type"] == "missing":
        return _missing(".".join(path))
    key = next((keys()[name] for end in (3, 2, 1) if (name := ".".join(path[:end])) in keys()), None)
    if first["type"] == "value_error" or key is None:
        return ConfigError(str(first.get("ctx", {}).get("error", first["msg"])))
    return _wrong_value(key, settings[key.name])


def _missing(name: str) -> ConfigError:
    needed = [key for key in keys().values() if key.name == name or key.name.startswith(f"{name}.")]
    examples = " or ".join(f"--{key.name}" for key in needed[:2])
    return ConfigError(
        f"Nothing sets {name}, and there is no run without it. Start from a preset with --preset (`zerofit presets` "
        f"lists them), name a configuration file, or set it with {examples}."
    )


def _wrong_value(key: Key, entry: Entry) -> ConfigError:
    default = "" if key.default in (PydanticUndefined, None) else f" (default {write_value(key.plain_default)})"
    quotes = " Put it in quotes to make it text." if key.is_text and isinstance(entry.value, int | float) else ""
    return ConfigError(
        f"{entry.origin}: {key.name} was set to {describe_value(entry.value)}, and it takes {key.rule}{default}. "
        f"{key.description}{quotes}"
    )
