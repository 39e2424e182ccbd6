"""DeepSpeed's configuration as a pure function of the plan. Imports neither torch nor DeepSpeed; never says "auto".

What is left out stays off: no scheduler, no monitor, no data loader, no autotuner, no optimizer (the engine builds it).
"""

from __future__ import annotations

import math
from typing import Any

from ..planning.plan import Plan

#: DeepSpeed prints its progress every so many steps: never.
NEVER = 2**31 - 1


def deepspeed_config(plan: Plan) -> dict[str, Any]:
    """The dictionary that DeepSpeed 0.19.8 is built from; JSON-ready.

    ``gradient_accumulation_steps`` is the real window, because gradient norms under CPU offload depend on it.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": plan.optimizer.grad_clip,
        "zero_optimization": _zero_optimization(plan),
        # Torch's fused AdamW is as fast as theirs and compiles nothing.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        # Their throughput timer waits for the device in every micro-step.
        "timers": {"throughput": {"enabled": False}},
        **_precision(plan),
    }
    if plan.gradient_dtype == "fp32" and plan.mixed:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def _precision(plan: Plan) -> dict[str, Any]:
    if plan.precision == "bf16":
        # A step whose gradient is not finite is skipped in every precision.
        bf16: dict[str, Any] = {"enabled": True, "check_grad_overflow": True}
        if plan.optimizer.master == "bf16":
            # The first makes masters and their gradients bf16. Without the second, which says nothing about our own
            # optimizer, it asks for DeepSpeedCPUAdam.
            bf16 |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        return {"bf16": bf16}
    if plan.precision == "fp16":
        # Static here: the engine drives the scale through `override_loss_scale`. DeepSpeed's own scaler doubles the
        # scale between measuring the gradient and dividing it, so that each doubling halves one update.
        return {"fp16": {"enabled": True, "loss_scale": 1.0}}
    return {}


def _zero_optimization(plan: Plan) -> dict[str, Any]:
    zero = plan.zero
    stage = int(plan.strategy.removeprefix("zero"))
    block: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": zero.overlap_comm,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": zero.reduce_bucket_elements,
    }
    if plan.offload != "none":
        block["offload_optimizer"] = _offload(plan, plan.offload)
    if stage == 3:
        block |= {
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_elements,
            "stage3_param_persistence_threshold": zero.persistence_threshold_elements,
            "stage3_max_live_parameters": zero.max_live_elements,
            "stage3_max_reuse_distance": zero.max_reuse_distance_elements,
            "sub_group_size": zero.sub_group_elements,
        }
    if plan.offload_parameters != "none":
        block["offload_param"] = _offload(plan, plan.offload_parameters)
        if plan.offload_parameters == "nvme":
            # One buffer holds one parameter's partition; no flat compute copy stays in host memory.
            block["offload_param"] |= {"buffer_size": _largest_partition_elements(plan), "max_in_cpu": 0}
            # Every gathered parameter keeps one of five buffers, and the sixth ends the run: keep none, prefetch none.
            block |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    return block


def _offload(plan: Plan, device: str) -> dict[str, Any]:
    block: dict[str, Any] = {"device": device, "pin_memory": plan.zero.pin_memory}
    if device == "nvme":
        block["nvme_path"] = str(plan.nvme_path)
    return block


def _largest_partition_elements(plan: Plan) -> int:
    """Elements of the largest parameter's partition on one rank, ZeRO-3."""
    return max(math.ceil(math.prod(shape) / plan.world_size) for shape in plan.model.parameter_shapes().values())
