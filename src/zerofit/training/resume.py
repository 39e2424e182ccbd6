"""What may change when a run goes on, and what must not. Reads manifests, never tensors."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..checkpoint.manifest import Manifest, check_same_model
from ..config.keys import keys
from ..config.schema import Config
from ..errors import CheckpointError
from ..planning.plan import Plan

#: Keys that a resumed run may set anew: duration, learning rate, intervals, batch split, strategy, hardware, names.
#: The whole batch and the data are compared as what they come to, not as they were written.
MAY_CHANGE = (
    "name", "runs_dir", "init_from", "data.path", "data.prepare", "data.val_fraction", "data.num_workers",
    "data.prefetch_factor", "data.pin_memory", "data.max_bad_fraction", "model.weights_from", "model.pretrained",
    "data.sources.*.path", "data.sources.*.prepare", "data.split", "data.text_key", "data.subset", "data.errors",
    "max_steps", "duration", "optimizer.learning_rate", "optimizer.cpu_kernel", "optimizer.state", "optimizer.master",
    "schedule.*", "early_stopping.*", "ema_decay",
    "eval_*", "log_*", "save_*", "keep_*", "sample_*",
    "global_batch", "micro_batch", "accumulation_steps",
    "strategy", "offload", "offload_parameters", "nvme_path", "zero.*", "fsdp.*", "loss_scale.*",
    "num_gpus", "device", "precision", "gradient_dtype", "activation_checkpointing", "activation_offload",
    "compile", "compile_mode", "cuda_graphs", "deterministic", "collective_timeout_seconds",
)  # fmt: skip


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value of this key than the run that it continues."""
    return any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def check_resumable(folder: Path, manifest: Manifest, config: Config, plan: Plan, data: dict[str, Any]) -> None:
    """Refuse to go on with something else than what was trained.

    Args:
        data: fingerprint of the data that would be trained on.

    Raises:
        CheckpointError: names what differs, with both values.
    """
    shapes = {name: shape for (role, name), (shape, _) in manifest.tensors.items() if role == "parameter"}
    check_same_model(folder, shapes, plan.model)
    state = manifest.state
    _refuse_another(folder, "global_batch", state["global_batch"], plan.global_batch)
    before, now = _flat(state["config"]), _flat(config.model_dump(mode="json"))
    for key in sorted(before.keys() | now.keys(), key=lambda key: (not key.endswith(".kind"), key)):
        if key.startswith("model.architecture."):
            continue  # follows from the model's name; its parameters were compared
        if key not in before and key in keys() and now[key] == keys()[key].plain_default:
            continue  # an older version had no such setting
        if not may_change(key) and before.get(key) != now.get(key):
            _refuse_another(folder, key, before.get(key), now.get(key))
    for split, found in data.items():
        items = "samples" if "samples" in found else "tokens"
        trained = state["data"].get(split, {items: 0})
        if trained != found:
            others = " others" if trained.get(items) == found[items] else ""
            raise CheckpointError(
                f"Checkpoint {folder} was trained on other data: its {split} split had {trained.get(items)} {items}, "
                f"and the one in {config.data.path} has {found[items]}{others}. A resumed run goes on where it was in "
                f"the same data; set data.path to it, or start a new run with --load-checkpoint {folder} "
                f"--weights-only."
            )


def _refuse_another(folder: Path, key: str, before: object, now: object) -> None:
    if before != now:
        raise CheckpointError(
            f"Checkpoint {folder} was trained with {key} {before}, and {key} {now} was asked for. A resumed run may "
            f"change its duration, learning rate, schedule, intervals, batch split, strategy and hardware, not what it "
            f"computes. Resume with {key} {before}, or start a new run with --load-checkpoint {folder} --weights-only."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
