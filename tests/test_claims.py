"""docs/claims.md holds the numbers that the planner gives."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "claims.py"


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    spec = importlib.util.spec_from_file_location("claims", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_planner_says(claims: ModuleType) -> None:
    page = claims.PAGE.read_text(encoding="utf-8")
    assert claims.render(page) == page
    assert all(f"<!-- {name} -->" in page for name in claims.BLOCKS)


def test_the_pages_arithmetic_is_the_planners(claims: ModuleType) -> None:
    """The page's closed formula, against the states that the engines' memory model adds up."""
    plan = claims.plan_of(claims.xl_row(1, 8, "h200", "fp16"))
    idle = claims.states(plan.parameters, 4, 2, gradients=False)
    assert sum(claims.state_bytes(plan).values()) == pytest.approx(idle, rel=1e-3)


def test_known_values(claims: ModuleType) -> None:
    assert claims.states(7e9, 2, 2) == 63e9
    assert claims.states(1e9, 4, 0) == 16e9
    assert claims.states(30e9, 4, 3) == 120e9
