"""From samples to the accumulation windows of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ..types import Batch
from .mixture import Samples
from .order import Indices

#: Target of a position that is not trained on; the models' loss ignores it.
IGNORE = -100


@dataclass(frozen=True)
class Share:
    """Which samples of a global batch a rank takes.

    Sample ``b`` of micro-step ``m`` on rank ``r`` is number ``m * world_size * micro_batch + r * micro_batch + b``.
    """

    micro_batch: int
    accumulation_steps: int
    rank: int
    world_size: int

    @property
    def global_batch(self) -> int:
        """Samples of all ranks' windows."""
        return self.micro_batch * self.accumulation_steps * self.world_size

    def offsets(self) -> list[int]:
        """First sample of each of the rank's micro-batches."""
        return [(m * self.world_size + self.rank) * self.micro_batch for m in range(self.accumulation_steps)]


def collate(windows: Indices) -> Batch:
    """(B, T + 1) tokens -> a batch that predicts each next token."""
    tokens = torch.from_numpy(windows)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Batch({"tokens": inputs, "targets": targets}, int((targets != IGNORE).sum()))


class TrainLoader:
    """A rank's windows by step; the next one is read in the background.

    The data cursor is the step: step s takes the samples ``s * global_batch`` to ``(s + 1) * global_batch``.
    """

    def __init__(self, dataset: Samples, share: Share, pin_memory: bool) -> None:
        self.dataset, self.share, self.pin_memory = dataset, share, pin_memory
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="zerofit-data")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def window(self, step: int) -> list[Batch]:
        """The accumulation window of `step`: ``accumulation_steps`` batches of ``micro_batch`` samples."""
        ahead, self._ahead = self._ahead, (step + 1, self._pool.submit(self._read, step + 1))
        if ahead is not None and ahead[0] == step:
            return ahead[1].result()
        return self._read(step)

    def _read(self, step: int) -> list[Batch]:
        first = step * self.share.global_batch
        return [self._batch(first + offset) for offset in self.share.offsets()]

    def _batch(self, first: int) -> Batch:
        batch = collate(self.dataset.window(self.dataset.starts(first, self.share.micro_batch)))
        if self.pin_memory:
            return Batch({name: tensor.pin_memory() for name, tensor in batch.inputs.items()}, batch.weight)
        return batch

    def epoch_of_step(self, step: int) -> int:
        """Epoch of the first sample of `step`."""
        return step * self.share.global_batch // self.dataset.samples

    def close(self) -> None:
        """Stop the background thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def evaluation_window(dataset: Samples, share: Share, batches: int) -> Iterator[Batch]:
    """This rank's part of `batches` global batches spread evenly over the split.

    The samples do not depend on the number of ranks; where they do not divide evenly the rest is padding of weight 0,
    so that every sample counts once and every rank brings equally many batches. Read as they are asked for.
    """
    starts = dataset.spread_starts(batches * share.global_batch)
    for first in range(0, len(starts), share.micro_batch * share.world_size):
        mine = first + share.rank * share.micro_batch
        windows = dataset.window(starts[mine : mine + share.micro_batch])
        yield _padded(collate(windows), share.micro_batch)


def _padded(batch: Batch, size: int) -> Batch:
    """The batch with untrained samples added until it has `size` samples."""
    tokens, targets = batch.inputs["tokens"], batch.inputs["targets"]
    missing = size - len(tokens)
    if missing == 0:
        return batch
    more = tokens.new_zeros((missing, tokens.shape[1]))
    return Batch(
        {"tokens": torch.cat([tokens, more]), "targets": torch.cat([targets, torch.full_like(more, IGNORE)])},
        batch.weight,
    )
