"""Pictures on a GPU: the same batches, the same augmentation, and nvJPEG where torchvision has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pictures import write_folder
from zerofit.config.images import AugmentConfig, ImageDataConfig
from zerofit.data.augment import Augment
from zerofit.data.images.dataset import open_images
from zerofit.data.images.gpu_files import GpuFilesReader, nvjpeg
from zerofit.data.images.loader import ImageLoader, ReadPlan
from zerofit.data.loader import Share
from zerofit.data.prepare.images import prepare_images

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.fixture
def config(tmp_path: Path) -> ImageDataConfig:
    root = write_folder(tmp_path / "in", each=16, size=(100, 75))
    write_folder(root, classes=("eel",), each=16, size=(60, 90))
    config = ImageDataConfig(
        kind="images", path=tmp_path / "out", prepare=(str(root),), cache_size=64, image_size=56, eval_resize=64
    )
    prepare_images(config, workers=1)
    return config


def _windows(config: ImageDataConfig, plan: ReadPlan, steps: int = 12) -> list[dict[str, torch.Tensor]]:
    loader = ImageLoader(open_images(config.path, "train", 3), Share(4, 2, 0, 1), plan)
    found = [{n: t.clone() for n, t in batch.inputs.items()} for step in range(steps) for batch in loader.window(step)]
    loader.close()
    return found


def test_batches_on_the_device_are_those_on_the_cpu(config: ImageDataConfig) -> None:
    here = _windows(config, ReadPlan())
    there = _windows(config, ReadPlan(device=GPU, pin_memory=True))
    for one, other in zip(here, there, strict=True):
        assert all(other[name].is_cuda for name in other)
        for name in ("sizes", "targets", "seeds"):
            assert torch.equal(one[name], other[name].cpu())
        for a, b, (height, width, _) in zip(one["images"], other["images"].cpu(), one["sizes"].tolist(), strict=True):
            assert torch.equal(a[:, :height, :width], b[:, :height, :width])


@pytest.mark.parametrize(
    "augment", [AugmentConfig(), AugmentConfig(mixup_alpha=0.2, cutmix_alpha=1.0)], ids=["plain", "mixing"]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_augmentation_is_the_cpu_s(config: ImageDataConfig, augment: AugmentConfig, compiled: bool) -> None:
    config = config.model_copy(update={"augment": augment})
    inputs = _windows(config, ReadPlan(), steps=1)[0]
    here = Augment(config, train=True, num_classes=3)(inputs)
    there = Augment(config, train=True, num_classes=3, channels_last=True, compile=compiled)(
        {name: tensor.to(GPU) for name, tensor in inputs.items()}
    )
    assert (there["images"].cpu() - here["images"]).abs().max() < 0.02  # half precision: a level of 255 is 0.017
    assert torch.allclose(there["targets"].cpu().float(), here["targets"].float(), atol=1e-5)


def test_nvjpeg_gives_pillow_s_pictures(config: ImageDataConfig) -> None:
    decoder = nvjpeg(GPU)
    if decoder is None:
        pytest.skip("torchvision does not decode on this GPU")
    loader = ImageLoader(open_images(config.path, "train", 3), Share(4, 2, 0, 1), ReadPlan("files", device=GPU))
    assert isinstance(loader._reader, GpuFilesReader)
    loader.close()
    transform = Augment(config, train=False)
    cached = _windows(config, ReadPlan(device=GPU))
    for one, other in zip(cached, _windows(config, ReadPlan("files", device=GPU)), strict=True):
        difference = (transform(one)["images"] - transform(other)["images"]).abs()
        assert difference.mean() < 0.1
