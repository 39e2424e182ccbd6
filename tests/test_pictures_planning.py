"""What reading pictures ahead takes is in the plan, by the loader's own rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pictures import write_folder
from zerofit.config.images import ImageDataConfig
from zerofit.config.load import load_config
from zerofit.config.schema import Config
from zerofit.data.images.dataset import open_images
from zerofit.data.images.loader import ImageLoader, ReadPlan
from zerofit.data.images.room import MAX_CACHE_PROCESSES
from zerofit.data.loader import Share
from zerofit.data.prepare.images import prepare_images
from zerofit.planning.memory import H200, predict_memory
from zerofit.planning.pictures import page_locked_bytes, pictures_ahead, sizes_on_gpu
from zerofit.planning.plan import Plan


def _config(path: Path, **settings: Any) -> Config:
    return load_config(None, "animals90", [("data.path", str(path)), *settings.items()]).config


def _plan(config: Config, micro: int, accumulation: int, **more: Any) -> Plan:
    model = config.model.model_copy(update={"input_size": 224, "num_classes": 90})
    return Plan.model_validate(
        {
            "model": model, "parameters": model.parameter_count(), "strategy": "single", "device": "cuda",
            "world_size": 1, "micro_batch": micro, "accumulation_steps": accumulation, "precision": "fp16",
            "pictures": pictures_ahead(config), **more,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    root = write_folder(folder / "in", each=6, size=(64, 40))
    config = ImageDataConfig(kind="images", path=folder / "out", prepare=(str(root),), cache_size=32, val_fraction=0.3)
    prepare_images(config, workers=1)
    return folder / "out"


@pytest.mark.parametrize(("micro", "accumulation", "prefetch_factor"), [(4, 1, 2), (2, 3, 5)])
def test_the_plan_counts_the_windows_that_the_loader_makes(
    prepared: Path, micro: int, accumulation: int, prefetch_factor: int
) -> None:
    config = _config(prepared, **{"data.prefetch_factor": str(prefetch_factor)})
    share, reading = Share(micro, accumulation, 0, 1), ReadPlan(prefetch_factor=prefetch_factor)
    loader = ImageLoader(open_images(prepared, "train", 1), share, reading)
    plan = _plan(config, micro, accumulation)
    assert sum(sizes_on_gpu(plan)) == loader.bytes_ahead
    assert len(set(sizes_on_gpu(plan))) == 1
    loader.close()
    each = loader.window_bytes // (micro * accumulation)
    assert page_locked_bytes(plan) == MAX_CACHE_PROCESSES * prefetch_factor * micro * each
    with_pictures, without = (predict_memory(p, H200) for p in (plan, plan.model_copy(update={"pictures": None})))
    rounded = sum(-(-size // 512) * 512 for size in sizes_on_gpu(plan))
    assert with_pictures.items["pictures"] == rounded
    assert with_pictures.allocated_bytes - without.allocated_bytes == rounded
    assert with_pictures.reserved_bytes > without.reserved_bytes
    assert with_pictures.host_items["pictures"] == page_locked_bytes(plan)
    assert not sizes_on_gpu(plan.model_copy(update={"device": "cpu"}))


def test_windows_too_large_for_the_gpu_wait_in_host_memory(tmp_path: Path) -> None:
    """Pictures that are not prepared yet are taken to be half again as wide as high: 256 x 384."""
    config = _config(tmp_path / "none")
    each = 256 * 384 * 3
    inside, outside = _plan(config, 64, 7), _plan(config, 64, 8)
    assert len(sizes_on_gpu(inside)) == 7 * 4
    assert sizes_on_gpu(outside) == [64 * each]
    processes = MAX_CACHE_PROCESSES * 2 * 64 * each
    assert (page_locked_bytes(inside), page_locked_bytes(outside)) == (processes, processes + 4 * 8 * 64 * each)
    loader_less = _config(tmp_path / "none", **{"data.num_workers": "0", "data.read": "files"})
    assert page_locked_bytes(_plan(loader_less, 64, 7)) == 0
