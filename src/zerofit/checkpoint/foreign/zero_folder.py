"""Folders that DeepSpeed's ``save_checkpoint`` wrote: ZeRO stage 0, 1, 2 and 3, any world size, fp32, bf16 and fp16.

::

    ROOT/latest                                                   text: name of the newest tag folder
    ROOT/TAG/mp_rank_00_model_states.pt                           stages 0-2: compute copy, param_shapes, client_state
    ROOT/TAG/zero_pp_rank_R_mp_rank_00_model_states.pt            stage 3, one a rank
    ROOT/TAG/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt     fp32 masters and moments of rank R, flat

Layout of the flat groups, as DeepSpeed 0.19.8 writes and its ``utils/zero_to_fp32.py`` reads them:

- stages 1 and 2: a group of parameters is one vector, cut into equal partitions, one a rank; the order is that of
  ``param_shapes``. The last rank's master is stored without the padding at the end, its moments with it.
- stage 3: each parameter for itself is cut into ``ceil(elements / ranks)`` a rank; a rank's slices lie one after the
  other over its sub-groups.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from .contents import MOMENTS, PARAMETER, ROLES, Contents
from .optimizer_states import add_moments_in_order, moments_of
from .sources import Joined, Part, Source, cut, join
from .torch_file import TorchFile

MODEL_STATES = "*_model_states.pt"
OPTIMIZER_STATES = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
#: Keys of the model states that are DeepSpeed's own; all others are the script's client_state.
OWN_KEYS = (
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "shared_params",
    "frozen_param_fragments",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "skipped_steps",
    "global_steps",
    "global_samples",
    "dp_world_size",
    "mp_world_size",
    "ds_config",
    "ds_version",
    "sparse_tensor_module_names",
    "checkpoint_parallel_dimensions",
    "universal_checkpoint_info",
    "autoep_layers",
    "ds_autoep_layers",
    "csr_tensor_module_names",
)


def find_tag_folder(path: Path) -> Path | None:
    """The tag folder that `path` is, names in ``latest``, or holds; None when there is nothing of DeepSpeed's.

    Raises:
        CheckpointError: ``latest`` names nothing there or something elsewhere, or several checkpoints lie below.
    """
    if any(path.glob(MODEL_STATES)):
        return path
    latest = path / "latest"
    if latest.is_file():
        return _pointed(path, latest)
    below = sorted({file.parent for pattern in ("*/", "*/*/") for file in path.glob(pattern + MODEL_STATES)})
    if len(below) > 1:
        pointed = [folder for folder in path.glob("*/") if (folder / "latest").is_file()]
        if len(pointed) == 1:
            return find_tag_folder(pointed[0])
        raise CheckpointError(
            f"{path} holds several DeepSpeed checkpoints and no file `latest` that chooses one: "
            f"{', '.join(str(folder.relative_to(path)) for folder in below)}. Name one of them."
        )
    return below[0] if below else None


def _pointed(root: Path, latest: Path) -> Path | None:
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    folder = root / tag
    if not tag or not folder.resolve().is_relative_to(root.resolve()):
        raise CheckpointError(f"{latest} names {tag!r}, which is not inside {root}; not loaded. Name the tag's folder.")
    if any(folder.glob(MODEL_STATES)):
        return folder
    if any(root.glob(f"*/{MODEL_STATES}")):
        there = ", ".join(sorted({file.parent.name for file in root.glob(f"*/{MODEL_STATES}")}))
        raise CheckpointError(f"{latest} names {tag!r}, and that folder holds no checkpoint. There are: {there}.")
    return None


def read_zero_folder(folder: Path) -> Contents:
    """Open a tag folder. Reads no tensor.

    Raises:
        CheckpointError: files are missing or do not add up, or the checkpoint is split in ways other than ZeRO's.
    """
    models = [TorchFile(path) for path in _model_files(folder)]
    optimizers = [TorchFile(path) for path in _optimizer_files(folder)]
    first = models[0].content
    if not isinstance(first, dict) or "module" not in first:
        raise CheckpointError(f"{models[0].path} is no model states file of DeepSpeed: it has no `module`.")
    contents = Contents("DeepSpeed checkpoint", folder)
    if optimizers:
        _add_zero(contents, models, optimizers)
    else:
        _add_unsharded(contents, models[0])
    _carry_state(contents, models[0], folder)
    return contents


def _model_files(folder: Path) -> list[Path]:
    """Model states in the order of the ranks; refuses what is cut along other dimensions."""
    files = sorted(folder.glob(MODEL_STATES), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    other = [path.name for path in files if "expert" in path.name or not re.search(r"mp_rank_00_", path.name)]
    other += [path.name for path in folder.glob("layer_*")]
    if other:
        raise CheckpointError(
            f"{folder} holds {other[0]}: the model is cut by tensor, pipeline or expert parallelism, and zerofit reads "
            f"data-parallel checkpoints (ZeRO 0 to 3). Convert it with DeepSpeed's ds_to_universal.py and export the "
            f"weights from there."
        )
    return files


def _optimizer_files(folder: Path) -> list[Path]:
    found = {int(m.group(1)): path for path in folder.iterdir() if (m := OPTIMIZER_STATES.fullmatch(path.name))}
    missing = [rank for rank in range(len(found)) if rank not in found]
    if missing:
        raise CheckpointError(
            f"{folder} lacks the optimizer states of rank {missing[0]} (it has ranks {sorted(found)}). The checkpoint "
            f"is incomplete: copy the files of every node into one folder."
        )
    return [found[rank] for rank in range(len(found))]


# ------------------------------------------------------------------------------------------------ ZeRO 1, 2 and 3


def _add_zero(contents: Contents, models: Sequence[TorchFile], optimizers: Sequence[TorchFile]) -> None:
    ranks = [_optimizer_state(file) for file in optimizers]
    # The optimizer class that keeps fp32 gradients for bf16 stores no stage; it is ZeRO-1.
    stage = int(ranks[0].get("zero_stage", 1))
    count = ranks[0].get("partition_count", len(ranks))
    expected = max(count) if isinstance(count, list) else count
    if expected != len(ranks):
        raise CheckpointError(
            f"{contents.folder} was written by {expected} ranks and holds the optimizer states of {len(ranks)}. The "
            f"checkpoint is incomplete: copy the files of every node into one folder."
        )
    contents.what = f"DeepSpeed ZeRO-{stage} checkpoint of {len(ranks)} rank{'s' if len(ranks) > 1 else ''}"
    groups = [{name: tuple(shape) for name, shape in group.items()} for group in models[0].content["param_shapes"]]
    if stage == 3:
        _add_stage_3(contents, groups, optimizers, ranks)
    else:
        _add_stage_1_2(contents, groups, optimizers, ranks)
    _add_frozen(contents, models, stage)


def _optimizer_state(file: TorchFile) -> Mapping[str, Any]:
    content = file.content
    if not isinstance(content, dict) or "optimizer_state_dict" not in content:
        raise CheckpointError(f"{file.path} is no optimizer states file of DeepSpeed: it has no optimizer_state_dict.")
    state: Mapping[str, Any] = content["optimizer_state_dict"]
    return state


def _add_stage_1_2(
    contents: Contents,
    groups: Sequence[Mapping[str, tuple[int, ...]]],
    files: Sequence[TorchFile],
    ranks: Sequence[Mapping[str, Any]],
) -> None:
    paddings = ranks[0].get("param_alignment_paddings") or [[0] * len(group) for group in groups]
    for index, shapes in enumerate(groups):
        masters = [rank["single_partition_of_fp32_groups"][index] for rank in ranks]
        flats = {PARAMETER: _flat(files, masters)}
        states = [moments_of(rank["base_optimizer_state"], index) for rank in ranks]
        for role in MOMENTS:
            if all(role in state for state in states):
                flats[role] = _flat(files, [state[role] for state in states])
        for role, flat in flats.items():
            _cut_group(contents, role, flat, shapes, paddings[index], slack=2 * len(ranks))
    _carry_optimizer_steps(contents, files[0], moments_of(ranks[0]["base_optimizer_state"], 0), ranks[0])
    _carry_loss_scale(contents, ranks[0].get("loss_scaler"))


def _flat(files: Sequence[TorchFile], partitions: Sequence[Tensor]) -> Joined:
    return join([file.source(partition) for file, partition in zip(files, partitions, strict=True)])


def _cut_group(
    contents: Contents,
    role: str,
    flat: Joined,
    shapes: Mapping[str, tuple[int, ...]],
    paddings: Sequence[int],
    slack: int,
) -> None:
    """Name the parts of a group's vector; what is left at its end must be padding."""
    offset = last = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        contents.tensors[role][name] = cut(flat, offset, shape)
        last = offset + math.prod(shape)
        offset = last + padding
    there = flat.shape[0]
    if there < last or there - offset > slack:
        raise CheckpointError(
            f"{contents.folder}: a group's parameters have {last} elements by param_shapes, and the ranks' {role} "
            f"vectors have {there}. Files of different checkpoints are mixed, or the states lie elsewhere (NVMe). "
            f"Let the program that wrote it save it again."
        )


def _add_stage_3(
    contents: Contents,
    groups: Sequence[Mapping[str, tuple[int, ...]]],
    files: Sequence[TorchFile],
    ranks: Sequence[Mapping[str, Any]],
) -> None:
    shapes = {name: shape for group in groups for name, shape in group.items()}
    sub_groups = len(ranks[0]["fp32_flat_groups"])
    flats = {PARAMETER: [join([f.source(t) for t in r["fp32_flat_groups"]]) for f, r in zip(files, ranks, strict=True)]}
    for role in MOMENTS:
        states = [[moments_of(rank["optimizer_state_dict"], i) for i in range(sub_groups)] for rank in ranks]
        if all(role in state for rank in states for state in rank):
            flats[role] = [
                join([file.source(state[role]) for state in rank]) for file, rank in zip(files, states, strict=True)
            ]
    for role, per_rank in flats.items():
        _cut_slices(contents, role, per_rank, shapes)
    _carry_optimizer_steps(contents, files[0], moments_of(ranks[0]["optimizer_state_dict"], 0), ranks[0])
    _carry_loss_scale(contents, ranks[0].get("loss_scaler"))


def _cut_slices(
    contents: Contents, role: str, per_rank: Sequence[Joined], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    offset = 0
    for name, shape in shapes.items():
        length = math.ceil(math.prod(shape) / len(per_rank))
        slices = [part for flat in per_rank for part in cut(flat, offset, (length,)).parts]
        contents.tensors[role][name] = Joined(shape, slices)
        offset += length
    if any(flat.shape[0] != offset for flat in per_rank):
        raise CheckpointError(
            f"{contents.folder}: the slices of a rank have {offset} elements by param_shapes, and its {role} vectors "
            f"have {per_rank[0].shape[0]}. Files of different checkpoints are mixed, or the states lie elsewhere "
            f"(NVMe). Let the program that wrote it save it again."
        )


def _add_frozen(contents: Contents, models: Sequence[TorchFile], stage: int) -> None:
    """Parameters that no optimizer owns: stored beside the model, ZeRO-3 as one slice a rank."""
    first = models[0].content
    shapes = {name: tuple(shape) for name, shape in (first.get("frozen_param_shapes") or {}).items()}
    if first.get("frozen_param_fragments") is None:
        # Stage 1 does not set them apart. The compute copy of stages 1 and 2 holds every parameter whole.
        shapes = {} if stage == 3 else _other_parameters(contents, first)
    for name, shape in shapes.items():
        if stage == 3:
            parts = [_whole(file.source(file.content["frozen_param_fragments"][name])) for file in models]
        else:
            parts = [_whole(models[0].source((first.get("frozen_param_fragments") or first["module"])[name]))]
        contents.tensors[PARAMETER][name] = Joined(shape, parts)
    if shapes:
        contents.note(
            f"{len(shapes)} frozen parameter{'s' if len(shapes) > 1 else ''} ({next(iter(shapes))}, ...) have no fp32 "
            f"master: taken in the precision of training, without moments."
        )


def _other_parameters(contents: Contents, first: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    known = {*contents.tensors[PARAMETER], *(first.get("shared_params") or {}), *(first.get("buffer_names") or [])}
    return {name: tuple(t.shape) for name, t in first["module"].items() if name not in known and t.is_floating_point()}


def _whole(source: Source) -> Part:
    return Part(source, 0, math.prod(source.shape))


# ------------------------------------------------------------------------------------------------ stage 0


def _add_unsharded(contents: Contents, file: TorchFile) -> None:
    """Stage 0: everything in one file; the optimizer's states have numbers instead of names."""
    content = file.content
    contents.what = "DeepSpeed checkpoint without sharding (stage 0)"
    buffers = set(content.get("buffer_names") or [])
    parameters = {
        name: tensor
        for name, tensor in content["module"].items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and name not in buffers
    }
    if any(tensor.numel() == 0 for tensor in parameters.values()):
        raise CheckpointError(
            f"{contents.folder} holds placeholders instead of parameters, and no *_optim_states.pt: the ZeRO-3 files "
            f"of the ranks are missing. Copy the files of every node into one folder."
        )
    contents.tensors[PARAMETER] = {name: file.source(tensor) for name, tensor in parameters.items()}
    optimizer = content.get("optimizer")
    if isinstance(optimizer, dict):
        add_moments_in_order(contents, file, parameters, optimizer)


# ------------------------------------------------------------------------------------------------ state


def _carry_optimizer_steps(
    contents: Contents, file: TorchFile, state: Mapping[str, Any], rank: Mapping[str, Any]
) -> None:
    steps = file.number(state.get("step", rank.get("base_optimizer_state_step")))
    if steps is not None and contents.tensors["exp_avg"]:
        contents.scalars["optimizer_steps"] = steps


def _carry_loss_scale(contents: Contents, scaler: Any) -> None:
    """The state of a dynamic loss scaler; a constant one of 1 is that of fp32 and bf16."""
    values = getattr(scaler, "attributes", {})
    keys = {
        "loss_scale": "cur_scale",
        "loss_scale_iteration": "cur_iter",
        "loss_scale_last_overflow": "last_overflow_iter",
        "loss_scale_hysteresis": "cur_hysteresis",
    }
    found = {
        ours: float(values[theirs]) for ours, theirs in keys.items() if isinstance(values.get(theirs), int | float)
    }
    if len(found) == len(keys):
        contents.scalars |= found


def _carry_state(contents: Contents, file: TorchFile, folder: Path) -> None:
    """Progress from the client state, from DeepSpeed's own counters and from ``extra_info.json``."""
    content = file.content
    client = {str(key): file.plain(value) for key, value in content.items() if key not in OWN_KEYS}
    extra = _extra_info(contents, folder)
    counters = {"global_steps": content.get("global_steps")}
    contents.carry_progress(counters, client, extra)
    if client or extra:
        contents.state["client_state"] = {**extra, **client}
    contents.describe_model(client)
    if not contents.scalars.get("optimizer_steps") and contents.tensors["exp_avg"] and contents.step is not None:
        contents.scalars["optimizer_steps"] = float(contents.step - int(content.get("skipped_steps") or 0))
    _note_roles(contents, content.get("ds_config"))


def _note_roles(contents: Contents, config: Any) -> None:
    missing = [role for role in ROLES if not contents.tensors[role]]
    if missing:
        contents.note(f"{' and '.join(missing)} were not stored: the optimizer starts afresh.")
    else:
        contents.note("It holds the optimizer's moments.")
    half = [k for k in ("bf16", "fp16") if isinstance(config, dict) and (config.get(k) or {}).get("enabled")]
    if half:
        contents.note(f"It was trained in {half[0]}.")


def _extra_info(contents: Contents, folder: Path) -> dict[str, Any]:
    """``extra_info.json`` in the tag folder or up to two folders above, where some scripts keep their progress."""
    for place in (folder, folder.parent, folder.parent.parent):
        path = place / "extra_info.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError):
                contents.note(f"{path} is no JSON and was left out.")
                return {}
            return found if isinstance(found, dict) else {}
    return {}
