"""On GPUs, with NCCL: every strategy follows the fp32 run of one GPU (benchmarks/parity.py holds the work)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu

PARITY = Path(__file__).parent.parent / "benchmarks" / "parity.py"
#: Largest relative difference of (loss, gradient norm) from fp32 on one GPU, over ten steps.
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (1e-3, 3e-2), "fp16": (1e-3, 1e-2)}


def _run(**case: Any) -> list[tuple[float, float]]:
    spec = importlib.util.spec_from_file_location("parity", PARITY)
    assert spec is not None
    assert spec.loader is not None
    parity = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parity)
    return [tuple(step) for step in parity.run_ranks(**case)]


@pytest.fixture(scope="module")
def reference() -> list[tuple[float, float]]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return _run(strategy="single", precision="fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "case",
    [
        {"strategy": "single"},
        {"strategy": "single", "compile": True},
        {"strategy": "ddp"},
        {"strategy": "fsdp2"},
        {"strategy": "fsdp2", "compile": True},
        {"strategy": "fsdp2", "plan": {"gradient_dtype": "fp32"}},
        {"strategy": "fsdp2", "plan": {"activation_checkpointing_every": 1}, "compile": True},
        {"strategy": "fsdp2", "plan": {"fsdp": {"reshard_after_forward": False}}},
        {"strategy": "zero1"},
        {"strategy": "zero2"},
        {"strategy": "zero2", "compile": True},
        {"strategy": "zero2", "offload": "cpu"},
        {"strategy": "zero3"},
    ],
    ids=lambda case: "-".join(str(value) for value in case.values()),
)
def test_every_strategy_trains_the_same(
    case: dict[str, Any], precision: str, reference: list[tuple[float, float]]
) -> None:
    gpus = 1 if case["strategy"] == "single" else min(torch.cuda.device_count(), 4)
    found = _run(**case, precision=precision, gpus=gpus)
    assert reference[0][1] > 1.0  # clipping is active
    for (loss, norm), (true_loss, true_norm) in zip(found, reference, strict=True):
        assert loss == pytest.approx(true_loss, rel=TOLERANCES[precision][0])
        assert norm == pytest.approx(true_norm, rel=TOLERANCES[precision][1])
