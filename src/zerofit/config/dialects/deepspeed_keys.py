"""Every key of a DeepSpeed 0.19.8 configuration, and what zerofit makes of it.

Names and defaults: DeepSpeed's ``runtime/constants.py``, ``runtime/config.py``, ``runtime/zero/config.py``,
``runtime/zero/offload_config.py``, ``runtime/precision_config.py``, ``runtime/lr_schedules.py``. What needs more than a
table is in `deepspeed_json`.
"""

from __future__ import annotations

#: Blocks that are read key by key.
BLOCKS = frozenset(
    {
        "optimizer",
        "optimizer.params",
        "scheduler",
        "scheduler.params",
        "fp16",
        "bf16",
        "bfloat16",
        "zero_optimization",
        "zero_optimization.offload_optimizer",
        "zero_optimization.offload_param",
        "activation_checkpointing",
        "data_types",
    }
)

#: Keys with the same meaning under another name.
SAME = {
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "accumulation_steps",
    "gradient_clipping": "optimizer.grad_clip",
    "zero_optimization.overlap_comm": "zero.overlap_comm",
    "zero_optimization.reduce_bucket_size": "zero.reduce_bucket_elements",
}

#: The same, where the stage is 3; DeepSpeed takes them with and without the prefix.
STAGE_3 = {
    "stage3_prefetch_bucket_size": "zero.prefetch_bucket_elements",
    "stage3_param_persistence_threshold": "zero.persistence_threshold_elements",
    "stage3_max_live_parameters": "zero.max_live_elements",
    "stage3_max_reuse_distance": "zero.max_reuse_distance_elements",
    "sub_group_size": "zero.sub_group_elements",
}
STAGE_3_SAME = {
    f"zero_optimization.{name}": target
    for prefixed, target in STAGE_3.items()
    for name in (prefixed, prefixed.removeprefix("stage3_"))
}

FP16_SCALE = {
    "fp16.initial_scale_power": "loss_scale.initial_power",
    "fp16.loss_scale_window": "loss_scale.window",
    "fp16.hysteresis": "loss_scale.hysteresis",
    "fp16.min_loss_scale": "loss_scale.min_scale",
}

_CHECKPOINTING = (
    "DeepSpeed's block does nothing unless the model calls DeepSpeed's checkpointing; zerofit's own setting is "
    "activation_checkpointing (none, full, or every n-th block)"
)
_MASTERS = "masters and optimizer states are fp32"
_EVENTS = "zerofit writes events.jsonl, and rank 0 prints progress"
_NVME_BUFFERS = "buffers are sized by the plan"
_MODEL_PARALLEL = "zerofit is data-parallel: every GPU takes part as a rank of its own"

#: Key -> why nothing depends on it here.
IGNORED = {
    "managed_gradient_accumulation": "the engine runs the whole accumulation window itself",
    "prescale_gradients": "the loss is divided once by the global count of trained tokens",
    "gradient_predivide_factor": "the loss is divided once by the global count of trained tokens",
    "gradient_allreduce_op": "gradients are those of the mean over all trained tokens",
    "disable_allgather": "updated parameters are always gathered",
    "seq_parallel_communication_data_type": "there is no sequence parallelism here",
    "sequence_parallel_size": _MODEL_PARALLEL,
    "dump_state": "the resolved configuration and the plan lie in the run folder",
    "disable_python_gc": "Python's garbage collector is left alone",
    "vocabulary_size": "the vocabulary comes from model.vocab_size or from the data",
    "wall_clock_breakdown": "every step's time is in events.jsonl; DeepSpeed's timers wait for the GPU",
    "memory_breakdown": "the scorecard compares measured with predicted memory at the end of a run",
    "dataloader_drop_last": "zerofit's own loader draws a fixed number of samples a step",
    "zero_allow_untested_optimizer": "the engine hands DeepSpeed its own optimizer, and sets this itself",
    "use_data_before_expert_parallelism": "there are no experts here",
    "log_level": "DeepSpeed's log stays as it is",
    "checkpoint": "zerofit writes its own checkpoints (docs/checkpoints.md)",
    "datastates_ckpt": "zerofit writes its own checkpoints (docs/checkpoints.md)",
    "data_efficiency": "zerofit's own loader feeds the model, not DeepSpeed's",
    "pipeline": _MODEL_PARALLEL,
    "tensor_parallel": _MODEL_PARALLEL,
    "expert_parallel": _MODEL_PARALLEL,
    "hybrid_engine": "it serves reinforcement learning from feedback, which is not here",
    "weight_quantization": "weights are trained in the precision of the run",
    "compile": "DeepCompile is not used; torch.compile of each block is the setting compile",
    "torch_autocast": "text models run in the precision of the run without autocast: set precision",
    "flops_profiler": "`zerofit plan --explain` shows the model's FLOPs, and every step its MFU",
    "comms_logger": "`zerofit plan --explain` shows what is communicated",
    "timers": "DeepSpeed's timers wait for the GPU in every micro-step; they stay off",
    "tensorboard": _EVENTS,
    "wandb": _EVENTS,
    "csv_monitor": _EVENTS,
    "comet": _EVENTS,
    "monitor_config": _EVENTS,
    "autotuning": "`zerofit plan` chooses strategy, micro-batch and offload before anything runs",
    "aio": "DeepSpeed's own values are used for NVMe",
    "fp16.auto_cast": "the model's inputs are token ids",
    "fp16.consecutive_hysteresis": "the hysteresis is refilled when the scale doubles",
    "fp16.fp16_master_weights_and_grads": _MASTERS,
    "bf16.immediate_grad_update": "gradients are applied once a step",
    "bf16.check_grad_overflow": "a step whose gradient is not finite is skipped in every precision",
    "bf16.bf16_master_weights_and_grads": _MASTERS,
    "bf16.bf16_optimizer_states": _MASTERS,
    "data_types.param_dtype": "parameters have the precision of the run",
    "data_types.buffer_dtype": "buffers have the precision of the run",
    "data_types.keep_in_fp32_modules": "fp32 masters are kept of every parameter",
    "optimizer.legacy_fusion": "torch's fused kernels are used",
    "zero_optimization.contiguous_gradients": "always on",
    "zero_optimization.reduce_scatter": "always on",
    "zero_optimization.use_multi_rank_bucket_allreduce": "left at DeepSpeed's default",
    "zero_optimization.allgather_partitions": "DeepSpeed 0.19 gathers in one collective where NCCL has it",
    "zero_optimization.allgather_bucket_size": "DeepSpeed 0.19 does not use it where one collective gathers all",
    "zero_optimization.compute_grad_norm": "the norm is always computed: it is in events.jsonl",
    "zero_optimization.load_from_fp32_weights": "zerofit loads fp32 masters from its own checkpoints",
    "zero_optimization.elastic_checkpoint": "any run resumes on any number of GPUs",
    "zero_optimization.zenflow": "not used; offloaded states are updated once a step",
    "zero_optimization.cpu_offload_use_pin_memory": "say pin_memory in offload_optimizer",
    "zero_optimization.stage3_model_persistence_threshold": "left at DeepSpeed's default",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "`zerofit export` writes weights from a checkpoint",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "`zerofit export` writes weights from a checkpoint",
    "zero_optimization.stage3_module_granularity_threshold": "left at DeepSpeed's default",
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": "left at DeepSpeed's default",
    "zero_optimization.stage3_allgather_sequential": "left at DeepSpeed's default",
    "zero_optimization.ignore_unused_parameters": "zerofit's models use every parameter",
    "zero_optimization.legacy_stage1": "ZeRO-1 is DeepSpeed's present one",
    "zero_optimization.round_robin_gradients": "left at DeepSpeed's default",
    "zero_optimization.parameter_alignment": "left at DeepSpeed's default",
    "zero_optimization.zero_hpz_partition_size": "parameters are partitioned over all ranks",
    "zero_optimization.zero_quantized_weights": "weights are communicated in the precision of the run",
    "zero_optimization.zero_quantized_nontrainable_weights": "every weight is trained",
    "zero_optimization.zero_quantized_gradients": "gradients are communicated as they are accumulated",
    "zero_optimization.memory_efficient_linear": "left at DeepSpeed's default",
    "zero_optimization.pipeline_loading_checkpoint": "zerofit loads its own checkpoints",
    "zero_optimization.override_module_apply": "left at DeepSpeed's default",
    "zero_optimization.log_trace_cache_warnings": "left at DeepSpeed's default",
    "zero_optimization.enable_sanity_checks": "left at DeepSpeed's default",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "left at DeepSpeed's default",
    "zero_optimization.leaf_module": "zerofit's models need no leaf modules",
    "zero_optimization.offload_optimizer.buffer_count": _NVME_BUFFERS,
    "zero_optimization.offload_optimizer.buffer_size": _NVME_BUFFERS,
    "zero_optimization.offload_optimizer.pipeline": "left at DeepSpeed's default",
    "zero_optimization.offload_optimizer.pipeline_read": "left at DeepSpeed's default",
    "zero_optimization.offload_optimizer.pipeline_write": "left at DeepSpeed's default",
    "zero_optimization.offload_optimizer.fast_init": "states are read from the run's own start",
    "zero_optimization.offload_optimizer.ratio": "all optimizer states are offloaded, or none",
    "zero_optimization.offload_optimizer.super_offload": "not used",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "not used",
    "zero_optimization.offload_param.buffer_count": _NVME_BUFFERS,
    "zero_optimization.offload_param.buffer_size": _NVME_BUFFERS,
    "zero_optimization.offload_param.max_in_cpu": _NVME_BUFFERS,
    **{
        f"activation_checkpointing.{name}": _CHECKPOINTING
        for name in (
            "partition_activations",
            "number_checkpoints",
            "contiguous_memory_optimization",
            "synchronize_checkpoint_boundary",
            "profile",
            "cpu_checkpointing",
        )
    },
    **{
        f"optimizer.params.{name}": why
        for name, why in {
            "torch_adam": "torch's fused AdamW is used, or DeepSpeedCPUAdam by optimizer.cpu_kernel",
            "fused": "torch's fused AdamW is used",
            "foreach": "torch's fused AdamW is used",
            "bias_correction": "bias correction is always on",
            "amsgrad": "AMSGrad is not used",
            "fp32_optimizer_states": _MASTERS,
            "maximize": "the loss is minimised",
            "capturable": "torch's fused AdamW is used",
            "differentiable": "torch's fused AdamW is used",
            "set_grad_none": "gradients are freed after each step",
            "ns_method": "the steps of Newton and Schulz are zerofit's own",
        }.items()
    },
    **{
        f"optimizer.params.{name}": "belonged to 1-bit optimizers: gradients are communicated as they are accumulated"
        for name in (
            "freeze_step",
            "cuda_aware",
            "comm_backend_name",
            "var_freeze_step",
            "var_update_scaler",
            "local_step_scaler",
            "local_step_clipper",
            "coeff_beta",
            "factor_max",
            "factor_min",
            "factor_threshold",
            "max_coeff",
            "min_coeff",
        )
    },
}

#: Keys that DeepSpeed 0.19 refuses because their features are gone, and what to use.
REMOVED = {
    "nebula": "checkpoints are written while training goes on: save_asynchronously",
    "compression_training": "the compression library is gone; quantise after training, for example with torchao",
    "amp": "NVIDIA Apex is gone; set precision bf16 or fp16",
    "quantize_training": "mixture of quantisation is gone; quantise after training, for example with torchao",
    "sparse_gradients": "sparse embedding gradients are gone; they are reduced dense",
    "eigenvalue": "it served the mixture of quantisation, which is gone",
    "sparse_attention": "sparse attention is gone; attention is PyTorch's scaled_dot_product_attention",
    "elasticity": "elastic training is gone; any run resumes on another number of GPUs (--resume), and global_batch "
    "keeps the batch",
    "graph_harvesting": "graph harvesting is gone; compile true uses torch.compile",
    "curriculum_learning": "the old curriculum is gone; train in stages, each from the last one's checkpoint",
    "progressive_layer_drop": "progressive layer dropping is gone; model.dropout regularises",
    "zero_optimization.mics_shard_size": "MiCS is gone; parameters are partitioned over all ranks",
    "zero_optimization.mics_hierarchical_params_gather": "MiCS is gone; parameters are partitioned over all ranks",
    "zero_optimization.zeropp_loco_param": "LoCo is gone; gradients are communicated as they are accumulated",
    "zero_optimization.cpu_offload": "say offload_optimizer: {device: cpu}",
    "zero_optimization.cpu_offload_param": "say offload_param: {device: cpu}",
}

#: DeepSpeed's optimizers by zerofit's kind; 1-bit variants were removed and compute the same after their warm-up.
OPTIMIZERS = {
    "adam": "adamw",
    "adamw": "adamw",
    "fusedadam": "adamw",
    "deepspeedcpuadam": "adamw",
    "cpuadam": "adamw",
    "lion": "lion",
    "muon": "muon",
    "sgd": "sgd",
    "adafactor": "adafactor",
    "onebitadam": "adamw",
    "zerooneadam": "adamw",
}
REMOVED_OPTIMIZERS = ("onebitadam", "zerooneadam", "onebitlamb")

#: DeepSpeed's schedulers by zerofit's kind.
SCHEDULERS = {
    "warmuplr": "constant",
    "warmupdecaylr": "linear",
    "warmupcosinelr": "cosine",
}
SCHEDULER_PARAMS = {
    "warmuplr": ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "last_batch_iteration"),
    "warmupdecaylr": (
        "total_num_steps",
        "warmup_min_lr",
        "warmup_max_lr",
        "warmup_num_steps",
        "warmup_type",
        "last_batch_iteration",
    ),
    "warmupcosinelr": (
        "total_num_steps",
        "warmup_min_ratio",
        "warmup_num_steps",
        "cos_min_ratio",
        "warmup_type",
        "last_batch_iteration",
    ),
}
