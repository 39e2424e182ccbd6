"""From files, presets and overrides to one frozen `Config`, with the origin of every value.

Later layers win: default < preset < file < DeepSpeed JSON < command line. A file and a DeepSpeed JSON that contradict
each other are refused. Names of other tools are read through `dialects`, and leave notes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from ..errors import ConfigError
from .derived import SILENCE, Merged, conflicts, derive
from .dialects import aliases
from .dialects.deepspeed_json import looks_like_deepspeed, read_deepspeed
from .dialects.nanogpt import DEFAULT_ORIGIN as NANOGPT_DEFAULT
from .dialects.nanogpt import read_nanogpt
from .dialects.notes import Note, Reading, noted, translated
from .dialects.older_yaml import SECTIONS as OLDER_SECTIONS
from .dialects.older_yaml import is_older, modern_name, read_older
from .documents import Entry, describe_value, read_entries, read_scalar, read_text, write_value
from .keys import Key, find_key, keys, kinds, sections
from .optimizers import OPTIMIZER_DEFAULTS
from .presets import preset_text
from .schema import Config

DEFAULT = "default"
COMMAND_LINE = "command line"
#: Layers in the order in which they win.
BASE, FILE, DEEPSPEED, TYPED = range(SILENCE + 1, SILENCE + 5)


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration and where each of its values came from.

    Attributes:
        config: the wishes.
        origins: dotted key -> ``default`` | ``preset NAME`` | ``FILE:LINE`` | ``command line``.
        notes: what became of each name of another tool.
    """

    config: Config
    origins: dict[str, str]
    notes: tuple[Note, ...] = ()


@dataclass
class ConfigFile:
    """A configuration file.

    Attributes:
        base: the preset that it names.
        defaults: settings of its own dialect that are in effect where it is silent.
        reading: its settings and notes.
        dialect: whose names it uses.
    """

    base: str | None = None
    defaults: tuple[Entry, ...] = ()
    reading: Reading | None = None
    dialect: aliases.Dialect | None = None

    @property
    def entries(self) -> list[Entry]:
        return self.reading.entries if self.reading else []


def load_config(
    source: Path | None,
    preset: str | None,
    overrides: Sequence[tuple[str, str]] = (),
    fallbacks: Sequence[tuple[str, str]] = (),
) -> ResolvedConfig:
    """Merge a preset, a file, a DeepSpeed JSON and overrides, and validate the outcome.

    Args:
        source: YAML or JSON file, or nanoGPT's Python; it may name its base with ``preset: NAME``, and a DeepSpeed
            JSON.
        preset: name of a preset; wins over the one that the file names.
        overrides: key and value as typed; the key dotted or short or a familiar name of another tool, the value a YAML
            scalar. The last one wins.
        fallbacks: the same, for what nothing else sets.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a wrong type or value, an illegal combination, a file
            and a DeepSpeed JSON that contradict each other.
    """
    file = read_config_file(source)
    typed = _read_overrides(overrides, file.dialect)
    name = preset or file.base
    base = read_preset(name) if name else list(file.defaults)
    foreign = read_named_deepspeed(file.entries, typed.entries, source)
    merged = Merged()
    silence = [*_read_overrides(fallbacks, file.dialect).entries, *foreign.defaults]
    layers = silence, base, file.entries, foreign.entries, typed.entries
    for level, layer in enumerate(layers):
        _drop_another_optimizers(merged, layer)
        for entry in layer:
            merged.put(entry, level)
    derive(merged, DEEPSPEED)
    _spare_defaults(merged)
    refuse_contradictions(file.entries, foreign.entries, typed.entries)
    merged.drop(aliases.DEEPSPEED_FILE)
    settings = merged.settings
    config = _validate(settings)
    present = [key for key in keys().values() if not key.kinds or _kind_in(config, key) in key.kinds]
    origins = {key.name: settings[key.name].origin if key.name in settings else DEFAULT for key in present}
    notes = [*(file.reading.notes if file.reading else ()), *foreign.notes, *typed.notes]
    return ResolvedConfig(config, origins, tuple(_settled(note, settings) for note in without_ignored(notes, merged)))


def without_ignored(notes: Sequence[Note], merged: Merged) -> list[Note]:
    """The notes, where those of settings that mean nothing for this kind of data say so."""
    gone = {entry.origin + entry.name: Note(entry.name, entry.value, entry.origin, "ignored", (), why)
            for entry, why in merged.ignored}  # fmt: skip
    notes = [_derived(note, merged) for note in notes]
    kept = [note for note in notes if note.origin + note.key.rpartition(".")[2] not in gone]
    return [*kept, *gone.values()]


def _derived(note: Note, merged: Merged) -> Note:
    """The note, where what the key became followed from other settings."""
    targets, remark = merged.became.get(note.key.rpartition(".")[2], ((), ""))
    if not targets:
        return note
    return replace(note, outcome="translated" if remark else note.outcome, targets=targets, remark=remark)


def refuse_contradictions(file: Iterable[Entry], foreign: Iterable[Entry], typed: Iterable[Entry]) -> None:
    """What a file and a DeepSpeed JSON say differently must be settled on the command line.

    Raises:
        ConfigError: it is not.
    """
    named = [{entry.name: entry for entry in layer} for layer in (file, foreign, typed)]
    found = conflicts(*named)
    if found:
        raise ConfigError(
            f"The configuration and its DeepSpeed file contradict each other: {'; '.join(found)}. Take one of each "
            f'two out, write "auto" in the DeepSpeed file, or say which holds on the command line, where it wins.'
        )


def _spare_defaults(merged: Merged) -> None:
    """nanoGPT compiles by default; under ZeRO-3 nothing can, and a default is no wish."""
    strategy, compiled = merged.settings.get("strategy"), merged.settings.get("compile")
    if strategy and strategy.value == "zero3" and compiled and compiled.origin == NANOGPT_DEFAULT:
        merged.drop("compile")


def _settled(note: Note, settings: Mapping[str, Entry]) -> Note:
    """The note, where a later layer said otherwise."""
    given = [(name, value) for name, value in zip(note.targets, note.values, strict=False) if name in settings]
    others = [settings[name].origin for name, value in given if settings[name].value != value]
    if any(name in keys() and name not in settings for name, _ in zip(note.targets, note.values, strict=False)):
        return replace(note, outcome="overridden", remark="worked out anew: a later layer says the batch otherwise")
    if not others:
        return note
    return replace(note, outcome="overridden", remark=f"{' and '.join(dict.fromkeys(others))} decides")


def _drop_another_optimizers(merged: Merged, layer: Iterable[Entry]) -> None:
    """Where a layer chooses another optimizer, the constants (betas and the like) of the one below mean nothing."""
    kind = next((entry for entry in layer if entry.name == "optimizer.kind"), None)
    before = merged.settings["optimizer.kind"].value if "optimizer.kind" in merged.settings else "adamw"
    if kind is None or kind.value == before:
        return
    for name in {f"optimizer.{name}" for fields in OPTIMIZER_DEFAULTS.values() for name in fields}:
        merged.drop(name)


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


def read_config_file(source: Path | None) -> ConfigFile:
    """What a configuration file says."""
    if source is None:
        return ConfigFile()
    if source.suffix == ".py":
        defaults, reading = read_nanogpt(read_text(source), source)
        return ConfigFile(None, tuple(defaults), reading, aliases.NANOGPT)
    entries = list(read_entries(read_text(source), str(source), frozenset(sections()) | OLDER_SECTIONS))
    names = [entry.name for entry in entries]
    if looks_like_deepspeed(sorted({name.partition(".")[0] for name in names})):
        raise ConfigError(
            f"{source} is a DeepSpeed configuration, which says nothing about model and data. Give it with "
            f"--deepspeed-config {source} beside a configuration or a preset."
        )
    bases = [entry for entry in entries if entry.name == "preset"]
    for base in bases:
        if not isinstance(base.value, str):
            raise ConfigError(
                f"{base.origin}: preset takes a preset's name, and {describe_value(base.value)} was found."
            )
    dialect = aliases.SCRIPT if is_older(names) else aliases.dialect_of(names)
    reading = _named([entry for entry in entries if entry.name != "preset"], dialect)
    return ConfigFile(str(bases[0].value) if bases else None, (), reading, dialect)


def read_preset(name: str) -> list[Entry]:
    """The settings of a preset."""
    origin = f"preset {name}"
    entries = list(read_entries(preset_text(name), origin, frozenset(sections())))
    return [Entry(entry.name, entry.value, origin) for entry in _named(entries, None).entries]


def read_named_deepspeed(file: Iterable[Entry], typed: Iterable[Entry], source: Path | None) -> Reading:
    """The DeepSpeed JSON that the command line or the file names."""
    named = [entry for entry in (*file, *typed) if entry.name == aliases.DEEPSPEED_FILE]
    if not named:
        return Reading()
    path = Path(str(named[-1].value))
    beside = source.parent / path if source is not None else path
    if not path.exists() and named[-1].origin != COMMAND_LINE and beside.exists():
        path = beside
    return read_deepspeed(read_text(path), path)


def _named(entries: Sequence[Entry], dialect: aliases.Dialect | None) -> Reading:
    """The entries under their keys' full names, and notes for names of other tools.

    Raises:
        ConfigError: an unknown key, or one that stands there under two spellings.
    """
    reading, found = Reading(), dict[str, Entry]()
    names = [entry.name for entry in entries]
    for entry in entries:
        if entry.name in sections() and entry.value in (None, {}):
            continue
        part = _read_entry(entry, names, dialect)
        for setting in part.entries:
            if setting.name in found:
                raise ConfigError(
                    f"{setting.origin}: {entry.name} sets {setting.name}, which stands already at "
                    f"{found[setting.name].origin}. Keep one of the two."
                )
            found[setting.name] = setting
        reading.add(part)
    return reading


def _read_entry(entry: Entry, names: list[str], dialect: aliases.Dialect | None) -> Reading:
    """One entry of a file: of an older shape, a familiar name, or zerofit's own."""
    older = read_older(entry, names)
    if older is not None:
        return older
    plain = replace(entry, name=modern_name(entry.name))
    alias = aliases.find_alias(plain.name)
    if dialect == aliases.HUGGING_FACE and (plain.name, plain.value) == ("max_steps", -1):
        reading = noted(plain, "ignored", "-1 leaves the length to num_train_epochs")
    elif alias is not None:
        reading = aliases.read_alias(alias, plain, dialect)
    elif plain.name == entry.name:
        return Reading([Entry(find_key(plain.name, plain.origin).name, plain.value, plain.origin)])
    else:
        reading = translated(plain, [(find_key(plain.name, plain.origin).name, plain.value)])
    return Reading(reading.entries, notes=[replace(note, key=entry.name) for note in reading.notes])


def _read_overrides(overrides: Sequence[tuple[str, str]], dialect: aliases.Dialect | None) -> Reading:
    """What was typed; of two values for one setting the last wins."""
    names = [name.replace("-", "_") for name, _ in overrides]
    if dialect is None:
        dialect = aliases.dialect_of(names)
    if dialect is None and dict(overrides).get("num_gpus") == "1":
        dialect = aliases.SCRIPT  # on one GPU all dialects count alike
    reading = Reading()
    for spelled, text in overrides:
        reading.add(_read_override(spelled, text, dialect))
    last = {entry.name: entry for entry in reading.entries}
    return replace(reading, entries=list(last.values()))


def _read_override(spelled: str, text: str, dialect: aliases.Dialect | None) -> Reading:
    alias = aliases.find_alias(spelled)
    if alias is None:
        aliases.refuse_of_generate(spelled, COMMAND_LINE)
        key = find_key(spelled, COMMAND_LINE)
        return Reading([Entry(key.name, _read_typed(key, text), COMMAND_LINE)])
    value = read_scalar(text)
    reading = aliases.read_alias(alias, Entry(alias.name, value, COMMAND_LINE), dialect)
    return replace(reading, entries=[_as_typed(entry, value, text) for entry in reading.entries])


def _as_typed(entry: Entry, value: object, text: str) -> Entry:
    """A key that takes text takes ``2024`` as it was typed."""
    is_text = entry.name in keys() and keys()[entry.name].is_text
    return replace(entry, value=text) if is_text and entry.value is value and value is not None else entry


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


#: Keys of several kinds of models that mean the same: depth, width, length of a sample.
_COUNTERPARTS = (
    frozenset({"n_layer", "n_layers"}),
    frozenset({"n_embd", "d_model"}),
    frozenset({"block_size", "max_seq_length"}),
)


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
        if not isinstance(kind, str) or kind not in known:
            raise _wrong_value(keys()[name], settings[name])
        for leaf, entry in given.items():
            if leaf not in known[kind]:
                owners = " and ".join(sorted(keys()[entry.name].kinds))
                same = next(
                    (other for names in _COUNTERPARTS if leaf in names for other in names & known[str(kind)]), ""
                )
                out = "Choose a preset of that kind" if entry.origin.startswith("preset ") else "Take it out"
                out = f"Its counterpart there is {section}.{same}. {out}" if same else out
                raise ConfigError(
                    f"{entry.origin}: {entry.name} is a setting of {section}.kind {owners}, and {section}.kind is "
                    f"{kind} ({settings[name].origin}). {out}, or set {section}.kind {owners}; the keys of "
                    f"{kind} are {', '.join(sorted(known[kind] - {'kind'}))}."
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
    if first["type"] == "missing" and len(path) <= 2 and path[0] != "stages":
        return _missing(".".join(path))
    key = next((keys()[name] for end in (3, 2, 1) if (name := ".".join(path[:end])) in keys()), None)
    if key is None or (first["type"] == "value_error" and key.name not in settings):
        return ConfigError(str(first.get("ctx", {}).get("error", first["msg"])))
    inner = path[key.name.count(".") + 1 :] if dict in key.types or key.name == "stages" else []
    if first["type"] == "value_error" or inner:
        return _wrong_inside(key, settings[key.name], inner, first)
    return _wrong_value(key, settings[key.name])


def _wrong_inside(key: Key, entry: Entry, inner: Sequence[str], complaint: Mapping[str, Any]) -> ConfigError:
    """A complaint about a part of a value that is a list or a mapping, or about how its parts go together."""
    place = ".".join((key.name, *inner))
    if complaint["type"] == "extra_forbidden":
        return ConfigError(f"{entry.origin}: {place} is not known. {key.description}")
    if complaint["type"] == "value_error":
        return ConfigError(f"{entry.origin}: {key.name}: {complaint['ctx']['error']}.")
    found = "nothing" if complaint["type"] == "missing" else describe_value(complaint["input"])
    return ConfigError(f"{entry.origin}: {place}: {complaint['msg']}; {found} was found. {key.description}")


def _missing(name: str) -> ConfigError:
    needed = [key for key in keys().values() if key.name == name or key.name.startswith(f"{name}.")]
    examples = " or ".join(f"--{key.name}" for key in needed[: 1 if name == "model" else 2])
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
