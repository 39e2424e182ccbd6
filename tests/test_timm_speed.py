"""Predicted step times of timm's models: counted layer by layer, multiplied as ResNet's and GPT-2's are."""

from __future__ import annotations

from typing import Any

import pytest

from test_speed import machine, step
from test_timm import needs_timm
from zerofit.config.models import ModelConfig, ResNetConfig, TimmConfig
from zerofit.planning.calibration import rates
from zerofit.planning.plan import Plan
from zerofit.planning.speed import StepPrediction, predict_step, why_not_predicted
from zerofit.planning.speed_images import parts_of
from zerofit.planning.timm_models import described


def seconds(model: ModelConfig, **fields: Any) -> StepPrediction:
    """A step of 256 pictures on one H200."""
    usual: dict[str, Any] = {"micro_batch": 256, "strategy": "single", "parameters": model.parameter_count()}
    return step(machine(gpus=fields.get("world_size", 1)), **{**usual, "model": model, **fields})


@needs_timm
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_of_timms_resnet_is_predicted_as_of_our_own(compiled: bool) -> None:
    """Counted layer by layer it is the same convolutions and the same maps; and what its pooling returns, of which
    ours counts nothing."""
    ours = ResNetConfig(layers=18, num_classes=5, input_size=224)
    theirs = described(TimmConfig(name="resnet18", num_classes=5, input_size=224))
    assert theirs.work is not None
    own, counted = parts_of(ours), parts_of(theirs)
    assert own is not None
    assert counted is not None
    assert [part.convolution_flops for part in own] == [part.convolution_flops for part in counted]
    assert [part.convolutions for part in own] == [part.convolutions for part in counted]
    ways: list[dict[str, Any]] = [{}, {"strategy": "ddp", "world_size": 2}, {"activation_checkpointing_every": 1}]
    for way in ways:
        found = [seconds(model, compile=compiled, **way) for model in (ours, theirs)]
        assert found[1].step_seconds == pytest.approx(found[0].step_seconds, rel=0.05)
        assert found[1].mfu > 0


@needs_timm
def test_a_step_of_a_vision_transformer_is_products_attention_and_traffic() -> None:
    """ViT-S/16: 12 blocks of width C = 384 on T = 197 rows, 12 C^2 weights each; its patches are a convolution."""
    model = described(TimmConfig(name="vit_small_patch16_224", num_classes=1000, input_size=224))
    parts = parts_of(model)
    assert parts is not None
    outside, *blocks = parts
    width, rows = 384, 197
    for block in blocks:
        assert block.product_flops == 2 * rows * 12 * width**2
        assert block.attention_flops == 2 * 2 * rows**2 * width
        assert (block.products, block.convolutions, block.convolution_flops) == (4, 0, 0)
        assert block.returned == rows * width * (2 + 3 + 1 + 4 + 4 + 1)  # norms, qkv, out, fc1, its activation, fc2
    assert outside.convolution_flops == 2 * 196 * width * 3 * 16**2
    assert model.work is not None
    assert model.work["width"] == pytest.approx(width, rel=0.01)
    assert model.work["rows"] == pytest.approx(rows, rel=0.01)
    usual, twice = seconds(model), seconds(model, micro_batch=512)
    again = seconds(model, activation_checkpointing_every=1)
    found = rates(machine(gpus=1), "bf16")
    assert found is not None
    assert usual.parts["compute"] > 256 * model.flops_per_item() / found.matrix_flops
    assert twice.parts["compute"] > 1.9 * usual.parts["compute"]
    assert again.parts["recompute"] == pytest.approx(usual.parts["compute"] / 3, rel=0.15)


def test_what_was_not_counted_is_not_predicted() -> None:
    """As in a plan of an older version."""
    model = TimmConfig(name="resnet18", num_classes=5, input_size=224, architecture={"parameters": {"w": [2, 2]}})
    plan = Plan.model_validate({
        "model": model, "parameters": 4, "strategy": "single", "device": "cuda", "world_size": 1, "micro_batch": 1,
        "accumulation_steps": 1, "precision": "bf16",
    })  # fmt: skip
    found = rates(machine(gpus=1), "bf16")
    assert predict_step(plan, found) is None
    assert why_not_predicted(plan, found) == "what this model computes was not counted when it was described"
    assert why_not_predicted(plan, None) == "this GPU's rates are not known (`zerofit plan --calibrate`)"
    assert why_not_predicted(plan.model_copy(update={"device": "cpu"}), None) is None
