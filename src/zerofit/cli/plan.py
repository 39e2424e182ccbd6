"""``zerofit plan``: what would run, before anything runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from ..config.images import ImageDataConfig
from ..errors import ConfigError, DataError
from .plan_arguments import PlanRequest, read_plan_arguments

if TYPE_CHECKING:
    from ..config.load import ResolvedConfig
    from ..config.schema import Config
    from ..planning.plan import Plan

#: Tokenizers whose vocabulary is known without prepared data: GPT-2's byte pairs; bytes and one between documents.
VOCABULARIES = {"gpt2": 50257, "bytes": 257}
#: Tables are wide; on a pipe they are not folded.
_PIPE_WIDTH = 200


def run_plan(arguments: Sequence[str]) -> None:
    """Show what would run and what fits, here or on hardware described by --gpus 4 --gpu rtx4090; starts nothing.

    Exit code 0 when something that was asked for fits, 3 when nothing does.
    """
    request = read_plan_arguments(arguments)
    if "ledger" in request.switches:
        _show_ledger(request)
    elif "calibrate" in request.switches:
        from .calibrate import run_calibrate

        run_calibrate(request)
    else:
        _plan(request)


def _plan(request: PlanRequest) -> None:
    from ..config.arguments import parse_arguments
    from ..config.load import load_config
    from ..planning.choose import nothing_fits, survey
    from ..planning.described import described_hardware
    from ..planning.explain import choice_json, print_choice, print_formulas, print_recipes, recipes_json
    from ..planning.hardware import probe
    from ..planning.recipes import recipes
    from ..planning.translation import print_translation, translation_json
    from ..training.start import without_overruled_duration

    typed = parse_arguments(request.rest)
    if typed.resume or typed.run or typed.dry_run:
        raise ConfigError(
            "`zerofit plan` was given --resume, --run or --dry-run, which belong to `zerofit train`: a plan starts and "
            "continues nothing. Leave them away, or write `zerofit train … --dry-run`."
        )
    resolved = without_overruled_duration(load_config(typed.source, typed.preset, typed.overrides, NO_DATA))
    config = with_vocabulary(resolved)
    hardware = probe(config.runs_dir, config.nvme_path)
    if request.described:
        hardware = described_hardware(request.described, hardware)
    everything = "all" in request.switches
    choice = survey(config, hardware, everything=everything)
    config = with_steps(config, choice.chosen.plan if choice.chosen else None)
    ways = recipes(config, hardware) if config.model.items == "images" and config.device != "cpu" else []
    if typed.as_json:
        plan = choice.chosen.plan if choice.chosen else None
        more = {"recipes": recipes_json(ways)} if ways else {}
        print(
            json.dumps({**choice_json(choice, config), "keys": translation_json(resolved.notes, config, plan), **more})
        )
    else:
        console = _console()
        print_choice(console, config, choice, everything=everything)
        print_recipes(console, ways, config.global_batch or choice.candidates[0].plan.global_batch)
        print_translation(console, resolved.notes, config, choice.chosen.plan if choice.chosen else None)
        if "explain" in request.switches:
            print_formulas(console, choice)
    if choice.chosen is None:
        print(nothing_fits(choice.candidates), file=sys.stderr)
        raise typer.Exit(3)


#: A plan reads data only where the vocabulary comes from it.
NO_DATA = (("data.path", "data"),)


def with_steps(config: Config, plan: Plan | None) -> Config:
    """The configuration with the steps that its duration comes to under the chosen batch; of epochs of data that is
    not there nobody knows how many (`ENDLESS_STEPS`).

    Raises:
        ConfigError: the stages do not fit them.
    """
    from ..config.durations import ENDLESS_STEPS
    from ..training.start import steps_of, with_length

    if config.duration is None or plan is None:
        return config
    try:
        steps = steps_of(config, plan)
    except DataError:
        return config.model_copy(update={"max_steps": ENDLESS_STEPS})
    return with_length(config, max_steps=steps)


def with_vocabulary(resolved: ResolvedConfig) -> Config:
    """The configuration with its vocabulary or classes: its own, its data's, or its tokenizer's, for a plan needs no
    data.

    Raises:
        DataError: none of the three is known.
    """
    from ..training import start
    from ..training.initial_model import with_initial_model

    resolved = with_initial_model(resolved, fetch=False)
    try:
        return start.with_model_of_data(resolved).config
    except DataError as error:
        config = resolved.config
        if isinstance(config.data, ImageDataConfig):
            raise DataError(
                f"The number of classes is not known: it is that of the prepared pictures, and {config.data.path} "
                f"holds none. Set --model.num_classes N to plan without data, or prepare it with `zerofit data prepare "
                f"images`."
            ) from error
        if (config.data.prepare or config.data.sources) and config.data.tokenizer in VOCABULARIES:
            known = {"vocab_size": VOCABULARIES[config.data.tokenizer]}
            return config.model_copy(update={"model": config.model.model_copy(update=known)})
        raise DataError(
            f"The size of the vocabulary is not known: it is that of the prepared data, and {config.data.path} holds "
            f"none. Set --model.vocab_size N to plan without data (65 to 100 for characters), or prepare it with "
            f"`zerofit data prepare`."
        ) from error


def _show_ledger(request: PlanRequest) -> None:
    """Predicted beside measured: the shipped rows and this user's."""
    from ..planning.ledger import ledger_json, ledger_table, read_ledger

    as_json, rest = "--json" in request.rest, [part for part in request.rest if part != "--json"]
    if rest or request.described or request.switches != {"ledger"}:
        raise ConfigError(
            f"`zerofit plan --ledger` was given {' '.join(rest) or 'other flags'}: the ledger shows past runs and "
            f"takes --json only. Leave the rest away."
        )
    rows = read_ledger()
    if as_json:
        print(json.dumps(ledger_json(rows)))
    else:
        _console().print(ledger_table(rows))


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_WIDTH)
