"""Sizes that cost speed are named, with better ones."""

from __future__ import annotations

from typing import Any

import pytest

from zerofit.config.models import GPT2Config, MambaConfig
from zerofit.planning.dimensions import dimension_notes, fallback_warnings

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


@pytest.mark.parametrize(
    ("fields", "capability", "said"),
    [
        ({"d_state": 128}, (9, 0), "d_state up to 64, not 128.*10 to 50 times.*768.0 MiB more memory"),
        ({}, (7, 5), "compute capability 8.0, and this one has 7.5.*96.0 MiB"),
        ({"d_conv": 6}, (9, 0), "d_conv up to 4, not 6"),
    ],
)
def test_what_no_kernel_takes_is_said_with_its_cost(fields: dict[str, Any], capability: Any, said: str) -> None:
    import re

    model = MambaConfig.model_validate({"d_model": 1024, "n_layers": 1, "vocab_size": 64, **fields})
    (found,) = fallback_warnings(model, capability, micro_batch=2)
    assert re.search(said, found)


def test_what_the_kernels_take_is_not_warned_about() -> None:
    assert fallback_warnings(MambaConfig(d_state=64, vocab_size=64), (8, 0), 1) == ()
    assert fallback_warnings(GPT2Config.model_validate(GPT2), (6, 1), 1) == ()
