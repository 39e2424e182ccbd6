"""The schema as a table of dotted keys: what the command line, the error messages and the help know about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..errors import ConfigError
from .schema import Config

_BOUNDS = {Ge: ("ge", "of at least"), Gt: ("gt", "above"), Le: ("le", "of at most"), Lt: ("lt", "below")}
_NOUNS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "null",
}


@dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
        name: dotted, as in ``optimizer.learning_rate``.
        rule: the values it takes, in words.
        description: the field's docstring, without its line breaks.
        default: in effect when nothing sets it; ``PydanticUndefined`` for what a run cannot do without.
        types: the plain types it takes, `NoneType` among them when it may be unset.
        kinds: values of its section's ``kind`` that have it; empty where the section has only one kind.
    """

    name: str
    rule: str
    description: str
    default: object
    types: frozenset[type]
    kinds: frozenset[str] = frozenset()

    @property
    def leaf(self) -> str:
        """Last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def plain_default(self) -> object:
        """The default as it would stand in YAML."""
        default = self.default
        return list(default) if isinstance(default, tuple) else str(default) if isinstance(default, Path) else default

    @property
    def is_boolean(self) -> bool:
        """Whether ``--key`` and ``--no-key`` mean something."""
        return bool in self.types

    @property
    def words(self) -> frozenset[str]:
        """Of a boolean: what else it takes by name, ``auto`` or ``null``."""
        return frozenset(self.rule.replace(", ", " or ").split(" or ")) - {"true", "false"}

    @property
    def is_text(self) -> bool:
        """Whether an arbitrary text is a value; then a number on the command line is text too."""
        return not self.types.isdisjoint({str, Path})


@cache
def keys() -> Mapping[str, Key]:
    """Every setting by dotted name, in the schema's order."""
    return {key.name: key for key in _walk(Config, "")}


@cache
def sections() -> Mapping[str, str]:
    """Dotted name -> one-line description of the configuration's sections, each before those inside it."""
    return dict(_sections(Config, ""))


def _sections(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        members = _members(field.annotation)
        if members:
            yield prefix + name, " ".join((member.__doc__ or "").partition("\n")[0] for member in members)
        for member in members:
            yield from _sections(member, f"{prefix}{name}.")


@cache
def kinds(section: str) -> Mapping[str, frozenset[str]]:
    """Kind -> leaf names of its settings, for a section that is a choice between kinds; else empty."""
    members = _members(Config.model_fields[section].annotation) if section in Config.model_fields else ()
    if len(members) < 2:
        return {}
    return {_kind_of(m): frozenset(name for name, field in m.model_fields.items() if field.repr) for m in members}


def find_key(spelled: str, where: str) -> Key:
    """The setting that `spelled` means: a dotted name, or its last part where only one section has it.

    Args:
        spelled: dashes and underscores are the same.
        where: origin of the name, for the message.

    Raises:
        ConfigError: unknown, with the nearest known key; or ambiguous, with the candidates.
    """
    name = spelled.replace("-", "_")
    if name in keys():
        return keys()[name]
    candidates = [key for key in keys().values() if key.leaf == name]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise ConfigError(
            f"{where}: {spelled!r} could mean {', '.join(key.name for key in candidates)}; a short name must belong to "
            f"one section only. Write the full name."
        )
    raise ConfigError(f"{where}: {spelled!r} is not a configuration key. {_suggestion(name)}")


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that looks most like `name`, or None when none does."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def _suggestion(name: str) -> str:
    if name in sections():
        members = ", ".join(key for key in keys() if key.startswith(f"{name}."))
        return f"{name} is a section; its keys are {members}."
    spellings = {key.leaf: key.name for key in keys().values()} | {key: key for key in keys()}
    found = nearest(name, list(spellings)) or nearest(name.rpartition(".")[2], list(spellings))
    if found is None:
        return "`zerofit train --help` lists all keys."
    return f"The nearest known key is {spellings[found]}; `zerofit train --help` lists all."


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        if not field.repr:
            continue  # filled in by the program
        members = _members(field.annotation)
        if len(members) > 1:
            yield from _merged(members, f"{prefix}{name}.")
        elif members:
            yield from _walk(members[0], f"{prefix}{name}.")
        else:
            words, types = _describe(field.annotation, field.metadata)
            # The docstring's lines are the source file's; help and errors quote it as one paragraph.
            description = " ".join((field.description or "").split())
            yield Key(prefix + name, _either(words), description, field.default, types)


def _members(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The kinds of a section; one for a plain section, none for a setting."""
    alternatives = get_args(annotation) or (annotation,)
    members = tuple(get_args(part)[0] if get_origin(part) is Annotated else part for part in alternatives)
    return members if all(isinstance(m, type) and issubclass(m, BaseModel) for m in members) else ()


def _kind_of(member: type[BaseModel]) -> str:
    return str(member.model_fields["kind"].default)


def _merged(members: Sequence[type[BaseModel]], prefix: str) -> Iterator[Key]:
    """The settings of all kinds; one that several have is described as the first has it."""
    found: dict[str, Key] = {}
    for member in members:
        for key in _walk(member, prefix):
            before = found.get(key.name, key)
            rule = _either([_kind_of(m) for m in members]) if key.leaf == "kind" else before.rule
            found[key.name] = replace(before, rule=rule, kinds=before.kinds | {_kind_of(member)})
    yield from found.values()


def _describe(annotation: Any, metadata: Sequence[object] = ()) -> tuple[list[str], frozenset[type]]:
    """The alternatives of a type in words, and the plain types in it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        fields = [extra for extra in arguments[1:] if isinstance(extra, FieldInfo)]
        return _describe(arguments[0], [part for extra in fields for part in extra.metadata])
    if origin is Literal:
        return [str(value) for value in arguments], frozenset()
    if origin is dict:
        return ["a mapping of names"], frozenset({dict})
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [f"a mapping with {', '.join(annotation.model_fields)}"], frozenset({dict})
    if origin is tuple:
        return [f"a list, each item {_either(_describe(arguments[0])[0])}"], frozenset({tuple})
    if arguments:
        parts = [_describe(argument) for argument in arguments]
        return [word for words, _ in parts for word in words], frozenset().union(*(types for _, types in parts))
    return [_NOUNS[annotation] + _bounds(metadata)], frozenset({annotation})


def _bounds(metadata: Sequence[object]) -> str:
    return " and".join(
        f" {words} {getattr(part, attribute):g}"
        for part in metadata
        for kind, (attribute, words) in _BOUNDS.items()
        if isinstance(part, kind)
    )


def _either(words: Sequence[str]) -> str:
    """``a, b or c``."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
