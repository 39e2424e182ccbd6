"""The files of each export format, written into a folder of their own. Nothing here replaces or verifies anything."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.models import ModelConfig
from ..data.metadata import read_meta
from ..errors import DataError, RequestError
from .export_safetensors import SINGLE, write_bytes, write_json, write_safetensors, write_shards
from .export_torch import TorchWriter
from .foreign.contents import MOMENTS, PARAMETER
from .foreign.mamba_names import MambaNames
from .foreign.names import ARCHITECTURES, Architecture
from .foreign.sources import Rows, Source, Transposed
from .outgoing import Constant, Held, Outgoing, Readable

#: The version of DeepSpeed whose layout `write_deepspeed` follows; its loader asks for one.
DEEPSPEED_LAYOUT = "0.19.8"
#: File in a Hugging Face folder -> sha1 name in tiktoken's cache, and sha256 of its content (tiktoken_ext).
GPT2_TOKENIZER_FILES = {
    "vocab.json": (
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
    "merges.txt": (
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
}


@dataclass(frozen=True)
class Job:
    """What is to be written.

    Attributes:
        source: where weights and moments come from.
        model: its shape.
        dtype: of the weights in the files (DeepSpeed's masters and moments are fp32 all the same).
        shard_bytes: largest safetensors file.
    """

    source: Readable
    model: ModelConfig
    dtype: torch.dtype
    shard_bytes: int

    @property
    def architecture(self) -> Architecture:
        """Names of this model's parameters elsewhere."""
        return ARCHITECTURES[self.model.kind]

    @property
    def has_moments(self) -> bool:
        """True when the source holds AdamW's moments of at least one parameter. Lion's mean under the same name, or
        Muon's few, would be taken for AdamW's, with zeros for the squares to divide by."""
        made_by = (self.source.state.get("config") or {}).get("optimizer", {}).get("kind", "adamw")
        return made_by == "adamw" and any(
            self.source.read(name, MOMENTS[0], 0, 1) is not None for name in self.model.parameter_shapes()
        )

    def weights(self) -> list[Outgoing]:
        """Every parameter under its canonical name."""
        return [Outgoing(name, self.held(name, PARAMETER), self.dtype) for name in self.model.parameter_shapes()]

    def held(self, name: str, role: str) -> Held:
        """One tensor of the source."""
        return Held(self.source, name, role, self.model.parameter_shapes()[name], absent_is_zero=role != PARAMETER)

    def metadata(self) -> dict[str, str]:
        """For safetensors headers; transformers asks for ``format``."""
        return {"format": "pt", "zerofit_model": json.dumps(self.model.model_dump(mode="json"))}


def write_pt(job: Job, path: Path) -> list[str]:
    """One state dict that zerofit's module loads with ``load_state_dict``; tied tensors share their bytes."""
    writer = TorchWriter()
    content = {tensor.name: writer.place(tensor) for tensor in job.weights()}
    writer.write(path, content | {alias: content[name] for alias, name in job.architecture.own_tied.items()})
    return []


def write_safetensors_folder(job: Job, folder: Path) -> list[str]:
    """``model.safetensors``, or shards and their index. Tied tensors stand once, under their canonical name."""
    write_shards(folder, job.weights(), job.shard_bytes, job.metadata())
    return []


def write_safetensors_file(job: Job, path: Path) -> list[str]:
    """One file, whatever its size."""
    write_safetensors(path, job.weights(), job.metadata())
    return []


# ------------------------------------------------------------------------------------------------ Hugging Face


def write_huggingface(job: Job, folder: Path) -> list[str]:
    """A folder that ``transformers`` loads: no padded rows, its layout of matrices, every bias."""
    architecture, model = job.architecture, job.model
    config = architecture.huggingface_config(model) | {"torch_dtype": str(job.dtype).removeprefix("torch.")}
    write_json(folder / "config.json", config)
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})
    shapes = architecture.huggingface_shapes(model)
    write_shards(folder, [_huggingface_tensor(job, *item) for item in shapes.items()], job.shard_bytes, job.metadata())
    notes = [note for note in (_note_rows(job, shapes), _note_biases(job, shapes)) if note]
    return [*notes, _write_tokenizer(job, folder)]


def _huggingface_tensor(job: Job, name: str, shape: tuple[int, ...]) -> Outgoing:
    there = job.model.parameter_shapes()
    source: Source = job.held(name, PARAMETER) if name in there else Constant(shape)
    if source.shape != shape:
        source = Rows(source, shape[0])
    if job.architecture.huggingface_transposed(name):
        source = Transposed(source)
    return Outgoing(job.architecture.huggingface_name(name), source, job.dtype)


def _note_rows(job: Job, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    table = job.architecture.vocabulary_table
    extra = job.model.parameter_shapes()[table][0] - shapes[table][0] if table else 0
    return f"{extra} padding rows of {table} were left out." if extra else None


def _note_biases(job: Job, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    added = shapes.keys() - job.model.parameter_shapes().keys()
    if not added:
        return None
    return f"{len(added)} biases were written as zeros, which is the same function: Hugging Face's model has no switch."


def _write_tokenizer(job: Job, folder: Path) -> str:
    """The tokenizer of the run's data: its own file, or GPT-2's out of tiktoken's cache. Returns a note."""
    data = job.source.state.get("data_path")
    if data is None:
        return "No tokenizer was written: the source does not tell its data."
    try:
        meta = read_meta(Path(str(data)))
    except (DataError, OSError):
        meta = {}
    kind = meta.get("tokenizer")
    own = Path(str(data)) / str(meta.get("tokenizer_file") or "none")
    if own.is_file():
        write_bytes(folder / own.name, own.read_bytes())
        ending = {"eos_token": meta["end_of_text"]} if meta.get("end_of_text") else {}
        kept = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": job.model.items_per_sample}
        write_json(folder / "tokenizer_config.json", kept | ending)
        return f"The tokenizer of {data} was written."
    if kind != "gpt2":
        return (
            f"No tokenizer was written: {data} was made with {kind or 'an unknown one'}, and only gpt2's and those of "
            f"the tokenizers library can be."
        )
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    found = {name: _cached(Path(cache or f"{tempfile.gettempdir()}/data-gym-cache"), *GPT2_TOKENIZER_FILES[name])
             for name in GPT2_TOKENIZER_FILES}  # fmt: skip
    if None in found.values():
        return "No tokenizer was written: tiktoken's cache does not hold gpt2's files; use transformers' own `gpt2`."
    for name, content in found.items():
        write_bytes(folder / name, content or b"")
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": job.model.items_per_sample,
        "add_prefix_space": False,
    }
    end = "<|endoftext|>"
    write_json(folder / "tokenizer_config.json", settings | dict.fromkeys(("bos_token", "eos_token", "unk_token"), end))
    return "GPT-2's tokenizer was written."


def _cached(folder: Path, name: str, sha256: str) -> bytes | None:
    path = folder / name
    content = path.read_bytes() if path.is_file() else b""
    return content if hashlib.sha256(content).hexdigest() == sha256 else None


# ------------------------------------------------------------------------------------------------ state-spaces


def write_state_spaces(job: Job, folder: Path) -> list[str]:
    """A folder that mamba_ssm's ``MambaLMHeadModel.from_pretrained`` loads: config.json and pytorch_model.bin.

    Raises:
        RequestError: the model is no Mamba.
    """
    architecture = job.architecture
    if not isinstance(architecture, MambaNames):
        raise RequestError(
            f"The format state-spaces is that of mamba_ssm, and the model is of kind {job.model.kind}. Use --to "
            f"huggingface, safetensors or pt."
        )
    write_json(folder / "config.json", architecture.state_spaces_config(job.model))
    writer = TorchWriter()
    content = {f"backbone.{tensor.name}": writer.place(tensor) for tensor in job.weights()}
    table = f"backbone.{architecture.vocabulary_table}"
    writer.write(folder / "pytorch_model.bin", content | {"lm_head.weight": content[table]})
    return []


# ------------------------------------------------------------------------------------------------ DeepSpeed


def write_deepspeed(job: Job, folder: Path) -> list[str]:
    """What DeepSpeed's ZeRO-2 engine of one rank writes: all parameters in one group, in the model's order.

    ``client_state`` holds ``model`` (the shape), ``iter_num``, ``best_val_loss`` and ``best_step``.
    """
    tag = f"global_step{job.source.step or 0}"
    (folder / tag).mkdir()
    _write_model_states(job, folder / tag / "mp_rank_00_model_states.pt")
    _write_optimizer_states(job, folder / tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    write_bytes(folder / "latest", tag.encode())
    return [] if job.has_moments else ["The source holds no moments of AdamW: DeepSpeed's optimizer will start afresh."]


def _ds_config(job: Job) -> dict[str, Any]:
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(job.dtype)
    return {"zero_optimization": {"stage": 2}, **({half: {"enabled": True}} if half else {})}


def _write_model_states(job: Job, path: Path) -> None:
    writer = TorchWriter()
    module = OrderedDict((tensor.name, writer.place(tensor)) for tensor in job.weights())
    tied = dict(job.architecture.own_tied)
    module.update({alias: module[name] for alias, name in tied.items()})
    shapes = OrderedDict((name, torch.Size(shape)) for name, shape in job.model.parameter_shapes().items())
    state = job.source.state
    none: dict[str, Any] = dict.fromkeys(
        ("optimizer", "frozen_param_shapes", "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd")
    )
    step = job.source.step or 0
    own = {
        **none,
        "module": module,
        "buffer_names": [],
        "param_shapes": [shapes],
        "shared_params": tied,
        "skipped_steps": step - int(job.source.scalars.get("optimizer_steps", step)),
        "global_steps": step,
        "global_samples": step * int(state.get("global_batch") or 1),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": _ds_config(job),
        "ds_version": DEEPSPEED_LAYOUT,
    }
    client = {"model": job.model.model_dump(mode="json"), "iter_num": step}
    best = {"best_val_loss": state.get("best_loss"), "best_step": state.get("best_step")}
    writer.write(path, own | client | {key: value for key, value in best.items() if value is not None})


def _write_optimizer_states(job: Job, path: Path) -> None:
    writer = TorchWriter()
    names = list(job.model.parameter_shapes())
    padding = job.model.parameter_count() % 2  # DeepSpeed aligns a group to twice the ranks

    def vector(role: str, padded: bool) -> torch.Tensor:
        parts = [Outgoing(name, job.held(name, role), torch.float32) for name in names]
        if padded and padding:
            parts.append(Outgoing("padding", Constant((padding,)), torch.float32))
        return writer.place_joined(parts)

    group: dict[str, Any] = {"params": [0], "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    states: dict[int, Any] = {}
    if job.has_moments:
        steps = Constant((), float(job.source.scalars.get("optimizer_steps", job.source.step or 0)))
        states[0] = {"step": writer.place(Outgoing("step", steps, torch.float32))}
        states[0] |= {role: vector(role, padded=True) for role in MOMENTS}
    optimizer = {
        "dynamic_loss_scale": False,
        "overflow": False,
        "clip_grad": 0.0,
        "base_optimizer_state": {"state": states, "param_groups": [group]},
        # Masters without the padding, moments with it: as DeepSpeed stores them.
        "single_partition_of_fp32_groups": [vector(PARAMETER, padded=False)],
        "zero_stage": 2,
        "group_paddings": [padding],
        "param_alignment_paddings": [[0] * len(names)],
        "partition_count": [1],
        "ds_version": DEEPSPEED_LAYOUT,
        "param_slice_mappings": [{}],
    }
    content = {"optimizer_state_dict": optimizer, "ds_config": _ds_config(job), "ds_version": DEEPSPEED_LAYOUT}
    writer.write(path, content)


# ------------------------------------------------------------------------------------------------ which


@dataclass(frozen=True)
class Format:
    """One way to write a checkpoint.

    Attributes:
        write: writes into the path that it is given and returns notes.
        is_file: the path is a file; else a folder, made beforehand.
        leaves: patterns of what it leaves in its folder; --force replaces a folder of nothing else.
    """

    write: Callable[[Job, Path], list[str]]
    is_file: bool
    leaves: Sequence[str] = ()


SHARDS = (SINGLE, "model-*.safetensors", "model.safetensors.index.json")
FORMATS = {
    "pt": Format(write_pt, is_file=True),
    "safetensors": Format(write_safetensors_folder, is_file=False, leaves=SHARDS),
    "safetensors file": Format(write_safetensors_file, is_file=True),
    "huggingface": Format(
        write_huggingface,
        is_file=False,
        leaves=(*SHARDS, "config.json", "generation_config.json", "tokenizer*.json", *GPT2_TOKENIZER_FILES),
    ),
    "state-spaces": Format(write_state_spaces, is_file=False, leaves=("config.json", "pytorch_model.bin")),
    "deepspeed": Format(write_deepspeed, is_file=False, leaves=("latest", "global_step*")),
}
