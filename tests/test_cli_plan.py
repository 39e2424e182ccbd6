"""``zerofit plan``: what it refuses."""

from __future__ import annotations

import pytest

from zerofit.cli.plan import run_plan
from zerofit.errors import ConfigError


@pytest.mark.parametrize("option", ["--resume", "--dry-run", "--run=x"])
def test_what_belongs_to_train_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="belong to `zerofit train`"):
        run_plan(["--preset", "gpt2", option])


@pytest.mark.parametrize("number", [".inf", ".nan"])
def test_infinite_numbers_are_refused(number: str) -> None:
    with pytest.raises(ConfigError, match="takes a number above 0"):
        run_plan(["--preset", "gpt2", "--learning-rate", number])
