"""What reading pictures holds on a GPU and in page-locked memory, by the rules of `data.images.loader`. Pure, but for
the size of prepared pictures, which is read."""

from __future__ import annotations

from contextlib import suppress

from ..config.images import ImageDataConfig
from ..config.schema import Config
from ..data.images.room import COPIED_TOGETHER, MAX_CACHE_PROCESSES, stays_on_host, windows_ahead
from ..errors import DataError
from .plan import PicturesAhead, Plan
from .timeline import FEED, Ledger

#: Width of pictures that are not prepared yet, by their height.
USUAL_ASPECT = 1.5


def pictures_ahead(config: Config) -> PicturesAhead | None:
    """What a rank reads ahead; None for other data."""
    data = config.data
    if not isinstance(data, ImageDataConfig):
        return None
    height, width = _canvas(data)
    workers = MAX_CACHE_PROCESSES if data.num_workers is None else data.num_workers
    return PicturesAhead(
        picture_bytes=height * width * 3,
        prefetch_factor=data.prefetch_factor,
        processes=workers * (data.read == "cache"),
    )


def _canvas(data: ImageDataConfig) -> tuple[int, int]:
    """Height and width into which every picture of the cache fits; of pictures to come, the usual."""
    with suppress(DataError, OSError):
        if (data.path / "meta.json").exists():
            from ..data.images.store import ImageStore  # imports NumPy, which a plan without data does not need

            return ImageStore(data.path).canvas
    return data.cache_size, round(data.cache_size * USUAL_ASPECT)


def sizes_on_gpu(plan: Plan) -> list[int]:
    """Bytes of each batch of pictures that is there at once, as they lie in the cache. (Files that a GPU decodes have a
    canvas of the largest picture of their batch, which may be more.)"""
    if plan.device != "cuda" or plan.pictures is None:
        return []
    batch, ahead = plan.micro_batch * plan.pictures.picture_bytes, plan.pictures.prefetch_factor
    if stays_on_host(batch * plan.accumulation_steps, ahead):
        return [batch]
    return [batch] * (plan.accumulation_steps * windows_ahead(ahead))


def play_pictures(plan: Plan, ledger: Ledger) -> None:
    """Allocate them, on the stream on which they come."""
    for number, size in enumerate(sizes_on_gpu(plan)):
        ledger.alloc(("pictures", number), size, "pictures", FEED)


def page_locked_bytes(plan: Plan) -> int:
    """What a rank's processes fill, and windows that wait for their turn."""
    if plan.device != "cuda" or plan.pictures is None:
        return 0
    each, ahead = plan.pictures.picture_bytes, plan.pictures.prefetch_factor
    window = plan.micro_batch * plan.accumulation_steps * each
    filled = plan.pictures.processes * ahead * min(plan.micro_batch, COPIED_TOGETHER) * each
    return filled + (window * windows_ahead(ahead) if stays_on_host(window, ahead) else 0)
