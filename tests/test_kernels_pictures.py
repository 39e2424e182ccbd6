"""The kernels that cut, resample and lay out pictures, under Triton's interpreter, beside PyTorch's operations."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zerofit.config.images import AugmentConfig, ImageDataConfig
from zerofit.data import augment as augment_module
from zerofit.data.augment import Augment, draw_with_triton
from zerofit.data.images import gpu_files
from zerofit.data.order import sample_keys

CPU = torch.device("cpu")
#: A level of 255 after normalisation.
LEVEL = 1 / 255 / 0.224


@pytest.fixture(scope="module")
def interpreted() -> Any:
    """The Triton kernels under the interpreter (conftest.py asks for it where there is no GPU)."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles for the GPU here; the tests marked gpu run its kernels")
    from zerofit.kernels import pictures_triton

    return pictures_triton


def config(size: int, augment: AugmentConfig | None = None) -> ImageDataConfig:
    return ImageDataConfig(
        kind="images", path=Path("x"), image_size=size, eval_resize=size + 6, augment=augment or AugmentConfig()
    )


def batch(count: int, height: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    """Pictures of several sizes, lying and standing, with noise outside of them."""
    random = np.random.default_rng(seed)
    images = torch.from_numpy(random.integers(0, 256, (count, height, width, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    sizes = [[height - n % 5, width - 3 * n % 7, n % 2] for n in range(count)]
    return {
        "images": images,
        "sizes": torch.tensor(sizes, dtype=torch.int32),
        "targets": torch.arange(count),
        "seeds": torch.from_numpy(sample_keys(np.arange(count), seed)),
    }


def _noted(name: str, function: Callable[..., Any], ran: list[str]) -> Callable[..., Any]:
    def noted(*args: Any, **more: Any) -> Any:
        ran.append(name)
        return function(*args, **more)

    return noted


@pytest.fixture
def used(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets `Augment` take the kernels here; the names of those that ran."""
    ran = []
    for name in ("crop", "draw_boxes"):
        true = getattr(interpreted, name)
        monkeypatch.setattr(
            interpreted, name, lambda *a, true=true, name=name, **k: (ran.append(name), true(*a, **k))[1]
        )
    monkeypatch.setattr(augment_module, "use_triton", lambda _: True)
    monkeypatch.setattr(augment_module, "_kernels_agree", lambda _: True)
    return ran


@pytest.mark.parametrize("augment", [AugmentConfig(), AugmentConfig(crop_scale_min=0.9, crop_ratio_max=1.1, flip=0.2)])
def test_boxes_are_those_of_the_operations(interpreted: Any, augment: AugmentConfig) -> None:
    inputs = batch(150, 30, 57)
    inputs["seeds"][:3] = torch.tensor([0, -1, -(2**63)])
    _, boxes, flips = Augment(config(24, augment), train=True)._boxes(inputs["seeds"], inputs["sizes"])
    found, mirrored = draw_with_triton(inputs["seeds"], inputs["sizes"], augment)
    assert (found - boxes).abs().max() < 1e-4
    assert flips is not None
    assert torch.equal(mirrored, flips)
    assert 0 < int(mirrored.sum()) < 150


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("height", "width", "size"), [(30, 57, 24), (20, 24, 40), (100, 150, 16)])
def test_crops_are_those_of_the_operations(
    interpreted: Any, used: list[str], monkeypatch: pytest.MonkeyPatch, train: bool, height: int, width: int, size: int
) -> None:
    """Enlarged, shrunk a little, and shrunk up to six times; lying, standing, mirrored."""
    inputs = batch(6, height, width)
    transform = Augment(config(size), train=train)
    found = transform(inputs)["images"]
    assert used == (["draw_boxes", "crop"] if train else ["crop"])
    monkeypatch.setattr(augment_module, "use_triton", lambda _: False)
    true = transform(inputs)["images"]
    assert len(used) == 1 + train
    assert (found - true).abs().max() < 0.05 * LEVEL


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_form_of_crops(used: list[str], dtype: torch.dtype, channels_last: bool) -> None:
    inputs = batch(3, 20, 33)
    inputs["images"] = inputs["images"].contiguous()  # planes instead of pixels
    found = Augment(config(16), train=True, dtype=dtype, channels_last=channels_last)(inputs)["images"]
    assert (found.shape, found.dtype) == ((3, 3, 16, 16), dtype)
    assert found.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    true = Augment(config(16), train=True)(inputs)["images"]
    assert (found.float() - true).abs().max() <= 2.8 * torch.finfo(dtype).eps + 1e-6


def test_colours_and_mixing_follow_the_kernel(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch(4, 20, 33)
    augment = AugmentConfig(brightness=0.4, saturation=0.3, mixup_alpha=0.4)
    transform = Augment(config(16, augment), train=True, num_classes=5)
    found = transform(inputs)
    monkeypatch.setattr(augment_module, "use_triton", lambda _: False)
    true = transform(inputs)
    assert used == ["draw_boxes", "crop"]
    for name in true:
        assert (found[name] - true[name]).abs().max() < 0.05 * LEVEL


def test_crops_are_compared_before_their_first_use(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check = augment_module._kernels_agree.__wrapped__
    assert check(CPU)
    true = interpreted.draw_boxes

    def never_mirrored(*args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        boxes, flips = true(*args, **more)
        return boxes, torch.zeros_like(flips)

    monkeypatch.setattr(interpreted, "draw_boxes", never_mirrored)
    with pytest.warns(UserWarning, match="The Triton kernel for crops is off by"):
        assert not check(CPU)


def pictures(shapes: list[tuple[int, int]]) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=random) for shape in shapes]


@pytest.mark.parametrize("standing", [False, True])
def test_every_orientation_is_laid_out_exactly(interpreted: Any, standing: bool) -> None:
    turns = np.arange(1, 9)
    given = pictures([(33 + n, 20 - n) if standing else (20 - n, 33 + n) for n in range(8)])
    given[2] = given[2].permute(1, 2, 0).contiguous().permute(2, 0, 1)  # pixels instead of planes
    found, sizes = gpu_files.lay_out_with_triton(given, turns, 16, CPU)
    true, true_sizes = gpu_files.lay_out_with_torch(given, turns, 16, CPU)
    assert sizes.tolist() == true_sizes.tolist()
    assert set(sizes[:, 2].tolist()) == {0, 1}
    for one, other, (height, width, _) in zip(found, true, sizes.tolist(), strict=True):
        assert torch.equal(one[:, :height, :width], other[:, :height, :width])


def test_large_pictures_are_shrunk_and_panoramas_cut(interpreted: Any) -> None:
    given = pictures([(50, 70), (90, 40), (20, 70), (70, 20), (40, 130)])
    turns = np.array([1, 6, 3, 8, 5])
    found, sizes = gpu_files.lay_out_with_triton(given, turns, 16, CPU)
    true, true_sizes = gpu_files.lay_out_with_torch(given, turns, 16, CPU)
    assert sizes.tolist() == true_sizes.tolist()
    assert sizes[:, :2].tolist() == [[16, 22], [16, 32], [20, 40], [20, 40], [16, 32]]
    for one, other, (height, width, _) in zip(found, true, sizes.tolist(), strict=True):
        assert (one[:, :height, :width].int() - other[:, :height, :width].int()).abs().max() <= 1


def test_laying_out_is_compared_before_its_first_use(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check = gpu_files._kernel_agrees.__wrapped__
    assert check(CPU)
    true = interpreted.lay_out

    def one_plane_for_all(table: Tensor, boxes: Tensor, canvas: Tensor) -> Tensor:
        table[:, 1] = 0
        return true(table, boxes, canvas)

    monkeypatch.setattr(interpreted, "lay_out", one_plane_for_all)
    with pytest.warns(UserWarning, match="laying out pictures is off by"):
        assert not check(CPU)
