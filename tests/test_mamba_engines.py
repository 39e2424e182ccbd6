"""Mamba under every strategy: parity with one process, checkpoints across strategies, memory as the planner says."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest

import test_matrix
import test_memory_engines
from processes import run
from test_conformance import TOLERANCES, VARIANTS, Trained, assert_close, make_plan, start, take_steps
from zerofit.config.models import MambaConfig
from zerofit.planning.memory import state_bytes
from zerofit.planning.plan import Plan
from zerofit.types import World

#: Vocabulary and length are those of the conformance suite's batches.
MODEL = MambaConfig(n_layers=2, d_model=32, d_state=8, vocab_size=65, max_seq_length=16)
STEPS = 4
#: Removed when the process ends.
_FOLDER = tempfile.TemporaryDirectory(prefix="zerofit-mamba-", ignore_cleanup_errors=True)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def plan_of(variant: str = "single", **fields: Any) -> Plan:
    return make_plan(variant, model=MODEL, parameters=MODEL.parameter_count(), **fields)


def train(world: World, plan: Plan) -> Trained:
    engine = start(world, plan)
    steps = take_steps(engine, world, plan, range(STEPS))
    memory, names = dict(engine.memory()), {(f.name, f.role) for f in engine.fragments()}
    engine.close()
    return Trained(steps, [], {}, memory, extra={"names": names})


@functools.cache
def trained(variant: str, precision: str = "fp32", **fields: Any) -> list[Trained]:
    plan = plan_of(variant, precision=precision, **fields)
    ranks: list[Trained] = run(plan.world_size, train, plan)
    return ranks


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@each_variant
def test_parity_with_one_process(variant: str, precision: str) -> None:
    ranks, (reference,) = trained(variant, precision), trained("single", precision)
    assert_close(ranks[0].steps, reference.steps, *TOLERANCES[precision, "compute"])
    assert ranks[0].steps == ranks[1].steps
    names = set().union(*(rank.extra["names"] for rank in ranks))
    assert names == {(n, r) for n in MODEL.parameter_shapes() for r in ("parameter", "exp_avg", "exp_avg_sq")}
    busiest = max((rank.memory for rank in ranks), key=lambda items: sum(items.values()))
    assert busiest == state_bytes(plan_of(variant, precision=precision))


@pytest.mark.parametrize("recomputation", MODEL.recomputations)
@pytest.mark.parametrize("variant", ["single", "ddp", "zero2", "zero3"])
def test_recomputation_trains_the_same(variant: str, recomputation: str) -> None:
    ranks = trained(variant, activation_checkpointing_every=1, recomputation=recomputation)
    assert_close(ranks[0].steps, trained("single")[0].steps, 1e-5, 1e-5)


CASES: list[dict[str, Any]] = [
    {"strategy": "single"},
    {"strategy": "single", "activation_checkpointing_every": 1, "recomputation": "light"},
    {"strategy": "ddp", "world_size": 2, "activation_checkpointing_every": 1, "recomputation": "selective"},
    {"strategy": "zero2", "world_size": 2, "accumulation_steps": 3},
    {"strategy": "zero2", "world_size": 2, "activation_checkpointing_every": 1, "recomputation": "selective"},
    {"strategy": "zero3", "world_size": 2, "accumulation_steps": 3},
    {"strategy": "zero3", "world_size": 2, "activation_checkpointing_every": 1},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_an_engine_allocates_what_the_planner_says(settings: dict[str, Any]) -> None:
    fields = {**settings, "model": MODEL, "parameters": MODEL.parameter_count()}
    test_memory_engines.check(test_memory_engines.plan_of(**fields), 0)


@pytest.mark.parametrize(("variant", "ranks"), [("ddp", 2), ("zero2", 3), ("zero3", 4)])
def test_any_strategy_goes_on_from_a_checkpoint(variant: str, ranks: int) -> None:
    expected, after = canonical()
    plan = plan_of(variant, world_size=ranks, micro_batch=test_matrix.SAMPLES // ranks, accumulation_steps=1)
    source = folder() / "canonical" / f"step-{test_matrix.FIRST:08d}"
    found = run(ranks, test_matrix.cell_run, plan, source, folder() / f"{variant}-{ranks}")
    assert all(rank["same"] for rank in found)
    assert found[0]["first"] == pytest.approx(expected, abs=1e-5)
    assert found[0]["after"] == found[0]["again"] == pytest.approx(after, abs=2e-5)


@functools.cache
def canonical() -> tuple[list[float], list[float]]:
    (found,) = run(1, test_matrix.canonical_run, plan_of(), folder() / "canonical")
    return found  # type: ignore[no-any-return]


def folder() -> Path:
    return Path(_FOLDER.name)
