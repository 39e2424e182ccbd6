"""What the planner knows of Mamba: traces compose exactly, recomputation is told apart, presets plan without torch."""

from __future__ import annotations

from typing import Any

import pytest

from test_trace import peaks
from zerofit.config.models import MambaConfig, Recomputation
from zerofit.models.mamba import SPEC
from zerofit.planning.plan import Plan
from zerofit.planning.store import trace_key
from zerofit.planning.template import compose
from zerofit.planning.trace import direct_events, trace_template

DEPTH = 6
CONFIG = MambaConfig(n_layers=DEPTH, d_model=64, d_state=8, vocab_size=97, max_seq_length=80)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"device": "cpu"},
        {"precision": "fp32", "recomputation": "light"},
        {"precision": "fp16", "recomputation": "light"},
        {"precision": "fp16", "compiled": True},
        {"recomputation": "light"},
        {"recomputation": "selective"},
        {"compiled": True},
    ],
    ids=str,
)
def test_composing_equals_tracing_the_whole_model(settings: dict[str, Any]) -> None:
    """Exactly, at sizes and depths that were not traced, with every n-th block recomputed."""
    settings = dict(settings)
    way: Recomputation = settings.pop("recomputation", "full")
    chosen: dict[str, Any] = {"precision": "bf16", "compiled": False, "device": "cuda", **settings}
    plain, recomputed = (trace_template(SPEC, CONFIG, recompute=kind, **chosen) for kind in (None, way))
    for every in (0, 1, 3):
        for samples in (1, 3):
            whole = direct_events(SPEC, CONFIG, every=every, samples=samples, recomputation=way, **chosen)
            assert peaks(compose(plain, recomputed, DEPTH, every, samples)) == whole


def test_the_loss_in_fp16_waits_for_the_backward_pass() -> None:
    """By hand: the final norm's result stays, and its gradient and the table's come with the logits; in bf16 both
    gradients are there after the forward pass."""
    settings: dict[str, Any] = {"every": 0, "samples": 2, "compiled": False, "device": "cuda"}
    (early, early_peak, _), (late, late_peak, backward) = (
        direct_events(SPEC, CONFIG, precision=precision, **settings) for precision in ("bf16", "fp16")
    )
    rows, tokens = CONFIG.padded_vocab_size, 2 * CONFIG.max_seq_length
    normed, table, logits = 2 * tokens * 64, 2 * rows * 64, 2 * CONFIG.max_seq_length * rows
    assert early - late == table  # the gradient of x came in place of x
    assert late_peak < early_peak
    assert backward >= late + normed + table + logits


def test_plans_for_fp16_have_traces_of_their_own() -> None:
    keys = {
        precision: trace_key(
            Plan(
                model=CONFIG, parameters=CONFIG.parameter_count(), strategy="single", device="cuda", world_size=1,
                micro_batch=1, accumulation_steps=1, precision=precision,
            ),
            recompute=False,
        )
        for precision in ("bf16", "fp16")
    }  # fmt: skip
    assert keys["bf16"].text != keys["fp16"].text


def saved_of_a_block(way: Recomputation | None, **changes: Any) -> int:
    """Bytes that one block more leaves for the backward pass, in bf16."""
    config = CONFIG.model_copy(update=changes)
    settings: dict[str, Any] = {"precision": "bf16", "compiled": False, "device": "cuda"}
    plain = trace_template(SPEC, config, recompute=None, **settings)
    other = trace_template(SPEC, config, recompute=way, **settings) if way else None
    first, second = (peaks(compose(plain, other, depth, int(way is not None), 1))[0] for depth in (8, 9))
    return second - first


def test_what_a_block_keeps() -> None:
    """By hand, per token. C width, D inner, N states, R rank; bf16 2 bytes, the residual stream 4."""
    c, d, n, r, tokens = 64, 128, 8, 4, CONFIG.max_seq_length
    stream, products, small = 4 * c, 2 * (2 * d + r + 2 * n), 2 * c
    states = 4 * d * n * -(-tokens // interval())
    once = 2 * 4 * d * n + 4 * d  # exp(A_log) and A, and the step's bias, in fp32
    assert saved_of_a_block("full") == tokens * stream
    assert saved_of_a_block("selective") == tokens * (stream + products)
    assert saved_of_a_block("light") == tokens * (stream + products + 2 * d) + states
    plain = saved_of_a_block(None)
    assert plain == tokens * (stream + small + products + 3 * 2 * d) + states + once
    assert saved_of_a_block("selective", residual_in_fp32=False) == tokens * (2 * c + products)


def interval() -> int:
    from zerofit.kernels.selective_scan_torch import STATE_INTERVAL

    return STATE_INTERVAL
