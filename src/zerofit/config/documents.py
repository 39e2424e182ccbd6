"""YAML and JSON with the line of every value. Reads numbers as YAML 1.2 does: ``1e-4`` is a number, ``no`` is text.

PyYAML follows YAML 1.1, where ``1e-4`` is text and ``1:30`` is 90; the resolvers below are YAML 1.2's core schema
(https://yaml.org/spec/1.2.2/, section 10.3.2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..errors import ConfigError

_CORE_SCHEMA = [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own form)


for _tag, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


class _Dumper(yaml.SafeDumper):
    # The loader's resolvers, so that exactly the texts that it would read as something else are quoted.
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Double quotes keep a text with line ends on one line."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_text)


@dataclass(frozen=True)
class Entry:
    """One value of a document: its path of keys joined by dots, the value, and ``FILE:LINE``."""

    name: str
    value: object
    origin: str


def read_entries(text: str, source: str, sections: frozenset[str]) -> Iterator[Entry]:
    """The document's values, flattened through `sections`.

    Args:
        text: YAML or JSON.
        source: file name for messages and origins.
        sections: dotted names whose mappings are walked into; every other value is kept whole.

    Raises:
        ConfigError: no valid document, no mapping at the top, or a key that stands there twice.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            yield from _walk(loader, node, source, sections)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(
            f"{source}{line} cannot be read as YAML or JSON: {error.problem or error.context}. Mend that line; "
            f"nesting is by spaces, and text with ': ' or '#' in it needs quotes."
        ) from error
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{source} is not a text file in UTF-8 ({error.reason}). Save it as UTF-8 text.") from error


def _walk(loader: _Loader, node: yaml.Node, source: str, sections: frozenset[str], prefix: str = "") -> Iterator[Entry]:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{_place(source, node)}: {prefix.rstrip('.') or 'a configuration'} must hold keys with values "
            f"(``key: value`` lines), and {describe_value(loader.construct_object(node, deep=True))} was found."
        )
    seen: dict[str, str] = {}
    for key_node, value_node in node.value:
        key, place = str(key_node.value), _place(source, key_node)
        if key in seen:
            raise ConfigError(f"{place}: the key {prefix}{key} stands already at {seen[key]}. Keep one of the two.")
        seen[key] = place
        is_empty = value_node.tag == "tag:yaml.org,2002:null" or value_node.value == []
        if prefix + key in sections and not is_empty:
            yield from _walk(loader, value_node, source, sections, f"{prefix}{key}.")
        else:
            yield Entry(prefix + key, loader.construct_object(value_node, deep=True), place)


def _place(source: str, node: yaml.Node) -> str:
    return f"{source}:{node.start_mark.line + 1}"


def read_text(path: Path) -> str:
    """The file's text. Tabs of a JSON file become spaces, since YAML allows none between tokens.

    Raises:
        ConfigError: it does not exist or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"The configuration {path} cannot be read: {reason}. Give the path of a YAML or JSON file, or a preset "
            f"with --preset (`zerofit presets` lists them)."
        ) from error
    return text.expandtabs(1) if path.suffix == ".json" else text


def read_scalar(text: str) -> object:
    """The value that `text` has in a configuration file (``1e-4``, ``true``, ``[a, b]``); text where it is none."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def write_value(value: object) -> str:
    """One line of YAML that `read_scalar` and the file reader read back as the same value."""
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip("\n")


def describe_value(value: object) -> str:
    """A value for a message: ``the text 'fast'``, ``the number 4.5``, ``a list``."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {value!r}"
        case dict():
            return "a section with keys"
        case list():
            return f"the list {write_value(value)}"
    return f"{value!r}"
