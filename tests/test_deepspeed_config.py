"""The DeepSpeed configuration of a plan, word for word."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zerofit.config.models import GPT2Config
from zerofit.engines.deepspeed_config import NEVER, deepspeed_config
from zerofit.planning.plan import OptimizerPlan, Plan, ZeroPlan

MODEL = GPT2Config(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=11)


def plan(**fields: Any) -> Plan:
    base: dict[str, Any] = {
        "model": MODEL,
        "parameters": MODEL.parameter_count(),
        "strategy": "zero2",
        "device": "cuda",
        "world_size": 2,
        "micro_batch": 3,
        "accumulation_steps": 5,
        "precision": "bf16",
        "optimizer": OptimizerPlan(grad_clip=0.7),
        "zero": ZeroPlan(reduce_bucket_elements=1000),
    }
    return Plan.model_validate(base | fields)


COMMON = {
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 5,
    "gradient_clipping": 0.7,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": NEVER,
    "wall_clock_breakdown": False,
    "timers": {"throughput": {"enabled": False}},
}
ZERO = {
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 1000,
}
STAGE3 = {
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}
BF16 = {"bf16": {"enabled": True, "check_grad_overflow": True}}
GOLDEN = [
    ({}, {**BF16, "zero_optimization": {"stage": 2, **ZERO}}),
    ({"strategy": "zero1", "precision": "fp32"}, {"zero_optimization": {"stage": 1, **ZERO}}),
    (
        {"strategy": "zero1", "gradient_dtype": "fp32"},
        {
            **BF16,
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": {"stage": 1, **ZERO},
        },
    ),
    (
        {"optimizer": OptimizerPlan(grad_clip=0.7, master="bf16", state="8bit")},
        {
            "bf16": {**BF16["bf16"], "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
            "zero_optimization": {"stage": 2, **ZERO},
        },
    ),
    (
        {"offload": "cpu", "precision": "fp16"},
        {
            "fp16": {"enabled": True, "loss_scale": 1.0},
            "zero_optimization": {"stage": 2, **ZERO, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        },
    ),
    (
        {"strategy": "zero3", "offload": "nvme", "offload_parameters": "nvme", "nvme_path": "/fast"},
        {
            **BF16,
            "zero_optimization": {
                "stage": 3,
                **ZERO,
                **STAGE3,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0,
                "offload_optimizer": {"device": "nvme", "pin_memory": True, "nvme_path": "/fast"},
                "offload_param": {
                    "device": "nvme",
                    "pin_memory": True,
                    "nvme_path": "/fast",
                    "buffer_size": 128,  # the MLP's 8 x 32, halved
                    "max_in_cpu": 0,
                },
            },
        },
    ),
]


@pytest.mark.parametrize(("fields", "expected"), GOLDEN, ids=[str(fields) for fields, _ in GOLDEN])
def test_golden(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert deepspeed_config(plan(**fields)) == {**COMMON, **expected}


@pytest.mark.parametrize(("fields", "_"), GOLDEN)
def test_is_json_without_auto(fields: dict[str, Any], _: object) -> None:
    assert '"auto"' not in json.dumps(deepspeed_config(plan(**fields)))


def test_clipping_off_is_zero() -> None:
    assert deepspeed_config(plan(optimizer=OptimizerPlan(grad_clip=0)))["gradient_clipping"] == 0


def test_imports_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys, zerofit.engines.deepspeed_config as module; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'deepspeed')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=False).returncode == 0
