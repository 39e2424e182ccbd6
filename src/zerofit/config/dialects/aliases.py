"""Names that people bring from DeepSpeed scripts, nanoGPT and Hugging Face: one table, for flags and keys of files.

docs/aliases.md is written from it (``python scripts/write_aliases.py``), and so is a part of ``zerofit train --help``.
A name that zerofit itself has (``learning_rate``, ``block_size``, ``weight_decay``) needs no line here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import PurePath
from typing import Literal

from ...errors import ConfigError
from ..documents import Entry, describe_value
from ..keys import keys
from .notes import Note, Reading, noted, translated

Dialect = Literal["DeepSpeed script", "nanoGPT", "Hugging Face"]
SCRIPT: Dialect = "DeepSpeed script"
NANOGPT: Dialect = "nanoGPT"
HUGGING_FACE: Dialect = "Hugging Face"

#: Settings that depend on others, and are worked out when all layers are merged (`derived`).
ALL_RANKS_ACCUMULATION = "@accumulation_over_all_ranks"
EVAL_ITERS = "@eval_iters"
SEQUENCE_LENGTH = "@sequence_length"
TRAIN_DIR, VAL_DIR = "@train_dir", "@val_dir"
DEEPSPEED_FILE = "@deepspeed_file"
#: And what becomes of them, for the table.
DERIVED = {
    ALL_RANKS_ACCUMULATION: ("global_batch",),
    EVAL_ITERS: ("eval_batches",),
    DEEPSPEED_FILE: (),
    SEQUENCE_LENGTH: (),
    TRAIN_DIR: ("data.path",),
    VAL_DIR: ("data.prepare",),
}

Targets = Iterable[tuple[str, object]]


@dataclass(frozen=True)
class Alias:
    """One familiar name.

    Attributes:
        name: as it is typed, with underscores.
        dialects: where it comes from.
        becomes: what it means here, for the table: a key, a flag, or a sentence that says why there is nothing.
        read: its value as settings; None where nothing depends on it.
        remark: what to know about the translation.
        switch: on the command line it may stand without a value, which means true.
        off: values that ask for nothing, so that nothing need be said.
    """

    name: str
    dialects: tuple[Dialect, ...]
    becomes: str
    read: Callable[[Entry], Targets] | None = None
    remark: str = ""
    switch: bool = False
    off: tuple[object, ...] = ()


def _as(target: str) -> Callable[[Entry], Targets]:
    return lambda entry: [(target, entry.value)]


def _choice(target: str, table: Mapping[str, object]) -> Callable[[Entry], Targets]:
    """One of several words."""

    def read(entry: Entry) -> Targets:
        word = str(entry.value).lower()
        if word not in table:
            raise _wrong(entry, f"one of {', '.join(table)}")
        return [(target, table[word])]

    return read


def _truth(target: str, yes: object, no: object | None) -> Callable[[Entry], Targets]:
    """True or false; `no` None: false says nothing."""

    def read(entry: Entry) -> Targets:
        value = _boolean(entry)
        return [(target, yes)] if value else [] if no is None else [(target, no)]

    return read


def _boolean(entry: Entry) -> bool:
    text = str(entry.value).lower()
    if text not in ("true", "false", "yes", "no", "1", "0", "on", "off"):
        raise _wrong(entry, "true or false")
    return text in ("true", "yes", "1", "on")


def _wrong(entry: Entry, rule: str) -> ConfigError:
    return ConfigError(f"{entry.origin}: {entry.name} was set to {describe_value(entry.value)}, and it takes {rule}.")


def _run_folder(entry: Entry) -> Targets:
    path = PurePath(str(entry.value))
    return [("runs_dir", str(path.parent)), ("name", path.name)]


def _dataset(entry: Entry) -> Targets:
    return [("data.path", f"data/{entry.value}")]


def _epochs(entry: Entry) -> Targets:
    if isinstance(entry.value, bool) or not isinstance(entry.value, int | float) or entry.value <= 0:
        raise _wrong(entry, "a number of epochs above 0")
    return [("duration", f"{entry.value:g}ep")]


def _always_save(entry: Entry) -> Targets:
    return [("save_interval", "evaluation" if _boolean(entry) else "never"), ("save_on_improvement", True)]


def _offload(entry: Entry) -> Targets:
    word = str(entry.value).lower()
    return [("offload", {"true": "cpu", "false": "none"}.get(word, word))]


def _zero_stage(entry: Entry) -> Targets:
    return _choice("strategy", {"0": "ddp", "1": "zero1", "2": "zero2", "3": "zero3"})(entry)


def _warmup(entry: Entry) -> Targets:
    """A share of all steps below 1 (Hugging Face's ``warmup_ratio``)."""
    if isinstance(entry.value, bool) or not isinstance(entry.value, int | float) or not 0 <= entry.value <= 1:
        raise _wrong(entry, "a share from 0 to 1")
    return [("schedule.warmup_fraction", float(entry.value))] if entry.value else [("schedule.warmup_steps", 0)]


def _device(entry: Entry) -> Targets:
    word = str(entry.value).partition(":")[0]
    if word not in ("cuda", "cpu", "auto"):
        raise _wrong(entry, "cuda or cpu")
    return [("device", word)]


def _interval(target: str) -> Callable[[Entry], Targets]:
    """Steps; Hugging Face's words leave the interval to another key."""

    def read(entry: Entry) -> Targets:
        return [(target, "never")] if str(entry.value) in ("no", "False", "false") else []

    return read


def _save_strategy(entry: Entry) -> Targets:
    table = {"no": "never", "epoch": "epoch", "best": "evaluation", "steps": None}
    word = "no" if entry.value is False else str(entry.value)
    if word not in table:
        raise _wrong(entry, f"one of {', '.join(table)}")
    return [("save_interval", table[word])] if table[word] else []


def _scheduler(entry: Entry) -> Targets:
    table = {
        "linear": "linear",
        "cosine": "cosine",
        "constant": "constant",
        "constant_with_warmup": "constant",
        "cosine_with_min_lr": "cosine",
        "polynomial": "polynomial",
        "warmup_stable_decay": "wsd",
    }
    settings = list(_choice("schedule.kind", table)(entry))
    return [*settings, ("schedule.warmup_steps", 0)] if entry.value == "constant" else settings


def _optim(entry: Entry) -> Targets:
    word = re.sub(r"_(torch|fused|hf|anyprecision|apex).*", "", str(entry.value).lower())
    return _choice("optimizer.kind", {name: name for name in ("adamw", "adafactor", "sgd", "lion", "muon")})(
        Entry(entry.name, word, entry.origin)
    )


def _checkpointing(entry: Entry) -> Targets:
    return [("activation_checkpointing", "full" if _boolean(entry) else "none")]


def _length(entry: Entry) -> Targets:
    return [(SEQUENCE_LENGTH, entry.value)]


def _deepspeed_file(entry: Entry) -> Targets:
    """A path; true or false only say whether DeepSpeed may be used, which the plan decides."""
    if not isinstance(entry.value, str | bool | None):
        raise _wrong(entry, "the path of a DeepSpeed JSON; write a block of its keys to a file of its own")
    return [] if str(entry.value).lower() in ("true", "false", "none") else [(DEEPSPEED_FILE, str(entry.value))]


_S, _N, _H = SCRIPT, NANOGPT, HUGGING_FACE
_WANDB = "nothing: there is no Weights & Biases sink; events.jsonl in the run folder has every figure"
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "fp32": "fp32", "bf16": "bf16", "fp16": "fp16",
               "auto": "auto"}  # fmt: skip
_MIXED = {**_PRECISIONS, "no": "fp32", "none": "fp32", "false": "fp32", "true": "auto"}

_TABLE = (
    # Data and length
    Alias("train_dir", (_S,), "data.path; where it holds pictures in folders of classes, data.kind images and the "
          "first of data.prepare", _as(TRAIN_DIR)),
    Alias("val_dir", (_S,), "for pictures the second of data.prepare; for text nothing: validation tokens lie in "
          "data.path, beside those for training", _as(VAL_DIR)),
    Alias("data_dir", (_S,), "data.path", _as("data.path")),
    Alias("dataset", (_N,), "data.path, as data/NAME", _dataset),
    Alias("epochs", (_S,), "duration, as 3ep", _epochs, "passes over the training data"),
    Alias("num_epochs", (_S,), "duration, as 3ep", _epochs, "passes over the training data"),
    Alias("num_train_epochs", (_H,), "duration, as 3ep", _epochs, "passes over the training data"),
    Alias("max_iters", (_N,), "max_steps", _as("max_steps")),
    Alias("max_train_steps", (_S, _H), "max_steps", _as("max_steps")),
    Alias("seq_length", (_S,), "model.block_size, or model.max_seq_length of Mamba", _length),
    Alias("eval_iters", (_N,), "eval_batches", _as(EVAL_ITERS), "as many samples, counted in global batches"),
    Alias("eval_steps", (_H,), "eval_interval", _as("eval_interval")),
    # Batch
    Alias("batch_size", (_S, _N), "micro_batch", _as("micro_batch"), "samples of one forward pass on one GPU"),
    Alias("train_batch_size_per_gpu", (_S,), "micro_batch", _as("micro_batch")),
    Alias("per_device_train_batch_size", (_H,), "micro_batch", _as("micro_batch")),
    Alias("per_gpu_train_batch_size", (_H,), "micro_batch", _as("micro_batch")),
    Alias("per_device_eval_batch_size", (_H,), "nothing: evaluation takes the micro-batch of training"),
    Alias(
        "gradient_accumulation_steps",
        (_S, _N, _H),
        "accumulation_steps (each rank's; nanoGPT's counts over all ranks)",
    ),
    # Optimizer and schedule
    Alias("lr", (_S,), "optimizer.learning_rate", _as("optimizer.learning_rate")),
    Alias("gradient_clipping", (_S,), "optimizer.grad_clip", _as("optimizer.grad_clip")),
    Alias("max_grad_norm", (_H, _S), "optimizer.grad_clip", _as("optimizer.grad_clip")),
    Alias("adam_beta1", (_H,), "optimizer.beta1", _as("optimizer.beta1")),
    Alias("adam_beta2", (_H,), "optimizer.beta2", _as("optimizer.beta2")),
    Alias("adam_epsilon", (_H,), "optimizer.eps", _as("optimizer.eps")),
    Alias("optim", (_H,), "optimizer.kind", _optim),
    Alias("warmup_iters", (_N,), "schedule.warmup_steps", _as("schedule.warmup_steps")),
    Alias("num_warmup_steps", (_S, _H), "schedule.warmup_steps", _as("schedule.warmup_steps")),
    Alias("warmup_ratio", (_H,), "schedule.warmup_fraction", _warmup),
    Alias("lr_decay_iters", (_N,), "schedule.decay_steps", _as("schedule.decay_steps")),
    Alias("min_lr", (_N,), "schedule.min_learning_rate", _as("schedule.min_learning_rate")),
    Alias("decay_lr", (_N,), "schedule.kind (false: constant)", _truth("schedule.kind", "cosine", "constant"),
          switch=True),
    Alias("lr_scheduler_type", (_H,), "schedule.kind", _scheduler),
    # Hardware and strategy
    Alias("nproc_per_node", (_S,), "num_gpus", _as("num_gpus")),
    Alias("world_size", (_S,), "num_gpus", _as("num_gpus")),
    Alias("zero_stage", (_S,), "strategy", _zero_stage),
    Alias("offload_optimizer", (_S,), "offload (alone: cpu)", _offload, switch=True),
    Alias("cpu_offload", (_S,), "offload (alone: cpu)", _offload, switch=True),
    Alias("offload_param", (_S,), "offload_parameters (alone: cpu)",
          lambda entry: [("offload_parameters", value) for _, value in _offload(entry)], switch=True),
    Alias("dtype", (_N,), "precision", _choice("precision", _PRECISIONS)),
    Alias("mixed_precision", (_S, _H), "precision", _choice("precision", _MIXED)),
    Alias("fp16", (_S, _H), "precision", _truth("precision", "fp16", None), switch=True),
    Alias("bf16", (_S, _H), "precision", _truth("precision", "bf16", None), switch=True),
    Alias("gradient_checkpointing", (_H, _S), "activation_checkpointing (full or none)", _checkpointing, switch=True),
    Alias("torch_compile", (_H,), "compile", _truth("compile", True, False), switch=True),
    Alias("ddp_timeout", (_H,), "collective_timeout_seconds", _as("collective_timeout_seconds")),
    Alias("deepspeed_config", (_S,), "--deepspeed-config FILE", _deepspeed_file),
    Alias("deepspeed", (_H, _S), "--deepspeed-config FILE (alone: nothing, the plan chooses)", _deepspeed_file,
          switch=True),
    # Run folder and checkpoints
    Alias("out_dir", (_N,), "runs_dir and name", _run_folder),
    Alias("output_dir", (_H, _S), "runs_dir and name", _run_folder),
    Alias("run_name", (_H,), "name", _as("name")),
    Alias("logging_steps", (_H,), "log_interval", _as("log_interval")),
    Alias("save_steps", (_H,), "save_interval", _as("save_interval")),
    Alias("save_strategy", (_H,), "save_interval (no, epoch)", _save_strategy),
    Alias("eval_strategy", (_H,), "eval_interval (no)", _interval("eval_interval")),
    Alias("evaluation_strategy", (_H,), "eval_interval (no)", _interval("eval_interval")),
    Alias("save_total_limit", (_H,), "keep_checkpoints", _as("keep_checkpoints")),
    Alias("always_save_checkpoint", (_N,), "save_interval (false: only when the validation loss improves)",
          _always_save, switch=True),
    Alias("model_name_or_path", (_H,), "init_from", _as("init_from")),
    # What zerofit does by itself, or has not
    Alias("dataloader_num_workers", (_H,), "nothing: tokens are read from memory-mapped files without workers; of "
          "pictures it is data.num_workers", off=(0,)),
    Alias("dataloader_pin_memory", (_H,), "nothing: batches are page-locked whenever training is on a GPU"),
    Alias("port", (_S,), "nothing: the launcher finds a free port itself"),
    Alias("master_port", (_S,), "nothing: the launcher finds a free port itself"),
    Alias("backend", (_N,), "nothing: NCCL on GPUs, gloo on CPUs"),
    Alias("wandb_log", (_N,), _WANDB, switch=True, off=(False,)),
    Alias("wandb_project", (_N,), _WANDB),
    Alias("wandb_run_name", (_N,), _WANDB),
    Alias("report_to", (_H,), _WANDB, off=("none", "all", [])),
    Alias("load_best_model_at_end", (_H,), "nothing: `checkpoints/best` names the best checkpoint", switch=True),
    Alias("overwrite_output_dir", (_H,), "nothing: a run never writes over another one", switch=True),
    Alias("do_train", (_H,), "nothing: `zerofit train` trains", switch=True),
    Alias("do_eval", (_H,), "nothing: see eval_interval", switch=True),
    Alias("eval_only", (_N,), "nothing: `zerofit eval RUN` evaluates", switch=True, off=(False,)),
    Alias("tf32", (_H,), "nothing: fp32 is exact, and bf16 or fp16 is what precision says", switch=True),
)  # fmt: skip

#: Settings of one kind of data that mean nothing for another, where scripts pass them all the same.
OF_OTHER_KINDS = {
    "num_workers": "tokens are read from memory-mapped files without workers",
    "pin_memory": "batches are page-locked whenever training is on a GPU",
}

#: Names of ``sample.py`` and the like, which belong to another verb.
OF_GENERATE = ("num_samples", "max_new_tokens", "temperature", "top_k", "start")


@cache
def aliases() -> Mapping[str, Alias]:
    """Familiar names that are not zerofit's own, by name."""
    return {alias.name: alias for alias in _TABLE if not _is_native(alias.name)}


def find_alias(spelled: str) -> Alias | None:
    """The alias that `spelled` means; dashes and underscores are the same. None for zerofit's own names."""
    return aliases().get(spelled.replace("-", "_"))


def _is_native(name: str) -> bool:
    return name in keys() or sum(key.leaf == name for key in keys().values()) > 0


def read_alias(alias: Alias, entry: Entry, dialect: Dialect | None) -> Reading:
    """The alias's settings, and what became of it.

    Args:
        alias: the name.
        entry: with its value.
        dialect: that of the document or command line it stands in; None where nothing tells.

    Raises:
        ConfigError: a wrong value; a feature that is not here and was asked for; a name with two meanings and no
            dialect to choose by.
    """
    if alias.name == "gradient_accumulation_steps":
        return _accumulation(entry, dialect)
    if alias.name == "eval_only" and entry.value not in alias.off and _boolean(entry):
        raise ConfigError(f"{entry.origin}: eval_only asks to evaluate alone. Use `zerofit eval RUN`.")
    if alias.read is None:
        return noted(entry, "ignored", "off" if entry.value in alias.off else alias.becomes.removeprefix("nothing: "))
    targets = list(alias.read(entry))
    if not targets:
        return noted(entry, "ignored", "asks for nothing")
    unknown = next((name for name, _ in targets if name not in keys() and name not in DERIVED), None)
    if unknown is not None:
        raise ConfigError(f"{entry.origin}: {entry.name} would set {unknown}, which this version does not have.")
    return _shown(translated(entry, targets, alias.remark))


def _shown(reading: Reading) -> Reading:
    """The reading with its notes under names that people know."""

    def rename(note: Note) -> Note:
        derived = [name for name in note.targets if name in DERIVED]
        return replace(note, targets=DERIVED[derived[0]], values=()) if derived else note

    return replace(reading, notes=[rename(note) for note in reading.notes])


def _accumulation(entry: Entry, dialect: Dialect | None) -> Reading:
    value = entry.value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _wrong(entry, "a whole number of at least 1")
    if dialect == NANOGPT:
        remark = "nanoGPT counts over all ranks: global_batch = it x batch_size"
        return _shown(translated(entry, [(ALL_RANKS_ACCUMULATION, value)], remark))
    if dialect is not None:
        return translated(entry, [("accumulation_steps", value)], f"{dialect}: forward passes of each rank")
    raise ConfigError(
        f"{entry.origin}: gradient_accumulation_steps {value} has two meanings: in nanoGPT it counts over all ranks, "
        f"in DeepSpeed scripts and Hugging Face those of each rank, and nothing here tells which. Write "
        f"accumulation_steps {value} for {value} on each rank, or global_batch as {value} times the batch of one "
        f"forward pass for {value} over all ranks (on one GPU both are the same)."
    )


def dialect_of(names: Iterable[str]) -> Dialect | None:
    """The one dialect that `names` come from; None where nothing tells, or two are mixed.

    A name that several dialects share tells nothing.
    """
    known = aliases()
    found = {known[name].dialects[0] for name in names if name in known and len(known[name].dialects) == 1}
    per_rank = {SCRIPT, HUGGING_FACE}
    if len(found) == 1:
        return next(iter(found))
    if found and found <= per_rank:  # they count alike
        return SCRIPT
    shared = [set(known[name].dialects) for name in names if name in known]
    if not found and any(dialects <= per_rank for dialects in shared):
        return SCRIPT
    return None


def refuse_of_generate(name: str, where: str) -> None:
    """Sampling settings have a verb of their own.

    Raises:
        ConfigError: `name` is one.
    """
    if name in OF_GENERATE:
        raise ConfigError(
            f"{where}: {name} is about sampling from a trained model: `zerofit generate RUN --help` has it. Take it "
            f"out here."
        )


def rows() -> Iterator[tuple[str, str, str]]:
    """Name, dialects and meaning, for help and docs."""
    for alias in aliases().values():
        yield alias.name, ", ".join(alias.dialects), alias.becomes + (f" ({alias.remark})" if alias.remark else "")


def ratio_to_batches(iterations: int, micro_batch: int, global_batch: int) -> int:
    """nanoGPT's evaluation batches in global batches of as many samples, rounded up."""
    return math.ceil(iterations * micro_batch / global_batch)
