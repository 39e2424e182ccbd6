"""Sample order: a bijection, a function of (seed, epoch, index), the same for every number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerofit.data.loader import IGNORE, Share, TrainLoader, evaluation_window
from zerofit.data.order import permute
from zerofit.data.tokens import TokenDataset

SEEDS = st.integers(0, 2**31)


@given(n=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 50))
def test_permutation_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


@given(n=st.integers(1, 10**9), seed=SEEDS, position=st.integers(0, 10**9 - 1))
def test_any_position_is_reached_alone(n: int, seed: int, position: int) -> None:
    position %= n
    pair = np.array([position, n - 1])
    assert permute(pair, n, seed, 3)[0] == permute(pair[:1], n, seed, 3)[0] < n


def test_epochs_and_seeds_differ() -> None:
    everything = np.arange(1000)
    orders = [permute(everything, 1000, seed, epoch).tolist() for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    displaced = np.abs(np.array(orders[0]) - everything).mean()
    assert 250 < displaced < 420  # 1000/3 for a uniformly random permutation


def _dataset(tokens: int = 2000, block_size: int = 8) -> TokenDataset:
    return TokenDataset(np.arange(tokens, dtype=np.uint16), block_size, seed=5)


def _samples(dataset: TokenDataset, step: int, world_size: int, micro_batch: int, accumulation: int) -> list[list[int]]:
    """First tokens of a step's samples, micro-step by micro-step and rank by rank."""
    loaders = [
        TrainLoader(dataset, Share(micro_batch, accumulation, rank, world_size), pin_memory=False)
        for rank in range(world_size)
    ]
    windows = [loader.window(step) for loader in loaders]
    for loader in loaders:
        loader.close()
    return [row for m in range(accumulation) for window in windows for row in window[m].inputs["tokens"].tolist()]


@pytest.mark.parametrize("step", [0, 1, 17, 40])
def test_samples_do_not_depend_on_the_number_of_ranks(step: int) -> None:
    dataset = _dataset()
    alone = _samples(dataset, step, 1, 12, 1)
    for world_size, micro_batch, accumulation in ((2, 6, 1), (2, 2, 3), (3, 4, 1), (4, 1, 3)):
        assert _samples(dataset, step, world_size, micro_batch, accumulation) == alone


def test_loader_gives_the_same_window_in_any_order() -> None:
    loader = TrainLoader(_dataset(), Share(3, 2, 0, 1), pin_memory=False)
    walked = [loader.window(step)[1].inputs["tokens"].tolist() for step in range(5)]
    assert loader.window(3)[1].inputs["tokens"].tolist() == walked[3]
    assert len({str(window) for window in walked}) == 5
    loader.close()


def test_targets_are_the_next_tokens_and_weight_counts_them() -> None:
    loader = TrainLoader(_dataset(), Share(3, 1, 0, 1), pin_memory=False)
    (batch,) = loader.window(0)
    loader.close()
    assert (batch.inputs["targets"] == batch.inputs["tokens"] + 1).all()
    assert batch.weight == 24


def test_an_epoch_sees_every_block_once() -> None:
    dataset = _dataset()
    starts = dataset.starts(0, dataset.samples)
    assert len(set(starts.tolist())) == dataset.samples
    assert len({start % dataset.block_size for start in starts.tolist()}) == 1  # one shift an epoch
    assert max(starts.tolist()) + dataset.block_size < len(dataset.tokens)
    shifts = {int(dataset.starts(epoch * dataset.samples, 1)[0]) % dataset.block_size for epoch in range(20)}
    assert len(shifts) > 3  # block boundaries move from epoch to epoch


@given(tokens=st.integers(10, 400), samples=st.integers(1, 200))
def test_samples_never_run_over_the_end(tokens: int, samples: int) -> None:
    dataset = _dataset(tokens)
    assert dataset.starts(0, samples).max() + dataset.block_size + 1 <= tokens
    assert dataset.spread_starts(samples).max() + dataset.block_size + 1 <= tokens


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_counts_each_sample_once_on_any_number_of_ranks(world_size: int) -> None:
    dataset = _dataset(8 * 37 + 1)
    seen: list[list[int]] = []
    lengths = set()
    for rank in range(world_size):
        window = list(evaluation_window(dataset, Share(12 // world_size, 1, rank, world_size), batches=5))
        lengths.add(len(window))
        for batch in window:
            rows = batch.inputs["targets"][:, 0] != IGNORE
            seen += batch.inputs["tokens"][rows].tolist()
            assert batch.weight == 8 * int(rows.sum())
            assert len(batch.inputs["tokens"]) == 12 // world_size
    assert len(lengths) == 1  # equally many collectives on every rank
    assert sorted(seen) == [list(range(8 * i, 8 * i + 8)) for i in range(37)]
