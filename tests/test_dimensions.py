"""Sizes that cost speed are named, with better ones."""

from __future__ import annotations

from typing import Any

import pytest

from zerofit.config.models import GPT2Config, MambaConfig
from zerofit.planning.dimensions import dimension_notes

GPT2 = {"n_layer": 2, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "pad_vocab_to": 64}


def notes(precision: Any = "bf16", device: str = "cuda", **fields: Any) -> tuple[str, ...]:
    return dimension_notes(GPT2Config.model_validate({**GPT2, **fields}), precision, device)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pad_vocab_to": 1}, "50,257 rows, no multiple of 64.*50,304"),
        ({"n_embd": 780, "n_head": 10}, "780 wide.*768 and 832"),
        ({"n_head": 64}, r"12 channels \(n_embd 768 / n_head 64\).*pads it to 16.*n_head 24 has them"),
        ({"n_head": 2}, "384 channels.*256 at most.*n_head 6 has them"),
    ],
)
def test_sizes_that_cost_speed(fields: dict[str, Any], said: str) -> None:
    import re

    found = notes(**fields)
    assert any(re.search(said, note) for note in found), found


def test_published_sizes_and_slow_arithmetic_are_left_alone() -> None:
    assert notes() == ()
    assert notes(n_embd=1600, n_head=25) == ()
    assert notes(pad_vocab_to=1, device="cpu") == ()
    assert notes(pad_vocab_to=1, precision="fp32") == ()


def test_mamba_has_no_heads() -> None:
    odd = MambaConfig(d_model=100, n_layers=1, vocab_size=64)
    assert len(dimension_notes(odd, "bf16", "cuda")) == 1
