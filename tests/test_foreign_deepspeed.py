"""Folders that DeepSpeed itself wrote, against the states that its engine held."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foreign_writers import MODEL, Expected, save_with_deepspeed
from processes import run
from zerofit.checkpoint.foreign import Foreign, open_foreign
from zerofit.errors import CheckpointError

pytest.importorskip("deepspeed")

SHAPES = MODEL.parameter_shapes()
SMALL_SUB_GROUPS = {"sub_group_size": 300}
SMALL_SCALE = {"fp16": {"enabled": True, "initial_scale_power": 8}}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"zero{stage}-{ranks}": (ranks, {"stage": stage}) for stage in (1, 2, 3) for ranks in (1, 2, 3)},
    **{f"zero{stage}-2-bf16": (2, {"stage": stage, "precision": "bf16"}) for stage in (1, 2, 3)},
    "zero2-2-fp16": (2, {"stage": 2, "precision": "fp16", "extra": SMALL_SCALE}),
    "zero3-2-fp16": (2, {"stage": 3, "precision": "fp16", "extra": SMALL_SCALE}),
    "zero1-2-bf16-fp32-gradients": (
        2,
        {"stage": 1, "precision": "bf16", "extra": {"data_types": {"grad_accum_dtype": "fp32"}}},
    ),
    "zero3-3-two-groups-sub-groups": (3, {"stage": 3, "groups": "decay", "zero": SMALL_SUB_GROUPS}),
    "zero2-2-elastic": (2, {"stage": 2, "zero": {"elastic_checkpoint": True}}),
    "zero2-2-offload": (2, {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}}),
    "zero3-2-offload": (2, {"stage": 3, "precision": "bf16", "zero": {"offload_optimizer": {"device": "cpu"}}}),
    **{f"zero{stage}-2-frozen": (2, {"stage": stage, "frozen": "wpe", "precision": "bf16"}) for stage in (1, 2, 3)},
    "zero0-1": (1, {"stage": 0}),
    "zero0-1-bf16": (1, {"stage": 0, "precision": "bf16"}),
}


def assert_same(found: Foreign, expected: Expected) -> None:
    """Every state bit for bit, in one piece and cut in three."""
    assert found.shapes() == SHAPES
    for (name, role), values in expected.items():
        size = math.prod(SHAPES[name])
        whole = found.read(name, role, 0, size)
        assert whole is not None, (name, role)
        np.testing.assert_array_equal(whole.numpy(), values, err_msg=f"{name} {role}")
        edges = [0, size // 3, size // 2 + 1, size]
        pieces = [found.read(name, role, a, b) for a, b in itertools.pairwise(edges)]
        assert torch.equal(torch.cat([p for p in pieces if p is not None]), whole)


@pytest.mark.parametrize("case", CASES)
def test_states_are_those_of_the_engine(case: str, tmp_path: Path) -> None:
    world_size, options = CASES[case]
    expected: Expected = run(world_size, save_with_deepspeed, tmp_path, options)[0]
    assert {role for _, role in expected} == {"parameter", "exp_avg", "exp_avg_sq"}
    found = open_foreign(tmp_path, MODEL)
    assert_same(found, expected)
    # Stage 0 in half precision makes a step on zeros when it starts.
    assert (found.step, found.scalars["optimizer_steps"]) == (2, 3 if case == "zero0-1-bf16" else 2)
    assert ("loss_scale" in found.scalars) == ("fp16" in case)
    frozen = {name for name, role in expected} - {name for name, role in expected if role == "exp_avg"}
    assert frozen == ({"wpe.weight"} if "frozen" in case else set())
    assert all(found.read(name, "exp_avg", 0, 1) is None for name in frozen)
    assert any("frozen" in note for note in found.notes) == bool(frozen)


@pytest.mark.parametrize("zero", [{}, {"round_robin_gradients": True}])
def test_two_groups_and_round_robin_order(zero: dict[str, Any], tmp_path: Path) -> None:
    """DeepSpeed's own access to moments fails here, so they are compared with ZeRO-3, which trains the same."""
    options = {"stage": 2, "groups": "decay", "zero": zero, "parameters_only": True}
    expected = run(2, save_with_deepspeed, tmp_path / "2", options)[0]
    found = open_foreign(tmp_path / "2", MODEL)
    assert_same(found, expected)
    for (name, role), values in run(2, save_with_deepspeed, tmp_path / "3", {"stage": 3, "groups": "decay"})[0].items():
        mine = found.read(name, role, 0, len(values))
        assert mine is not None
        np.testing.assert_allclose(mine.numpy(), values, rtol=1e-3, atol=1e-6, err_msg=f"{name} {role}")


# ------------------------------------------------------------------------------------------------ one saved folder

CLIENT_STATE = {
    "epoch": 3,
    "best_val_loss": 1.25,
    "best_acc": 0.5,
    "iter_num": 77,
    "args": Path("/data"),
    "model_args": MODEL.model_dump(),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Expected]]:
    root = tmp_path_factory.mktemp("deepspeed") / "best_model"
    options = {"stage": 2, "tag": "best", "client_state": CLIENT_STATE}
    return root, run(2, save_with_deepspeed, root, options)[0]


@pytest.fixture
def copied(written: tuple[Path, Expected], tmp_path: Path) -> Path:
    shutil.copytree(written[0], tmp_path / "best_model")
    return tmp_path / "best_model"


def test_client_state_is_carried_over(written: tuple[Path, Expected]) -> None:
    found = open_foreign(written[0])
    assert found.model == MODEL  # told by model_args
    assert (found.step, found.state["epoch"], found.state["best_loss"], found.state["best_step"]) == (2, 3, 1.25, 2)
    assert found.state["client_state"]["args"] == "/data"
    json.dumps(found.state)
    notes = " ".join(found.notes)
    assert "global_steps" in notes
    assert "best_val_loss" in notes
    assert "best_acc" in notes


@pytest.mark.parametrize("name", [".", "best_model", "best_model/best", "best_model/best/mp_rank_00_model_states.pt"])
def test_any_of_its_folders_names_it(copied: Path, name: str) -> None:
    assert open_foreign(copied.parent / name).folder == copied / "best"
    (copied / "latest").unlink()
    assert open_foreign(copied.parent / name).folder == copied / "best"


def test_several_tags_without_latest_are_refused(copied: Path) -> None:
    shutil.copytree(copied / "best", copied / "worst")
    assert open_foreign(copied).folder.name == "best"
    (copied / "latest").unlink()
    with pytest.raises(CheckpointError, match="best, worst"):
        open_foreign(copied)


@pytest.mark.parametrize("tag", ["../../elsewhere", "/etc", ""])
def test_latest_cannot_point_elsewhere(copied: Path, tag: str) -> None:
    (copied / "latest").write_text(tag)
    with pytest.raises(CheckpointError, match="not inside"):
        open_foreign(copied)


def test_extra_info_beside_tells_progress(copied: Path) -> None:
    (copied / "extra_info.json").write_text('{"best_loss": 9.0, "best_step": 1, "note": "kept"}')
    state = open_foreign(copied).state
    assert (state["best_loss"], state["best_step"]) == (1.25, 1)  # the checkpoint's own word first
    assert state["client_state"]["note"] == "kept"


def test_a_missing_rank_is_refused(copied: Path) -> None:
    (copied / "best" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="2 ranks and holds the optimizer states of 1"):
        open_foreign(copied)


def test_tensor_parallel_files_are_refused(copied: Path) -> None:
    shutil.copy(copied / "best" / "mp_rank_00_model_states.pt", copied / "best" / "mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match=r"mp_rank_01.*parallelism"):
        open_foreign(copied)


def test_a_torn_file_is_refused(copied: Path) -> None:
    path = copied / "best" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_1.*cannot be read|zero_pp_rank_1.*not load"):
        open_foreign(copied)


def test_another_model_is_refused_with_the_parameter(copied: Path) -> None:
    with pytest.raises(CheckpointError, match=r"h\.2\.ln_1\.weight"):
        open_foreign(copied, MODEL.model_copy(update={"n_layer": 3}))
    with pytest.raises(CheckpointError, match="n_head 7, and 1 was asked"):
        open_foreign(copied, MODEL.model_copy(update={"n_head": 1}))
    with pytest.raises(CheckpointError, match=r"wpe\.weight.*\(6, 7\)"):
        open_foreign(copied, MODEL.model_copy(update={"block_size": 8}))
