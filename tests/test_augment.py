"""Augmentation: exact where it can be, a function of the sample's key, and the same however a batch is cut."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from pictures import draw
from zerofit.config.images import AugmentConfig, ImageDataConfig
from zerofit.data import augment as module
from zerofit.data.augment import (
    CROP_TRIES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    centre_boxes,
    check_augment,
    random_boxes,
    uniforms,
)
from zerofit.data.order import sample_keys
from zerofit.errors import ConfigError

PLAIN = AugmentConfig(crop_scale_min=1.0, crop_ratio_max=1.0, flip=0.0)
COLOURFUL = AugmentConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, randaugment_ops=2)


def _config(augment: AugmentConfig = AugmentConfig(), size: int = 16, resize: int = 20) -> ImageDataConfig:  # noqa: B008
    return ImageDataConfig(kind="images", path="x", augment=augment, image_size=size, eval_resize=resize)  # type: ignore[arg-type]


def _inputs(pictures: list[Image.Image], canvas: tuple[int, int] = (24, 40)) -> dict[str, Tensor]:
    """A batch as the loader makes it; what lies outside of a picture is noise."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (len(pictures), *canvas, 3), dtype=np.uint8)
    sizes = []
    for out, picture in zip(images, pictures, strict=True):
        pixels = np.asarray(picture)
        standing = pixels.shape[0] > pixels.shape[1]
        lying = pixels.transpose(1, 0, 2) if standing else pixels
        out[: lying.shape[0], : lying.shape[1]] = lying
        sizes.append((*lying.shape[:2], int(standing)))
    return {
        "images": torch.from_numpy(images).permute(0, 3, 1, 2),
        "sizes": torch.tensor(sizes, dtype=torch.int32),
        "targets": torch.arange(len(pictures)) % 3,
        "seeds": torch.from_numpy(sample_keys(np.arange(len(pictures)), 7)),
    }


def _pixels(normalised: Tensor) -> Tensor:
    """Back to 0 .. 255."""
    std, mean = torch.tensor(IMAGENET_STD).view(3, 1, 1), torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    return (normalised * std + mean) * 255


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


SHAPES = [(40, 24), (24, 40), (22, 22), (31, 20), (20, 33)]


def test_evaluation_is_torchvisions_resize_and_centre_crop() -> None:
    """Of pictures as the cache keeps them (shorter side at eval_resize): a copy. Of others: Pillow, within rounding."""
    pictures = [draw(w, h, i) for i, (w, h) in enumerate(SHAPES)]
    found = _pixels(Augment(_config(), train=False)(_inputs(pictures))["images"])
    for picture, image in zip(pictures, found, strict=True):
        width, height = picture.size
        shorter = min(width, height)
        resized = picture.resize((20 * width // shorter, 20 * height // shorter), Image.Resampling.BILINEAR)
        left, top = round((resized.width - 16) / 2), round((resized.height - 16) / 2)
        expected = _tensor(resized.crop((left, top, left + 16, top + 16)))
        exact = shorter == 20
        difference = (image - expected).abs()
        assert difference.max() < (1e-3 if exact else 12), picture.size
        assert difference.mean() < (1e-3 if exact else 1.5), picture.size


def test_a_whole_picture_is_pillows_resize() -> None:
    picture = draw(40, 24, 3)
    augment = Augment(_config(PLAIN), train=True)
    box = torch.tensor([[0.0, 0.0, 24.0, 40.0]])
    inputs = _inputs([picture])
    found = augment.crop(inputs["images"], inputs["sizes"], torch.tensor([False]), box, None)[0]
    expected = _tensor(picture.resize((16, 16), Image.Resampling.BILINEAR))
    assert (found - expected).abs().max() <= 1.0  # Pillow rounds after rows and after columns


def test_half_precision_weights_are_the_rounded_ones() -> None:
    """What a GPU multiplies with."""
    arguments = (torch.tensor([1.5]), torch.tensor([30.0]), torch.tensor([True]), torch.tensor([33]), 40, 16)
    exact, half = module.triangle(*arguments, torch.float32), module.triangle(*arguments, torch.float16)
    assert torch.equal(exact.half(), half)
    assert torch.allclose(exact.sum(-1), torch.ones(1, 16))
    assert (exact[:, :, 33:] == 0).all()


def test_standing_pictures_and_mirrors() -> None:
    picture = draw(24, 40, 4)
    augment = Augment(_config(), train=True)
    upright = _inputs([picture.transpose(Image.Transpose.TRANSPOSE)])
    standing = _inputs([picture])
    assert torch.equal(upright["images"][:, :, :24, :40], standing["images"][:, :, :24, :40])
    box = torch.tensor([[3.0, 2.0, 30.0, 17.5]])
    found = augment.crop(standing["images"], standing["sizes"], torch.tensor([True]), box, torch.tensor([False]))
    turned = box[:, [1, 0, 3, 2]]
    other = augment.crop(upright["images"], upright["sizes"], torch.tensor([False]), turned, torch.tensor([False]))
    assert torch.allclose(found, other.mT, atol=1e-3)
    mirrored = augment.crop(standing["images"], standing["sizes"], torch.tensor([True]), box, torch.tensor([True]))
    assert torch.allclose(mirrored, found.flip(3), atol=1e-3)


def test_what_lies_outside_of_a_picture_does_not_matter() -> None:
    inputs = _inputs([draw(30, 20, 1), draw(20, 33, 2)])
    blank = {**inputs, "images": inputs["images"].clone()}
    for image, (height, width, _) in zip(blank["images"], inputs["sizes"].tolist(), strict=True):
        image[:, height:], image[:, :, width:] = 0, 0
    augment = Augment(_config(), train=True)
    assert torch.equal(augment(inputs)["images"], augment(blank)["images"])


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(8, 900), height=st.integers(8, 900), seed=st.integers(0, 2**40), least=st.floats(0.01, 1.0),
    ratio=st.floats(1.0, 3.0),
)  # fmt: skip
def test_random_crops_lie_inside_with_the_area_and_shape_asked_for(
    width: int, height: int, seed: int, least: float, ratio: float
) -> None:
    config = AugmentConfig(crop_scale_min=least, crop_ratio_max=ratio)
    keys = torch.from_numpy(sample_keys(np.arange(64), seed))
    size = torch.full((64,), float(height)), torch.full((64,), float(width))
    top, left, high, wide = random_boxes(uniforms(keys, 4 * CROP_TRIES, 0), *size, config).double().unbind(1)
    slack = 1e-3 * max(width, height)
    assert (top >= -slack).all()
    assert (left >= -slack).all()
    assert (top + high <= height + slack).all()
    assert (left + wide <= width + slack).all()
    assert (wide / high <= ratio * 1.001).all()
    assert (wide / high >= 0.999 / ratio).all()
    if max(width, height) / min(width, height) <= ratio:
        assert (high * wide >= least * width * height * 0.999).all()


def test_crops_are_distributed_as_torchvisions() -> None:
    """Mean area and mean logarithm of the shape of its algorithm on 320 x 240, from 200,000 crops of it."""
    keys = torch.from_numpy(sample_keys(np.arange(20_000), 1))
    height, width = torch.full((20_000,), 240.0), torch.full((20_000,), 320.0)
    boxes = random_boxes(uniforms(keys, 4 * CROP_TRIES, 0), height, width, AugmentConfig())
    area = (boxes[:, 2] * boxes[:, 3] / (320 * 240)).numpy()
    expected = _reference_areas(np.random.default_rng(0), 20_000)
    assert abs(area.mean() - expected.mean()) < 0.01
    for quantile in (0.1, 0.5, 0.9):
        assert abs(np.quantile(area, quantile) - np.quantile(expected, quantile)) < 0.02


def _reference_areas(random: np.random.Generator, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """RandomResizedCrop as published, one after another."""
    areas = []
    while len(areas) < count:
        share, ratio = random.uniform(0.08, 1), math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = math.sqrt(share * 320 * 240 * ratio), math.sqrt(share * 320 * 240 / ratio)
        if wide <= 320 and high <= 240:
            areas.append(wide * high / (320 * 240))
    return np.array(areas)


def test_a_shape_that_no_crop_may_have_is_cut_in_the_middle() -> None:
    boxes = random_boxes(torch.full((1, 4 * CROP_TRIES), 0.99), torch.tensor([10.0]), torch.tensor([100.0]),
                         AugmentConfig(crop_scale_min=0.9))  # fmt: skip
    assert torch.allclose(boxes, torch.tensor([[0.0, 50 - 20 / 3, 10.0, 40 / 3]]), atol=1e-3)


def test_uniform_numbers_are_uniform_and_their_own() -> None:
    keys = torch.from_numpy(sample_keys(np.arange(20_000), 3))
    draws = uniforms(keys, 6, 100)
    assert ((draws >= 0) & (draws < 1)).all()
    assert (draws.mean(0) - 0.5).abs().max() < 0.01
    assert (draws.var(0) - 1 / 12).abs().max() < 0.002
    assert (torch.corrcoef(draws.T) - torch.eye(6)).abs().max() < 0.03
    assert torch.equal(draws[:, 2:], uniforms(keys, 4, 102))


@pytest.mark.parametrize(
    "augment",
    [AugmentConfig(), COLOURFUL, AugmentConfig(mixup_alpha=0.2), AugmentConfig(mixup_alpha=1.0, cutmix_alpha=1.0)],
    ids=["plain", "colourful", "mixup", "both"],
)
def test_a_sample_does_not_depend_on_its_batch(augment: AugmentConfig) -> None:
    inputs = _inputs([draw(w, h, i) for i, (w, h) in enumerate(SHAPES + SHAPES[:3])])
    transform = Augment(_config(augment), train=True, num_classes=3)
    whole = transform(inputs)
    again = transform(inputs)
    assert torch.equal(whole["images"], again["images"])
    parts = [transform({name: tensor[first : first + 2] for name, tensor in inputs.items()}) for first in (0, 2, 4, 6)]
    for name in whole:
        assert torch.allclose(whole[name], torch.cat([part[name] for part in parts]), atol=2e-5)
    other = transform({**inputs, "seeds": inputs["seeds"] + 1})
    assert not torch.allclose(whole["images"], other["images"], atol=0.05)


def test_evaluation_uses_no_randomness() -> None:
    inputs = _inputs([draw(30, 24, 1), draw(22, 22, 2)])
    augment = Augment(_config(COLOURFUL.model_copy(update={"mixup_alpha": 1.0})), train=False)
    changed = {**inputs, "seeds": inputs["seeds"] + 1}
    assert torch.equal(augment(inputs)["images"], augment(changed)["images"])
    assert augment(inputs)["targets"].dtype == torch.int64


def test_mixup_mixes_pictures_as_it_mixes_targets() -> None:
    inputs = _inputs([Image.new("RGB", (24, 24), colour) for colour in ("black", "white")] * 500)
    inputs["targets"] = torch.tensor([0, 1] * 500)
    mixed = Augment(_config(AugmentConfig(mixup_alpha=0.4)), train=True, num_classes=2)(inputs)
    assert torch.allclose(mixed["targets"].sum(1), torch.ones(1000))
    white = _pixels(mixed["images"])[:, 0, 8, 8] / 255
    assert torch.allclose(white, mixed["targets"][:, 1], atol=1e-3)
    share = mixed["targets"][::2, 0]
    # Beta(0.4, 0.4): mean 1/2, variance 1 / (4 (2 alpha + 1))
    assert abs(share.mean() - 0.5) < 0.05
    assert abs(share.var() - 1 / (4 * 1.8)) < 0.015


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_quantiles_of_beta(alpha: float) -> None:
    draws = module._beta(torch.linspace(0, 1, 100_001), alpha).double()
    assert abs(draws.mean() - 0.5) < 1e-3
    assert abs(draws.var() - 1 / (4 * (2 * alpha + 1))) < 1e-3
    fourth = ((draws - 0.5) ** 4).mean()
    kurtosis = 3 - 6 / (2 * alpha + 3)
    assert abs(fourth / draws.var() ** 2 - kurtosis) < 0.02


def test_cutmix_pastes_the_area_that_the_targets_say() -> None:
    inputs = _inputs([Image.new("RGB", (24, 24), colour) for colour in ("black", "white")] * 200)
    inputs["targets"] = torch.tensor([0, 1] * 200)
    mixed = Augment(_config(AugmentConfig(cutmix_alpha=1.0)), train=True, num_classes=2)(inputs)
    white = (_pixels(mixed["images"])[:, 0] > 128).float()
    assert torch.allclose(white.mean((1, 2)), mixed["targets"][:, 1], atol=1e-5)
    assert 0.1 < float(mixed["targets"][::2, 1].mean()) < 0.5
    assert torch.equal(white[::2], 1 - white[1::2])


def test_padding_has_no_target() -> None:
    inputs = _inputs([draw(24, 24, 1), draw(24, 24, 2)])
    inputs["targets"] = torch.tensor([1, -100])
    targets = Augment(_config(AugmentConfig(mixup_alpha=1.0)), train=True, num_classes=2)(inputs)["targets"]
    assert (targets[:, 0] == 0).all()
    assert (targets.sum(1) < 1).all()


def test_mixing_refuses_odd_micro_batches() -> None:
    config = _config(AugmentConfig(mixup_alpha=0.2))
    check_augment(config, 4)
    with pytest.raises(ConfigError, match=r"micro_batch 3.*must be even"):
        check_augment(config, 3)


def test_every_randaugment_operation_changes_what_it_should() -> None:
    from zerofit.data.augment_colour import OPERATIONS, randaugment_once

    picture = _tensor(draw(32, 32, 5)) / 255 * 0.8 + 0.05
    batch = picture[None].expand(len(OPERATIONS), -1, -1, -1).contiguous()
    draws = torch.stack([(torch.arange(len(OPERATIONS)) + 0.5) / len(OPERATIONS), torch.full((14,), 0.7)], 1)
    out = dict(zip(OPERATIONS, randaugment_once(batch, draws, 0.5), strict=True))
    assert torch.equal(out["identity"], picture)
    assert all(not torch.allclose(image, picture, atol=1e-3) for name, image in out.items() if name != "identity")
    assert torch.allclose(out["brightness"], (picture * 1.45).clamp(0, 1), atol=1e-5)
    assert torch.allclose(out["solarize"], torch.where(picture >= 0.5, 1 - picture, picture))
    assert len(out["posterize"].unique()) <= 64
    assert float(out["autocontrast"].amin()) == 0
    assert abs(float(out["autocontrast"].amax()) - 1) < 1e-6
    moved = round(0.5 * 150 / 331 * 32)
    assert torch.allclose(out["translate_x"][:, :, moved:], picture[:, :, :-moved], atol=1e-5)
    assert (out["translate_x"][:, :, :moved] == 0).all()
    assert all((image >= 0).all() and (image <= 1).all() for image in out.values())


def test_result_s_form() -> None:
    inputs = _inputs([draw(30, 24, 1), draw(22, 22, 2)])
    out = Augment(_config(), train=True, dtype=torch.bfloat16, channels_last=True)(inputs)["images"]
    assert (out.shape, out.dtype) == ((2, 3, 16, 16), torch.bfloat16)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_centre_of_a_picture_that_is_large_enough_lies_on_whole_pixels() -> None:
    boxes = centre_boxes(torch.tensor([256.0, 341.0]), torch.tensor([341.0, 256.0]), 224, 256)
    assert boxes.tolist() == [[16, 58, 224, 224], [58, 16, 224, 224]]


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"crop_scale_min 0\.5 is above"):
        AugmentConfig(crop_scale_min=0.5, crop_scale_max=0.4)
    with pytest.raises(ValueError, match="eval_resize 20 is below image_size 24"):
        _config(size=24)


def test_kornia_is_imported_for_colours_only_and_torchvision_never() -> None:
    code = (
        "import sys, torch\n"
        "from zerofit.data.augment import *\n"
        "from zerofit.data.augment_colour import import_kornia\n"
        "print('kornia' in sys.modules)\n"
        "import_kornia()\n"
        "print('torchvision' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "False"], done.stderr
