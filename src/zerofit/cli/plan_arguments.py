"""The flags that only ``zerofit plan`` takes: described hardware, and what to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ..errors import ConfigError
from ..planning.described import Description

SWITCHES = ("explain", "all", "ledger", "calibrate")
_DESCRIBED = tuple(field.name for field in fields(Description))


@dataclass(frozen=True)
class PlanRequest:
    """What was typed.

    Attributes:
        described: hardware that is not here.
        switches: those of `SWITCHES` that were given.
        rest: the other arguments: configuration file, preset, keys.
    """

    described: Description
    switches: frozenset[str]
    rest: tuple[str, ...]


def read_plan_arguments(argv: Sequence[str]) -> PlanRequest:
    """Take the plan's own flags out of `argv`; dashes and underscores are the same.

    Raises:
        ConfigError: a flag without its value, a switch with one, or a flag given twice.
    """
    values: dict[str, str] = {}
    switches: set[str] = set()
    rest: list[str] = []
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        option, equals, attached = argument.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name not in (*SWITCHES, *_DESCRIBED):
            rest.append(argument)
        elif name in SWITCHES:
            if equals:
                raise ConfigError(f"{argument} was given, and {option} takes no value. Write {option} alone.")
            switches.add(name)
        elif name in values:
            raise ConfigError(f"{option} was given twice. Keep one of the two.")
        else:
            values[name] = attached if equals else _next(option, waiting)
    return PlanRequest(Description(**values), frozenset(switches), tuple(rest))


def _next(option: str, waiting: list[str]) -> str:
    if not waiting or waiting[0].startswith("--"):
        raise ConfigError(f"{option} was given without its value. Write {option} VALUE, or {option}=VALUE.")
    return waiting.pop(0)
