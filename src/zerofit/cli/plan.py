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
    from ..data.tokens import vocabulary_size
    from ..planning.choose import choose
    from ..planning.explain import choice_json, print_choice
    from ..planning.hardware import probe

    request = parse_arguments(arguments)
    if request.resume or request.run or request.dry_run:
        raise ConfigError(
            "`zerofit plan` was given --resume, --run or --dry-run, which belong to `zerofit train`: a plan starts and "
            "continues nothing. Leave them away, or write `zerofit train … --dry-run`."
        )
    config = load_config(request.source, request.preset, request.overrides).config
    if config.model.vocab_size is None:
        model = config.model.model_copy(update={"vocab_size": vocabulary_size(config.data.path)})
        config = config.model_copy(update={"model": model})
    choice = choose(config, probe())
    if request.as_json:
        print(json.dumps(choice_json(choice)))
    else:
        print_choice(Console(), config, choice)
