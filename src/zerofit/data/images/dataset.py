"""One split of prepared pictures, in an order that is a pure function of (seed, epoch, index)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from ..order import Indices, permute, sample_keys
from .store import SPLITS, ImageStore


class ImageDataset:
    """One split.

    Attributes:
        store: the prepared folder.
        numbers: (samples,) rows of the store's index that belong to the split.
        labels: (samples,) int64, places in `classes`.
        samples: pictures of an epoch. A balanced epoch has as many, rounded up to equally many of each class.
    """

    def __init__(self, store: ImageStore, split: str, seed: int, *, balanced: bool = False) -> None:
        self.store, self.split, self.seed, self.balanced = store, split, seed, balanced
        self.numbers: Indices = np.flatnonzero(store.index["split"] == SPLITS.index(split)).astype(np.int64)
        self.labels: Indices = store.index["label"][self.numbers].astype(np.int64)
        self.classes = store.classes
        self._by_class = [np.flatnonzero(self.labels == label).astype(np.int64) for label in range(len(self.classes))]
        self._by_class = [places for places in self._by_class if len(places)]
        self._each = -(-len(self.numbers) // len(self._by_class))
        self.samples = self._each * len(self._by_class) if balanced else len(self.numbers)
        self._balanced_epoch = lru_cache(maxsize=2)(self._draw_balanced)

    def sample_indices(self, first: int, count: int) -> Indices:
        """Pictures (places in `labels`) of the samples `first` .. `first + count` of the endless sequence of epochs."""
        return self.indices_of(np.arange(first, first + count, dtype=np.int64))

    def indices_of(self, sequence: Indices) -> Indices:
        """Pictures of the samples at these places of the sequence. Many at once take hardly longer than few."""
        epochs, positions = sequence // self.samples, sequence % self.samples
        out = np.empty(len(sequence), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            places = permute(positions[inside], self.samples, self.seed, epoch)
            out[inside] = self._balanced_epoch(epoch)[places] if self.balanced else places
        return out

    def sample_keys(self, first: int, count: int) -> Indices:
        """A key each for what is random about those samples (`zerofit.data.augment`); another in every epoch."""
        return self.keys_of(np.arange(first, first + count, dtype=np.int64))

    def keys_of(self, sequence: Indices) -> Indices:
        """Keys of the samples at these places of the sequence."""
        return sample_keys(sequence, self.seed)

    def spread_indices(self, count: int) -> Indices:
        """At most `count` pictures spread evenly over the split, so over the classes: the same in every evaluation."""
        count = min(count, len(self.numbers))
        return np.arange(count, dtype=np.int64) * len(self.numbers) // max(count, 1)

    def _draw_balanced(self, epoch: int) -> Indices:
        """An epoch's pictures, equally many of each class; each class goes through its own permutations in turn."""
        drawn = []
        for label, places in enumerate(self._by_class):
            turns = np.arange(epoch * self._each, (epoch + 1) * self._each, dtype=np.int64)
            rounds, positions = turns // len(places), turns % len(places)
            order = np.empty(len(turns), dtype=np.int64)
            for number in np.unique(rounds).tolist():
                inside = rounds == number
                order[inside] = permute(positions[inside], len(places), self.seed + 1 + label, number)
            drawn.append(places[order])
        return np.concatenate(drawn)


def open_images(folder: Path, split: str, seed: int, *, balanced: bool = False) -> ImageDataset:
    """A split of a prepared folder.

    Raises:
        DataError: nothing was prepared there, or it is damaged.
    """
    return ImageDataset(ImageStore(folder), split, seed, balanced=balanced)
