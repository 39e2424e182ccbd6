"""The arguments that ``train``, ``plan`` and the worker share: flags, and a dotted override for every key."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ConfigError
from .dialects.aliases import Alias, find_alias, refuse_of_generate
from .keys import find_key
from .load import COMMAND_LINE

_CONFIG_SUFFIXES = (".yaml", ".yml", ".json", ".py")
_BOOLEANS = ("true", "false", "yes", "no", "on", "off")
#: What may follow a familiar name that also stands alone (``--offload_optimizer cpu``).
_SWITCH_WORDS = (*_BOOLEANS, "cpu", "nvme", "none")


@dataclass(frozen=True)
class Request:
    """What was typed.

    Attributes:
        source: the configuration file.
        preset: the preset's name.
        overrides: full key and text, in the order typed.
        resume: ``latest``, ``best``, a tag, a step or a checkpoint's path; None to start anew.
        load_checkpoint: a checkpoint of zerofit's or of another tool, that a new run starts from.
        weights_only: take its weights alone, with a fresh optimizer and schedule.
        dry_run: stop before anything is started.
        run: a prepared run folder (what ``train`` hands to its workers).
        as_json: print for programs.
        debug: show tracebacks.
    """

    source: Path | None = None
    preset: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    resume: str | None = None
    load_checkpoint: Path | None = None
    weights_only: bool = False
    dry_run: bool = False
    run: Path | None = None
    as_json: bool = False
    debug: bool = False

    @property
    def default_name(self) -> str:
        """Name of the run when the configuration gives none: the preset's, or the file's."""
        return self.preset or (self.source.stem if self.source else "run")


def parse_arguments(argv: Sequence[str]) -> Request:
    """Read ``[CONFIG] [--flag …] [--dotted.key value | --dotted.key=value | --boolean | --no-boolean …]``.

    Dashes and underscores are the same. ``--local_rank N``, which the ``deepspeed`` launcher passes, is ignored: the
    rank is in the environment.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing value, two configuration files.
    """
    waiting, request = deque(argv), Request()
    while waiting:
        argument = waiting.popleft()
        if argument.startswith("--"):
            option, equals, attached = argument.partition("=")
            request = _read_option(request, option, attached if equals else None, waiting)
        elif argument.startswith("-"):
            raise ConfigError(
                f"{argument} was given, and options are spelt out with two dashes. Write --KEY VALUE; "
                f"`zerofit train --help` lists all keys."
            )
        else:
            request = _with_source(request, argument)
    return request


def _read_option(request: Request, option: str, attached: str | None, waiting: deque[str]) -> Request:
    """The request with one more option, whose value is `attached` or the next of `waiting`."""
    match name := option.removeprefix("--").replace("-", "_"):
        case "dry_run":
            return replace(request, dry_run=_switch(option, attached))
        case "debug":
            return replace(request, debug=_switch(option, attached))
        case "json":
            return replace(request, as_json=_switch(option, attached))
        case "fp32" | "bf16" | "fp16":
            if attached is None and waiting and waiting[0].lower() in _BOOLEANS:  # --fp16 True, as Hugging Face has it
                attached = waiting.popleft()
            if attached is not None and attached.lower() in ("false", "no", "off"):
                return request
            if attached is None or attached.lower() not in _BOOLEANS:
                _switch(option, attached)
            return _with_override(request, "precision", name)
        case "config":
            return _with_source(request, _value(option, attached, waiting))
        case "preset":
            return replace(request, preset=_value(option, attached, waiting))
        case "run":
            return replace(request, run=Path(_value(option, attached, waiting)))
        case "resume" | "resume_from_checkpoint":
            return replace(request, resume=attached or (waiting.popleft() if _resume_follows(waiting) else "latest"))
        case "load_checkpoint":
            return replace(request, load_checkpoint=Path(_value(option, attached, waiting)))
        case "weights_only":
            return replace(request, weights_only=_switch(option, attached))
        case "local_rank":
            _value(option, attached, waiting)
            return request
    return _read_key(request, option, attached, waiting)


def _read_key(request: Request, option: str, attached: str | None, waiting: deque[str]) -> Request:
    """The request with one more override; a boolean key needs no value."""
    name = option.removeprefix("--").replace("-", "_")
    if name.startswith("no_"):
        key = find_key(name.removeprefix("no_"), f"{COMMAND_LINE} ({option})")
        if not key.is_boolean or attached is not None:
            raise ConfigError(
                f"{option} was given, and the --no- form turns off a key that is true or false and takes no value; "
                f"{key.name} takes {key.rule}. Write --{key.name} VALUE."
            )
        return _with_override(request, key.name, "false")
    alias = find_alias(name)
    if alias is not None:
        return _with_override(request, name, _alias_value(alias, option, attached, waiting))
    refuse_of_generate(name, COMMAND_LINE)
    key = find_key(option.removeprefix("--"), COMMAND_LINE)
    if key.is_boolean and attached is None and not (waiting and waiting[0].lower() in {*_BOOLEANS, *key.words}):
        return _with_override(request, key.name, "true")
    return _with_override(request, key.name, _value(option, attached, waiting))


def _alias_value(alias: Alias, option: str, attached: str | None, waiting: deque[str]) -> str:
    """The value of a familiar name; one that may stand alone takes only what can be meant for it."""
    if not alias.switch or attached is not None:
        return _value(option, attached, waiting)
    follows = waiting[0].lower() if waiting else ""
    takes_file = alias.name == "deepspeed" and follows.endswith(".json")
    return waiting.popleft() if follows in _SWITCH_WORDS or takes_file else "true"


def _with_override(request: Request, name: str, text: str) -> Request:
    return replace(request, overrides=(*request.overrides, (name, text)))


def _with_source(request: Request, text: str) -> Request:
    if request.source is not None:
        raise ConfigError(
            f"Two configuration files were given, {request.source} and {text}; a run has one. Name its base inside "
            f"the file with `preset: NAME`, and write settings as --key value."
        )
    return replace(request, source=Path(text))


def _switch(option: str, attached: str | None) -> bool:
    if attached is not None:
        raise ConfigError(f"{option}={attached} was given, and {option} takes no value. Write {option} alone.")
    return True


def _value(option: str, attached: str | None, waiting: deque[str]) -> str:
    if attached is not None:
        return attached
    if not waiting or waiting[0].startswith("--"):
        raise ConfigError(f"{option} was given without its value. Write {option} VALUE, or {option}=VALUE.")
    return waiting.popleft()


def _resume_follows(waiting: deque[str]) -> bool:
    """Whether the next argument belongs to a bare ``--resume``; a configuration file stands for itself."""
    return bool(waiting) and not waiting[0].startswith("--") and not waiting[0].endswith(_CONFIG_SUFFIXES)
