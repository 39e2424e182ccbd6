"""Pictures on a GPU: the same batches, the same augmentation, and nvJPEG where torchvision has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pictures import write_folder
from zerofit.config.images import AugmentConfig, ImageDataConfig
from zerofit.data import augment as augment_module
from zerofit.data.augment import Augment
from zerofit.data.images import gpu_files
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_crop_s_kernels_are_used_and_agree(config: ImageDataConfig, dtype: torch.dtype) -> None:
    assert augment_module._kernels_agree(GPU)
    inputs = _windows(config, ReadPlan(), steps=1)[0]
    here = Augment(config, train=True)(inputs)["images"]
    there = {name: tensor.to(GPU) for name, tensor in inputs.items()}
    found = Augment(config, train=True, dtype=dtype, channels_last=True)(there)["images"]
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found.cpu().float() - here).abs().max() <= 2.8 * torch.finfo(dtype).eps + 1e-3
    # A canvas of planes, and more than one tile of the kernel.
    there["images"] = there["images"].contiguous()
    larger = config.model_copy(update={"image_size": 70, "eval_resize": 80})
    planes, again = (Augment(larger, train=False)(one)["images"].cpu() for one in (there, inputs))
    assert (planes - again).abs().max() < 0.01


def test_the_layout_s_kernel_is_used_and_agrees() -> None:
    assert gpu_files._kernel_agrees(GPU)
    random = torch.Generator().manual_seed(0)
    shapes = [(150, 221), (221, 150), (400, 300), (90, 400), (33, 33), (64, 20), (300, 301), (7, 9)]
    pictures = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=random) for shape in shapes]
    turns = np.arange(1, 9)
    found, sizes = gpu_files.lay_out_with_triton([picture.to(GPU) for picture in pictures], turns, 128, GPU)
    true, true_sizes = gpu_files.lay_out_with_torch(pictures, turns, 128, torch.device("cpu"))
    assert sizes.tolist() == true_sizes.tolist()
    for one, other, (height, width, _) in zip(found.cpu(), true, sizes.tolist(), strict=True):
        assert (one[:, :height, :width].int() - other[:, :height, :width].int()).abs().max() <= 1


def test_decoded_pictures_stay_until_they_are_laid_out(config: ImageDataConfig) -> None:
    """Many batches one after another, each into the memory of those before it."""
    decoder = nvjpeg(GPU)
    if decoder is None:
        pytest.skip("torchvision does not decode on this GPU")
    dataset = open_images(config.path, "train", 3)
    reader = gpu_files.GpuFilesReader(dataset.store, GPU, decoder, workers=0)
    same = dataset.numbers[dataset.store.index["source_width"][dataset.numbers] == 100]  # so that canvases are filled
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sums = [(canvas * 1.0).sum((1, 2, 3)) for canvas, _ in reader.batches([same] * 40)]
    torch.cuda.synchronize()
    assert all(torch.equal(one, sums[0]) for one in sums)
