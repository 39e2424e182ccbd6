"""What was typed wrongly, in one paragraph: typer's errors come as a usage, a hint and a message."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import typer

#: The base of what typer raises about a command line; click's own, or the one that newer typers bring along.
CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]


def is_help(error: Any) -> bool:
    """Whether it stands for the help of a group that was called without a verb."""
    return type(error).__name__ == "NoArgsIsHelpError"


def in_words(error: Any, command: str, arguments: Sequence[str]) -> str:
    """What is wrong, the nearest option's name, and where all of them stand.

    Args:
        error: a `CommandLineError`.
        command: what was called, for an error that does not say so.
        arguments: what was typed.
    """
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else command
    name = getattr(error, "option_name", None)
    if name is not None and hasattr(error, "possibilities") and context is not None:
        return f"{path} has no option {name}. {_nearest(name, context)} `{path} --help` explains them."
    if type(error).__name__ == "BadParameter" and (given := _given(error, arguments)) is not None:
        return f"{path} {given} was asked for. {_sentence(error)} `{path} --help` says what it takes."
    if type(error).__name__ == "MissingParameter" and context is not None:
        usage = " ".join(context.command.get_usage(context).removeprefix("Usage: ").split())
        return f"{path}: {_sentence(error)} It is called as `{usage}`; `{path} --help` explains it."
    known = ""
    if "No such command" in error.format_message() and "Did you mean" not in error.format_message():
        known = f" There are: {', '.join(context.command.commands)}." if context is not None else ""
    return f"{path}: {_sentence(error)}{known} `{path} --help` says what it takes."


def _given(error: Any, arguments: Sequence[str]) -> str | None:
    """The option and its value as they were typed; None for an argument without a name."""
    for place, argument in enumerate(arguments):
        name, equals, _ = argument.partition("=")
        if name in getattr(error.param, "opts", ()) and name.startswith("-"):
            return argument if equals else " ".join(arguments[place : place + 2])
    return None


def _sentence(error: Any) -> str:
    text = " ".join(error.format_message().replace("Value error, ", "").split())
    return text if text.endswith((".", "?")) else f"{text}."


def _nearest(name: str, context: Any) -> str:
    """The options that it may have been, or all of them."""
    known = [
        spelling
        for parameter in context.command.get_params(context)
        for spelling in (*parameter.opts, *parameter.secondary_opts)
        if spelling.startswith("--")
    ]
    wanted = name.replace("_", "-")
    starting = [spelling for spelling in known if len(wanted) > 4 and spelling.startswith(wanted)]
    near = starting or difflib.get_close_matches(wanted, known, n=1)
    return f"The nearest is {near[0]}." if near else f"Its options are {', '.join(known)}."
