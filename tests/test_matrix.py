"""Any strategy, offload and number of ranks saves; any other goes on from it. Through the real files, in fp32.

Each *cell* is a variant on a number of ranks. The canonical run is `single` on one. Every cell goes on from its
checkpoint, saves its own, and goes on from that; the canonical engine goes on from every cell's. The whole product of
cells is marked ``long``.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from processes import run
from test_conformance import MODEL, SAMPLES, VARIANTS, make_plan, start, take_steps
from zerofit.checkpoint.retention import Retention
from zerofit.checkpoint.saver import Request, Saver
from zerofit.checkpoint.store import open_checkpoint
from zerofit.engines.build import build
from zerofit.models.gpt2 import SPEC
from zerofit.planning.plan import Plan
from zerofit.types import World

#: Steps before the canonical checkpoint, and after every checkpoint.
FIRST, NEXT = 3, 10
#: Removed when the process ends.
_FOLDER = tempfile.TemporaryDirectory(prefix="zerofit-matrix-", ignore_cleanup_errors=True)
Cell = tuple[str, int]
CANONICAL: Cell = ("single", 1)
CELLS: list[Cell] = [(variant, n) for variant in ("ddp", "fsdp2") for n in (2, 3, 4)]
CELLS += [(variant, n) for variant in VARIANTS if variant[:4] not in ("ddp", "fsdp") for n in (1, 2, 3, 4)]
#: A dozen crosses between cells of different kinds, for every run of the tests.
CROSSES: list[tuple[Cell, Cell]] = [
    (("zero3", 4), ("ddp", 2)), (("ddp", 4), ("zero2", 3)), (("zero2", 4), ("zero3", 2)),
    (("zero1", 3), ("zero3", 4)), (("zero3", 2), ("zero2-cpu", 4)), (("zero2-cpu", 2), ("ddp", 3)),
    (("zero3-cpu", 4), ("zero1", 2)), (("zero1-cpu", 3), ("zero3-cpu-parameters", 2)),
    (("zero3-cpu-parameters", 4), ("zero2", 2)), (("zero2", 1), ("zero3-cpu", 3)),
    (("zero3", 3), ("zero1-cpu", 4)), (("ddp", 3), ("zero3", 1)), (("fsdp2", 4), ("zero2", 1)),
    (("zero3", 3), ("fsdp2", 2)), (("fsdp2", 3), ("ddp", 4)), (("zero1-cpu", 2), ("fsdp2", 4)),
]  # fmt: skip


def plan_of(cell: Cell) -> Plan:
    variant, ranks = cell
    return make_plan(variant, world_size=ranks, micro_batch=SAMPLES // ranks, accumulation_steps=1)


def folder() -> Path:
    """Where all checkpoints of this test run lie."""
    return Path(_FOLDER.name)


def save(engine: Any, world: World, root: Path, step: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    saver = Saver(root, world, Retention(1), 0, asynchronous=True, patience_seconds=30)
    saver.begin(Request(step, engine.scalars(), {}, {}, ("latest",)), engine.fragments(), engine.hold_updates)
    assert saver.finish()
    saver.close()


def states(engine: Any) -> dict[tuple[str, str, int], np.ndarray]:
    return {(f.name, f.role, f.start): f.data.clone().numpy() for f in engine.fragments()}


def load(engine: Any, source: Path) -> bool:
    """Load, and say whether every fragment is what the files hold."""
    saved = open_checkpoint(source)
    engine.load(saved.read, saved.scalars)
    held = states(engine)
    same = all(
        torch.equal(torch.from_numpy(data), saved.read(name, role, start, start + len(data)))  # type: ignore[arg-type]
        for (name, role, start), data in held.items()
    )
    return same and dict(engine.scalars()) == dict(saved.scalars)


def losses(engine: Any, world: World, plan: Plan, first: int) -> list[float]:
    return [result.loss for result in take_steps(engine, world, plan, range(first, first + NEXT))]


def canonical_run(world: World, plan: Plan, root: Path) -> tuple[list[float], list[float]]:
    """Uninterrupted losses after the two places at which others save."""
    engine = start(world, plan)
    take_steps(engine, world, plan, range(FIRST))
    save(engine, world, root, FIRST)
    return losses(engine, world, plan, FIRST), losses(engine, world, plan, FIRST + NEXT)


def cell_run(world: World, plan: Plan, source: Path, root: Path) -> dict[str, Any]:
    """Goes on from `source`, saves, goes on, loads what it saved, and goes on again."""
    engine = build(plan, SPEC, world)
    same = load(engine, source)
    first = losses(engine, world, plan, FIRST)
    save(engine, world, root, FIRST + NEXT)
    after = losses(engine, world, plan, FIRST + NEXT)
    same_again = load(engine, root / f"step-{FIRST + NEXT:08d}")
    again = losses(engine, world, plan, FIRST + NEXT)
    engine.close()
    return {"same": same and same_again, "first": first, "after": after, "again": again}


def going_on(world: World, plan: Plan, sources: list[Path]) -> list[dict[str, Any]]:
    """From each of the sources, in a fresh engine for the first and the same one for the others."""
    engine, found = build(plan, SPEC, world), []
    for source in sources:
        same = load(engine, source)
        found.append({"same": same, "after": losses(engine, world, plan, FIRST + NEXT)})
    engine.close()
    return found


@functools.cache
def canonical() -> tuple[list[float], list[float]]:
    (found,) = run(1, canonical_run, plan_of(CANONICAL), folder() / "canonical")
    return found  # type: ignore[no-any-return]


@functools.cache
def cell(which: Cell) -> dict[str, Any]:
    canonical()
    source = folder() / "canonical" / f"step-{FIRST:08d}"
    ranks = run(which[1], cell_run, plan_of(which), source, folder() / f"{which[0]}-{which[1]}")
    assert all(rank["same"] for rank in ranks)
    return ranks[0]  # type: ignore[no-any-return]


def saved_by(which: Cell) -> Path:
    cell(which)
    return folder() / f"{which[0]}-{which[1]}" / f"step-{FIRST + NEXT:08d}"


each_cell = pytest.mark.parametrize("which", CELLS, ids=lambda which: f"{which[0]}-{which[1]}")


@each_cell
def test_goes_on_from_the_canonical_checkpoint(which: Cell) -> None:
    assert cell(which)["first"] == pytest.approx(canonical()[0], abs=1e-5)


@each_cell
def test_goes_on_from_its_own_checkpoint_bit_for_bit(which: Cell) -> None:
    assert cell(which)["again"] == cell(which)["after"]


def test_the_canonical_engine_goes_on_from_every_cell() -> None:
    (found,) = run(1, going_on, plan_of(CANONICAL), [saved_by(which) for which in CELLS])
    for which, result in zip(CELLS, found, strict=True):
        assert result["same"], which
        assert result["after"] == pytest.approx(canonical()[1], abs=2e-5), which
        assert result["after"] == pytest.approx(cell(which)["after"], abs=1e-5), which


@pytest.mark.parametrize(("saving", "loading"), CROSSES, ids=lambda which: f"{which[0]}-{which[1]}")
def test_crosses(saving: Cell, loading: Cell) -> None:
    found = run(loading[1], going_on, plan_of(loading), [saved_by(saving)])
    assert all(rank[0]["same"] for rank in found)
    assert found[0][0]["after"] == pytest.approx(cell(saving)["after"], abs=1e-5)


@pytest.mark.long
@each_cell
def test_the_whole_product(which: Cell) -> None:
    """Every cell goes on from every other cell's checkpoint."""
    others = [other for other in CELLS if other != which]
    found = run(which[1], going_on, plan_of(which), [saved_by(other) for other in others], timeout_seconds=550)
    for ranks, other in itertools.product(found, range(len(others))):
        assert ranks[other]["same"], others[other]
        assert ranks[other]["after"] == pytest.approx(cell(others[other])["after"], abs=1e-5), others[other]


def test_no_rank_copies_the_whole() -> None:
    """Of four ranks each writes a quarter of every byte (the last one may hold padding)."""
    held = [path.stat().st_size for path in sorted(saved_by(("zero2", 4)).glob("rank-*"))]
    assert len(held) == 4
    whole = 12 * MODEL.parameter_count()
    assert sum(held) == pytest.approx(whole, rel=0.15)  # headers are a visible part of so small a model
    assert max(held) < 0.4 * whole
