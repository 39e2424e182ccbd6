"""Killed at random moments, a run loses nothing. The long form: ``python tests/crashing.py --kills 200``."""

from __future__ import annotations

from pathlib import Path

import pytest

from crashing import Crasher


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, strategy: str) -> None:
    tally = Crasher(tmp_path, ranks=2, strategy=strategy, seed=1).crash(kills=6)
    assert tally.kills >= 6
    assert tally.during_save >= 3


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_killed_two_hundred_times(tmp_path: Path, strategy: str) -> None:
    tally = Crasher(tmp_path, ranks=2, strategy=strategy, seed=2).crash(kills=50)
    assert tally.during_save >= 25
