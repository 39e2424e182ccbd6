"""The reader of a fresh start computes ahead in threads: the same values in any order, within the plan's memory."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from zerofit.checkpoint.model import _InitialValues
from zerofit.config.models import MambaConfig
from zerofit.models.mamba import SPEC

CONFIG = MambaConfig(n_layers=5, d_model=32, d_state=8, vocab_size=90, max_seq_length=12)
NAMES = list(CONFIG.parameter_shapes())
BYTES = {name: 4 * torch.Size(shape).numel() for name, shape in CONFIG.parameter_shapes().items()}


class Watched:
    """The recipe, with a note of who computed what, and of what is held at once."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.threads: set[str] = set()
        self.both = threading.Barrier(2, timeout=20)
        self.wait = False

    def init(self, config: Any, name: str, seed: int) -> Tensor:
        self.made.append(name)
        self.threads.add(threading.current_thread().name)
        if self.wait and len(self.made) <= 2:
            self.both.wait()
        return SPEC.init(config, name, seed)


@pytest.fixture(autouse=True)
def _every_tensor_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_InitialValues, "LARGE", 1)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "order", [NAMES, NAMES[::-1], NAMES[7:30], [*NAMES[::2], *NAMES[1::2]], [n for n in NAMES for _ in range(2)]],
    ids=["all", "backwards", "a part", "two groups", "by intervals"],
)  # fmt: skip
def test_values_are_those_of_the_recipe_in_any_order(order: list[str], threads: int) -> None:
    values = _InitialValues(SPEC, CONFIG, 5, threads)
    for name in order:
        assert torch.equal(values(name), SPEC.init(CONFIG, name, 5).reshape(-1)), name


def test_two_tensors_are_computed_at_once() -> None:
    watched: Any = Watched()
    watched.wait = True  # the first two wait for each other: one after another they would never meet
    values = _InitialValues(watched, CONFIG, 5, 2)
    for name in NAMES:
        values(name)
    assert sorted(watched.made) == sorted(NAMES)  # each once
    assert len(watched.threads) > 1


def test_one_thread_computes_nothing_ahead() -> None:
    watched: Any = Watched()
    values = _InitialValues(watched, CONFIG, 5, 1)
    values(NAMES[3])
    assert watched.made == [NAMES[3]]
    assert watched.threads == {threading.current_thread().name}


def test_what_is_held_ahead_fits_beside_the_one_that_is_read() -> None:
    values = _InitialValues(SPEC, CONFIG, 5, 16)
    for name in NAMES:
        values(name)
        assert sum(BYTES[other] for other in values._ahead) <= max(BYTES.values())
    assert not values._ahead
