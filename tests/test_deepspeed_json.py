"""DeepSpeed's configuration files: every key is used, translated, or named with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zerofit.config.dialects import deepspeed_keys as table
from zerofit.config.dialects.deepspeed_json import _KNOWN, _kinds, read_deepspeed, strip_comments
from zerofit.config.dialects.notes import Note, Reading
from zerofit.config.keys import keys
from zerofit.config.load import ResolvedConfig, load_config
from zerofit.errors import ConfigError
from zerofit.planning.batch import possible_splits

SOURCE = Path("ds.json")


def read(document: dict[str, Any]) -> Reading:
    return read_deepspeed(json.dumps(document, indent=1), SOURCE)


def nested(name: str, value: object) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for ``a.b``."""
    for part in reversed(name.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    found = dict(one)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return found


def note_of(reading: Reading, key: str) -> Note:
    return next(note for note in reading.notes if note.key == key)


def settings(reading: Reading) -> dict[str, object]:
    return {entry.name: entry.value for entry in reading.entries}


#: key, value, what else must stand there, settings, outcome
STAGE_3 = {"zero_optimization": {"stage": 3}}
FP16 = {"fp16": {"enabled": True}}
COSINE = {"scheduler": {"type": "WarmupCosineLR"}}
WARMUP = {"scheduler": {"type": "WarmupLR"}}
CPU = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
HAS_RATIO = "schedule.min_ratio" in keys()
GOLDEN: list[tuple[str, Any, dict[str, Any], dict[str, Any], str]] = [
    ("train_batch_size", 32, {}, {"global_batch": 32}, "used"),
    ("train_micro_batch_size_per_gpu", 4, {}, {"micro_batch": 4}, "used"),
    ("gradient_accumulation_steps", 8, {}, {"accumulation_steps": 8}, "used"),
    ("gradient_clipping", 0.5, {}, {"optimizer.grad_clip": 0.5}, "used"),
    ("steps_per_print", 100, {}, {"log_interval": 100}, "translated"),
    ("zero_force_ds_cpu_optimizer", True, {}, {"optimizer.cpu_kernel": "deepspeed"}, "translated"),
    ("communication_data_type", "fp32", {}, {"gradient_dtype": "fp32"}, "translated"),
    ("data_types.grad_accum_dtype", "bf16", {}, {"gradient_dtype": "compute"}, "translated"),
    ("fp16.enabled", True, {}, {"precision": "fp16"}, "translated"),
    ("fp16.enabled", False, {}, {}, "ignored"),
    ("bf16.enabled", True, {}, {"precision": "bf16"}, "translated"),
    ("fp16.loss_scale", 0, FP16, {}, "used"),
    ("fp16.loss_scale", 1024, FP16, {"loss_scale.initial_power": 10, "loss_scale.window": 2**31 - 1}, "translated"),
    ("fp16.initial_scale_power", 12, FP16, {"loss_scale.initial_power": 12}, "used"),
    ("fp16.initial_scale_power", 12, {}, {}, "ignored"),
    ("fp16.loss_scale_window", 500, FP16, {"loss_scale.window": 500}, "used"),
    ("fp16.hysteresis", 1, FP16, {"loss_scale.hysteresis": 1}, "used"),
    ("fp16.min_loss_scale", 2, FP16, {"loss_scale.min_scale": 2}, "used"),
    ("optimizer.type", "AdamW", {}, {"optimizer.kind": "adamw"}, "translated"),
    ("optimizer.type", "OneBitAdam", {}, {"optimizer.kind": "adamw"}, "removed"),
    ("optimizer.params.lr", 1e-4, {}, {"optimizer.learning_rate": 1e-4}, "used"),
    ("optimizer.params.betas", [0.8, 0.9], {}, {"optimizer.beta1": 0.8, "optimizer.beta2": 0.9}, "translated"),
    ("optimizer.params.eps", 1e-6, {}, {"optimizer.eps": 1e-6}, "used"),
    ("optimizer.params.weight_decay", 0.01, {}, {"optimizer.weight_decay": 0.01}, "used"),
    ("optimizer.params.max_grad_norm", 1.0, {}, {"optimizer.grad_clip": 1.0}, "used"),
    ("optimizer.params.momentum", 0.9, {}, {}, "ignored"),
    ("optimizer.params.adam_w_mode", True, {}, {}, "used"),
    ("scheduler.type", "WarmupCosineLR", {}, {"schedule.kind": "cosine"}, "translated"),
    ("scheduler.params.warmup_num_steps", 10, WARMUP, {"schedule.warmup_steps": 10}, "used"),
    ("scheduler.params.warmup_max_lr", 1e-3, WARMUP, {"optimizer.learning_rate": 1e-3}, "translated"),
    ("scheduler.params.warmup_min_lr", 0, WARMUP, {}, "used"),
    ("scheduler.params.warmup_min_lr", 1e-6, WARMUP, {}, "ignored"),
    ("scheduler.params.warmup_type", "log", WARMUP, {}, "translated"),
    ("scheduler.params.warmup_type", "linear", WARMUP, {}, "used"),
    ("scheduler.params.last_batch_iteration", -1, WARMUP, {}, "ignored"),
    ("scheduler.params.total_num_steps", 500, COSINE, {"schedule.decay_steps": 500}, "translated"),
    ("scheduler.params.warmup_min_ratio", 0.1, COSINE, {}, "ignored"),
    ("scheduler.params.cos_min_ratio", 0.1, COSINE | {"optimizer": {"params": {"lr": 1e-3}}},
     {"schedule.min_ratio": 0.1} if HAS_RATIO else {"schedule.min_learning_rate": 1e-4},
     "used" if HAS_RATIO else "translated"),
    ("zero_optimization.stage", 0, {}, {"strategy": "ddp"}, "translated"),
    ("zero_optimization.stage", 1, {}, {"strategy": "zero1"}, "translated"),
    ("zero_optimization.stage", "auto", {}, {}, "auto"),
    ("zero_optimization.overlap_comm", True, STAGE_3, {"zero.overlap_comm": True}, "used"),
    ("zero_optimization.overlap_comm", True, {}, {}, "ignored"),
    ("zero_optimization.reduce_bucket_size", 5e8, STAGE_3, {"zero.reduce_bucket_elements": 5e8}, "used"),
    *(
        (name, 10_000, STAGE_3, {target: 10_000}, "used") for name, target in table.STAGE_3_SAME.items()
    ),
    ("zero_optimization.stage3_max_live_parameters", 1e9, {"zero_optimization": {"stage": 2}}, {}, "ignored"),
    ("zero_optimization.offload_optimizer.device", "cpu", STAGE_3, {"offload": "cpu"}, "used"),
    ("zero_optimization.offload_optimizer.nvme_path", "/x",
     {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, {"nvme_path": "/x"}, "used"),
    ("zero_optimization.offload_optimizer.nvme_path", "/x", CPU, {}, "ignored"),
    ("zero_optimization.offload_optimizer.pin_memory", True, CPU, {"zero.pin_memory": True}, "used"),
    ("zero_optimization.offload_param.device", "cpu", CPU, {"offload_parameters": "cpu"}, "used"),
    ("zero_optimization.offload_param.device", "none", {}, {"offload_parameters": "none"}, "used"),
    ("zero_optimization.offload_param.nvme_path", "/x",
     merged(CPU, {"zero_optimization": {"offload_param": {"device": "nvme"}}}), {"nvme_path": "/x"}, "used"),
    ("zero_optimization.offload_param.pin_memory", False,
     merged(CPU, {"zero_optimization": {"offload_param": {"device": "cpu"}}}), {"zero.pin_memory": False}, "used"),
    ("zero_optimization.cpu_offload", True, {"zero_optimization": {"stage": 2}}, {"offload": "cpu"}, "removed"),
    ("zero_optimization.cpu_offload_param", True, CPU, {"offload_parameters": "cpu"}, "removed"),
    *((name, True, {}, {}, "ignored") for name in table.IGNORED),
    *(
        (name, True, {}, {}, "removed") for name in table.REMOVED if ".cpu_offload" not in name
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "beside", "expected", "outcome"), GOLDEN, ids=[f"{row[0]}-{row[4]}" for row in GOLDEN]
)
def test_every_key(key: str, value: Any, beside: dict[str, Any], expected: dict[str, Any], outcome: str) -> None:
    reading = read(merged(beside, nested(key, value)))
    without = settings(read(beside)) if beside else {}
    found = settings(reading)
    assert {name: found[name] for name in found if name in expected or name not in without} == expected
    note = note_of(reading, key)
    assert note.outcome == outcome
    assert note.remark or note.targets or note.outcome == "used"
    assert note.origin.startswith("ds.json:")


def test_no_key_is_left_out_of_the_table() -> None:
    assert {row[0] for row in GOLDEN} == _KNOWN


@pytest.mark.parametrize("key", sorted(name for name in _KNOWN if name not in table.REMOVED))
def test_every_key_may_be_auto(key: str) -> None:
    """Hugging Face writes auto anywhere; it is never a value of ours."""
    beside = WARMUP if key.startswith("scheduler.params.w") else {}
    beside = COSINE if key.rpartition(".")[2] in table.SCHEDULER_PARAMS["warmupcosinelr"] else beside
    if key == "scheduler.type":
        beside = {}
    document = merged(beside, nested(key, "auto"))
    reading = read(document)
    assert "auto" not in settings(reading).values()
    assert note_of(reading, key).outcome in ("auto", "ignored", "used", "translated")


def test_comments_keep_the_lines_and_strings_stay_whole() -> None:
    text = '{ // one\n /* two\n three */ "steps_per_print": 7, # four\n "nebula": {"path": "http://x/#y"} }\n'
    plain = strip_comments(text)
    assert plain.count("\n") == text.count("\n")
    assert '"http://x/#y"' in plain
    reading = read_deepspeed(text, SOURCE)
    assert [(note.key, note.origin) for note in reading.notes] == [
        ("steps_per_print", "ds.json:3"),
        ("nebula", "ds.json:4"),
    ]


# DeepSpeed's public examples, written after their documentation: the tutorials on CIFAR-10, ZeRO, ZeRO-Offload and
# ZeRO-Infinity, and the integration guide of Hugging Face.
CIFAR = {
    "train_batch_size": 16,
    "steps_per_print": 2000,
    "optimizer": {
        "type": "Adam",
        "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000},
    },
    "gradient_clipping": 1.0,
    "prescale_gradients": False,
    "bf16": {"enabled": False},
    "fp16": {
        "enabled": True,
        "loss_scale": 0,
        "loss_scale_window": 500,
        "hysteresis": 2,
        "min_loss_scale": 1,
        "initial_scale_power": 15,
    },
    "wall_clock_breakdown": False,
    "zero_optimization": {
        "stage": 0,
        "allgather_partitions": True,
        "reduce_scatter": True,
        "allgather_bucket_size": 50000000,
        "reduce_bucket_size": 50000000,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "cpu_offload": False,
    },
}
ZERO_1 = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8},
    "fp16": {"enabled": True},
}
ZERO_2 = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 8,
    "zero_optimization": {
        "stage": 2,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "allgather_bucket_size": 5e8,
    },
    "bf16": {"enabled": True},
}
OFFLOAD = {
    "train_micro_batch_size_per_gpu": 10,
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu"},
        "contiguous_gradients": True,
        "overlap_comm": True,
    },
    "fp16": {"enabled": True},
}
ZERO_3 = {
    "train_batch_size": 64,
    "zero_optimization": {
        "stage": 3,
        "contiguous_gradients": True,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_prefetch_bucket_size": 1e7,
        "stage3_param_persistence_threshold": 1e5,
        "reduce_bucket_size": 1e7,
        "sub_group_size": 1e9,
    },
    "bf16": {"enabled": True},
}
ZERO_3_OFFLOAD = merged(
    ZERO_3,
    {
        "zero_optimization": {
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
        }
    },
)
INFINITY = merged(
    ZERO_3,
    {
        "zero_optimization": {
            "offload_optimizer": {
                "device": "nvme",
                "nvme_path": "/local_nvme",
                "pin_memory": True,
                "buffer_count": 4,
                "fast_init": False,
            },
            "offload_param": {
                "device": "nvme",
                "nvme_path": "/local_nvme",
                "pin_memory": True,
                "buffer_count": 5,
                "buffer_size": 1e8,
                "max_in_cpu": 1e9,
            },
        },
        "aio": {"block_size": 262144, "queue_depth": 32, "thread_count": 1, "single_submit": False},
    },
)
HUGGING_FACE = {
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto",
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "offload_param": {"device": "none", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}
EXAMPLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cifar": (
        CIFAR,
        {
            "global_batch": 16,
            "strategy": "ddp",
            "precision": "fp16",
            "schedule.kind": "constant",
            "schedule.warmup_steps": 1000,
            "optimizer.learning_rate": 0.001,
            "optimizer.beta2": 0.999,
            "loss_scale.initial_power": 15,
            "log_interval": 2000,
        },
    ),
    "zero1": (ZERO_1, {"strategy": "zero1", "offload": "none", "zero.reduce_bucket_elements": 500_000_000}),
    "zero2": (ZERO_2, {"strategy": "zero2", "micro_batch": 4, "accumulation_steps": 8, "global_batch": None}),
    "offload": (OFFLOAD, {"strategy": "zero2", "offload": "cpu", "precision": "fp16", "micro_batch": 10}),
    "zero3": (ZERO_3, {"strategy": "zero3", "offload": "none", "zero.prefetch_bucket_elements": 10_000_000}),
    "zero3_offload": (ZERO_3_OFFLOAD, {"offload": "cpu", "offload_parameters": "cpu", "zero.pin_memory": True}),
    "infinity": (INFINITY, {"offload": "nvme", "offload_parameters": "nvme", "nvme_path": Path("/local_nvme")}),
    "huggingface": (HUGGING_FACE, {"strategy": "zero3", "global_batch": 64, "optimizer.learning_rate": 6e-4}),
}


def load(document: dict[str, Any], folder: Path, *overrides: tuple[str, str]) -> ResolvedConfig:
    path = folder / "ds.json"
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")
    return load_config(None, "gpt2", [("deepspeed_config", str(path)), *overrides])


def value_of(resolved: ResolvedConfig, name: str) -> object:
    found: Any = resolved.config
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_public_examples(name: str, tmp_path: Path) -> None:
    document, expected = EXAMPLES[name]
    if name == "huggingface" and "linear" not in _kinds("schedule"):
        document = merged(document, {"scheduler": {"type": "WarmupCosineLR"}})
        for leaf in ("warmup_min_lr", "warmup_max_lr"):
            del document["scheduler"]["params"][leaf]
    resolved = load(document, tmp_path)
    assert {key: value_of(resolved, key) for key in expected} == expected
    flat = set(_leaves(document))
    told = {note.key for note in resolved.notes}
    assert all(any(key == name or key.startswith(f"{name}.") for name in told) for key in flat)


def _leaves(document: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in document.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]
    return found


def test_silence_means_deepspeed_s_defaults_and_yields_to_everything(tmp_path: Path) -> None:
    silent = load({"train_micro_batch_size_per_gpu": 8}, tmp_path)
    assert (silent.config.strategy, silent.config.precision) == ("ddp", "fp32")
    assert silent.origins["strategy"].startswith("DeepSpeed's default")
    assert possible_splits(silent.config, 1)[0].accumulation_steps == 8  # the preset's batch of 64 holds
    told = load({"train_micro_batch_size_per_gpu": 8}, tmp_path, ("strategy", "zero3"), ("precision", "bf16"))
    assert (told.config.strategy, told.config.precision) == ("zero3", "bf16")


def test_the_command_line_wins_and_the_table_says_so(tmp_path: Path) -> None:
    resolved = load({"gradient_clipping": 0.5, "optimizer": {"params": {"lr": 1e-3}}}, tmp_path, ("grad_clip", "2"))
    assert resolved.config.optimizer.grad_clip == 2
    notes = {note.key: note for note in resolved.notes}
    assert (notes["gradient_clipping"].outcome, notes["optimizer.params.lr"].outcome) == ("overridden", "used")
    assert "command line" in notes["gradient_clipping"].remark


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"train_batch_size": 8,\n "zero_optimisation": {"stage": 2}}', r"ds.json:2: 'zero_optimisation' .*nearest.*"),
        ('{"zero_optimization": {\n "stage": 2,\n "overlap_com": true}}', r"ds.json:3: .*overlap_comm"),
        ('{"train_batch_size": 8,', r"ds.json:1 cannot be read"),
        ("{}", "holds no keys"),
        ('{"zero_optimization": {"stage": 4}}', r"ds.json:1: zero_optimization.stage .*stages are 0 to 3"),
        ('{"fp16": {"enabled": true},\n"bf16": {"enabled": true}}', r"ds.json:2: bf16 and fp16 \(ds.json:1\)"),
        ('{"fp16": {"enabled": "yes"}}', "takes true or false"),
        (
            '{"train_batch_size": 30, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}',
            r"train_batch_size 30 is no multiple .* 4 x 2 = 8",
        ),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}', "stage 3"),
        ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', "stage 3"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}', "offload_optimizer.device"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "disk"}}}', "none, cpu or nvme"),
        ('{"optimizer": {"type": "Lamb"}}', "'Lamb' is not one of zerofit's"),
        ('{"optimizer": {"type": "OneBitLamb"}}', "DeepSpeed 0.19 has dropped it too"),
        ('{"optimizer": {"params": {"adam_w_mode": false, "weight_decay": 0.1}}}', "Adam with L2"),
        ('{"scheduler": {"type": "LRRangeTest"}}', "no counterpart"),
        ('{"scheduler": {"params": {"warmup_num_steps": 3}}}', "without a scheduler.type"),
        ('{"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 3}}}', "no parameter of WarmupLR"),
        ('{"fp16": true}', "fp16 must hold keys"),
        ('{"communication_data_type": "fp8"}', "fp32, fp16 or bf16"),
        ('{"steps_per_print": 1, "steps_per_print": 2}', "stands already at"),
    ],
)
def test_mistakes_are_refused_with_file_line_and_remedy(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        read_deepspeed(text, SOURCE)


def test_a_wrong_type_names_the_json_s_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ds.json:2: train_micro_batch_size_per_gpu was set to the text 'four'"):
        load({"train_micro_batch_size_per_gpu": "four"}, tmp_path)


@pytest.mark.skipif("lion" not in _kinds("optimizer"), reason="AdamW is the only optimizer")
def test_other_optimizers_and_linear_decay(tmp_path: Path) -> None:
    document = {
        "optimizer": {"type": "Lion", "params": {"lr": 1e-4, "betas": [0.9, 0.98], "weight_decay": 0.3}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 99, "warmup_num_steps": 9}},
    }
    config = load(document, tmp_path).config
    assert (config.optimizer.kind, config.optimizer.beta2) == ("lion", 0.98)
    assert (config.schedule.kind, config.schedule.decay_steps, config.schedule.warmup_steps) == ("linear", 99, 9)
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.8}}}
    assert settings(read(sgd))["optimizer.momentum"] == 0.8
