"""The command line. A verb's module is imported when that verb is called, so that ``--help`` answers at once."""

from __future__ import annotations

import importlib
import io
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from .. import __version__
from ..errors import RequestError, ZerofitError
from .usage import CommandLineError, in_words, is_help


@dataclass(frozen=True)
class Verb:
    """A verb before its module is imported.

    Attributes:
        target: ``module:attribute``: a `typer.Typer`, a function with typer parameters, or for a `configured` verb a
            function of the raw arguments.
        help: one line.
        configured: it takes a configuration and an override for each of its keys.
    """

    target: str
    help: str
    configured: bool = False


VERBS = {
    "train": Verb("zerofit.cli.train:run_train", "Plan, launch and train; continue a run with --resume.", True),
    "plan": Verb("zerofit.cli.plan:run_plan", "Show what would run and what fits; starts nothing.", True),
    "estimate-memory": Verb("zerofit.cli.plan:run_plan", "The same as plan.", True),
    "data": Verb("zerofit.cli.data:app", "Prepare data, and show it."),
    "eval": Verb("zerofit.cli.evaluate:evaluate", "Evaluate a checkpoint."),
    "generate": Verb("zerofit.cli.generate:generate", "Write text with a trained model."),
    "classify": Verb("zerofit.cli.classify:classify", "Tell what pictures show, with a trained classifier."),
    "checkpoint": Verb("zerofit.cli.checkpoint:app", "List, verify, name and remove a run's checkpoints."),
    "export": Verb("zerofit.cli.export:export", "Write a checkpoint for other programs, or convert theirs."),
    "config": Verb("zerofit.cli.config:app", "Rewrite another tool's configuration in zerofit's keys."),
    "presets": Verb("zerofit.cli.presets:presets", "List the presets, or print one as YAML."),
    "version": Verb("zerofit.cli.version:version", "Print the versions of zerofit and of what it stands on."),
}


class ConfiguredCommand(TyperCommand):
    """A verb that reads its arguments itself (`config.arguments`); its help documents every key of the schema."""

    def __init__(self, name: str, run: Callable[[Sequence[str]], None]) -> None:
        super().__init__(
            name,
            help=run.__doc__,
            options_metavar="[CONFIG] [--preset NAME] [--KEY VALUE ...]",
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
            rich_markup_mode=None,
        )
        self._run = run

    def invoke(self, ctx: Any) -> None:
        """Hand the arguments over as they were typed."""
        self._run(ctx.args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Flags, then every key with its values, default and docstring."""
        from .keys_help import alias_rows, flag_rows, key_rows

        with formatter.section("Flags"):
            formatter.write_dl(flag_rows(), col_max=34)
        for title, rows in key_rows():
            with formatter.section(title):
                formatter.write_dl(rows, col_max=34)
        with formatter.section("Names of other tools, here and in files (docs/aliases.md)"):
            formatter.write_dl(alias_rows(), col_max=34)


class LazyGroup(TyperGroup):
    """Knows every verb's name and line of help; imports the one that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        # Stand-ins that hold the line of help; also what a misspelt verb is compared with.
        self.commands = {name: TyperCommand(name, help=verb.help) for name, verb in VERBS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The verb itself, in place of its stand-in."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, load_verb(name) if name else None, rest


def load_verb(name: str) -> Any:
    """Import a verb and make a click command of it."""
    verb = VERBS[name]
    module, _, attribute = verb.target.partition(":")
    target = getattr(importlib.import_module(module), attribute)
    if verb.configured:
        return ConfiguredCommand(name, target)
    if isinstance(target, typer.Typer):
        return get_command(target)
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(target)
    return get_command(single)


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"zerofit {__version__}")
        raise typer.Exit


@app.callback(no_args_is_help=True)
def zerofit(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; also after a verb.")] = False,
) -> None:
    """Trains models on the GPUs you have, and says beforehand what fits.

    Start with: zerofit train --preset shakespeare_char
    """


def main() -> None:
    """Entry point. An error that zerofit raises on purpose is one paragraph and its exit code, no traceback; so is what
    typer says about a command line."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    _print_whatever_comes()
    try:
        sys.exit(_run(arguments))
    except ZerofitError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        else:
            print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _print_whatever_comes() -> None:
    """File names that are not UTF-8, and letters that a terminal's encoding lacks, are printed as escapes. They would
    end a verb in the middle of its work."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _run(arguments: list[str]) -> int:
    """Call the verb; returns the exit code.

    Raises:
        RequestError: typer does not take these arguments.
    """
    try:
        result = get_command(app).main(arguments, prog_name="zerofit", standalone_mode=False)
    except CommandLineError as error:
        if is_help(error):
            print(error, file=sys.stderr)
            return RequestError.exit_code
        raise RequestError(in_words(error, _called(arguments), arguments)) from error
    except typer.Abort:
        print("Aborted.", file=sys.stderr)
        return 1
    return result if isinstance(result, int) else 0


def _called(arguments: list[str]) -> str:
    """The verb, with its own where it has some, as it was typed."""
    words = ["zerofit"]
    if arguments and arguments[0] in VERBS:
        words.append(arguments[0])
        if arguments[1:] and arguments[1] in getattr(load_verb(arguments[0]), "commands", ()):
            words.append(arguments[1])
    return " ".join(words)


if __name__ == "__main__":
    main()
