"""``zerofit plan``: what would run, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console

from ..errors import ConfigError


def run_plan(arguments: Sequence[str]) -> None:
    """Print the candidates and the choice for a configuration on this machine; starts and writes nothing."""
    from ..config.arguments import parse_arguments
    from ..config.load import load_config
    from ..planning.choose import choose
    from ..planning.explain import choice_json, print_choice
    from ..planning.hardware import probe
    from ..training.start import with_vocabulary

    request = parse_arguments(arguments)
    if request.resume or request.run or request.dry_run:
        raise ConfigError(
            "`zerofit plan` was given --resume, --run or --dry-run, which belong to `zerofit train`: a plan starts and "
            "continues nothing. Leave them away, or write `zerofit train … --dry-run`."
        )
    config = with_vocabulary(load_config(request.source, request.preset, request.overrides)).config
    choice = choose(config, probe())
    if request.as_json:
        print(json.dumps(choice_json(choice)))
    else:
        print_choice(Console(), config, choice)
