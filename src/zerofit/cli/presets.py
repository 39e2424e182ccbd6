"""``zerofit presets``: the configurations that come with zerofit."""

from __future__ import annotations

import itertools
import json
import re
from typing import Annotated

import typer

from ..config.image_models import ImageModelShape
from ..config.load import load_config
from ..config.presets import preset_names, preset_text
from ..config.schema import Config


def presets(
    name: Annotated[str | None, typer.Argument(help="Print this one as YAML.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the presets with their parameter counts, or print one as YAML."""
    if name is not None:
        print(json.dumps(_whole(name)) if as_json else preset_text(name), end="\n" if as_json else "")
    elif as_json:
        print(json.dumps({name: _whole(name) for name in preset_names()}))
    else:
        print(preset_table())


def preset_table() -> str:
    """One line a preset: name, parameters, what its file says in its first sentence."""
    rows = [(name, _parameters(_config(name)), _first_sentence(preset_text(name))) for name in preset_names()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {count:>{widths[1]}}  {sentence}" for name, count, sentence in rows)


def _first_sentence(text: str) -> str:
    """Of the comment at the file's head, which may go over several lines."""
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return re.split(r"(?<=[.])\s", " ".join(line.removeprefix("#").strip() for line in head))[0]


def _config(name: str) -> Config:
    return load_config(None, name).config


def _whole(name: str) -> dict[str, object]:
    whole: dict[str, object] = _config(name).model_dump(mode="json")
    return whole


def _parameters(config: Config) -> str:
    """The count, padding rows included. A vocabulary that comes with the data adds a row of the embedding a token."""
    model = config.model
    if isinstance(model, ImageModelShape):
        if model.num_classes is not None:
            return f"{model.parameter_count():,}"
        none, one = (model.model_copy(update={"num_classes": n}).parameter_count() for n in (0, 1))
        return f"{none:,} + {one - none} a class"
    if model.vocab_size is not None:
        return f"{model.parameter_count():,}"
    none, one = (model.model_copy(update={"vocab_size": n, "pad_vocab_to": 1}).parameter_count() for n in (0, 1))
    return f"{none:,} + {one - none} a token"
