"""The store: intervals in, intervals out; damage is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zerofit.checkpoint import store
from zerofit.errors import CheckpointError
from zerofit.types import Fragment, World

ALONE = World(0, 1, 0, torch.device("cpu"))


def fragments(cuts: list[int], size: int = 24) -> list[Fragment]:
    """A tensor of `size` elements cut at `cuts`, and another one in one piece."""
    whole = torch.arange(float(size))
    edges = [0, *sorted(set(cuts)), size]
    parts = [Fragment("a", "parameter", (4, size // 4), low, whole[low:high]) for low, high in pairwise(edges)]
    return [*parts, Fragment("b", "exp_avg", (3,), 0, torch.tensor([1.5, 2.5, 3.5]))]


def saved(root: Path, cuts: list[int] = [5, 11], step: int = 7) -> store.Saved:  # noqa: B006
    return store.open_checkpoint(store.save(root, step, fragments(cuts), {"optimizer_steps": 7.0}, {"x": 1}, ALONE))


@given(cuts=st.lists(st.integers(1, 23)), start=st.integers(0, 23), length=st.integers(1, 24))
def test_any_interval_of_any_cut_reads_back(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], start: int, length: int
) -> None:
    found = saved(tmp_path_factory.mktemp("store"), cuts)
    stop = min(start + length, 24)
    assert found.read("a", "parameter", start, stop).tolist() == list(range(start, stop))  # type: ignore[union-attr]
    assert found.read("b", "exp_avg", 0, 3).tolist() == [1.5, 2.5, 3.5]  # type: ignore[union-attr]
    assert found.read("b", "exp_avg_sq", 0, 3) is None


def test_step_scalars_and_state_come_back(tmp_path: Path) -> None:
    found = saved(tmp_path)
    assert (found.step, found.scalars, found.state) == (7, {"optimizer_steps": 7.0}, {"x": 1})
    assert found.shapes() == {"a": (4, 6)}
    assert not list(tmp_path.glob(".*"))  # nothing temporary is left


def test_a_gap_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["entries"] = [e for e in manifest["entries"] if e["start"] != 5]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="incomplete"):
        store.open_checkpoint(folder).read("a", "parameter", 0, 24)


@pytest.mark.parametrize("content", [None, "", "{", '{"format": 99}', "[]"])
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path, content: str | None) -> None:
    folder = saved(tmp_path).folder
    (folder / "manifest.json").unlink() if content is None else (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match="step-00000007"):
        store.open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../rank-00000.safetensors", "/etc/passwd", ".."])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path).folder
    text = (folder / "manifest.json").read_text().replace('"rank-00000.safetensors", ', f'"{name}", ')
    text = text.replace('"file": "rank-00000.safetensors"', f'"file": "{name}"')
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="not inside"):
        store.open_checkpoint(folder)


def test_pointers_and_pruning(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in range(1, 6):
        folder = store.save(root, step, fragments([]), {}, {}, ALONE)
        store.point(root, "latest", folder)
        if step == 2:
            store.point(root, "best", folder)
    assert store.prune(root, keep=2) == ["step-00000001"]
    store.prune(root, keep=1)
    assert sorted(p.name for p in root.glob("step-*")) == ["step-00000002", "step-00000004", "step-00000005"]
    assert store.find_checkpoint(tmp_path, "best").name == "step-00000002"
    assert store.find_checkpoint(tmp_path, "latest").name == "step-00000005"
    assert store.find_checkpoint(tmp_path, "4").name == "step-00000004"
    assert store.find_checkpoint(tmp_path, str(root / "step-00000004")).name == "step-00000004"
    with pytest.raises(CheckpointError, match="step-00000002, step-00000004, step-00000005"):
        store.find_checkpoint(tmp_path, "3")
