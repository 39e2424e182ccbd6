"""A DeepSpeed configuration file, key by key, in zerofit's settings. Needs no DeepSpeed.

What DeepSpeed takes when a block is absent (stage 0, no offload, fp32, no accumulation) is taken too, but yields to
everything that the rest of the configuration says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from ...errors import ConfigError
from ..documents import Entry, describe_value, read_entries
from ..keys import keys, nearest
from ..schema import Config
from . import deepspeed_keys as table
from .notes import Outcome, Reading, noted, translated

AUTO = "auto"
_ZERO = "zero_optimization"
_OPTIMIZER_PARAMS = {
    "optimizer.params.lr": "optimizer.learning_rate",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
    "optimizer.params.max_grad_norm": "optimizer.grad_clip",
}
#: Every key that may stand in the file and is read below, beside those of the tables.
_SPECIAL = frozenset(
    {
        *_OPTIMIZER_PARAMS,
        "steps_per_print",
        "communication_data_type",
        "zero_force_ds_cpu_optimizer",
        "fp16.enabled",
        "fp16.loss_scale",
        "bf16.enabled",
        "data_types.grad_accum_dtype",
        f"{_ZERO}.stage",
        *(f"{_ZERO}.{block}.{name}" for block in ("offload_optimizer", "offload_param") for name in
          ("device", "nvme_path", "pin_memory")),
        "optimizer.type",
        "optimizer.params.betas",
        "optimizer.params.momentum",
        "optimizer.params.adam_w_mode",
        "scheduler.type",
        *(f"scheduler.params.{name}" for names in table.SCHEDULER_PARAMS.values() for name in names),
    }
)  # fmt: skip
_KNOWN = frozenset({*table.SAME, *table.STAGE_3_SAME, *table.FP16_SCALE, *table.IGNORED, *table.REMOVED, *_SPECIAL})


def read_deepspeed(text: str, source: Path) -> Reading:
    """The file's settings, and a note for each of its keys.

    Args:
        text: JSON; comments with ``//``, ``#`` and ``/* */`` are allowed, as DeepSpeed allows them.
        source: for messages and origins.

    Raises:
        ConfigError: no JSON, an unknown key (with the nearest known one), a value that contradicts another one.
    """
    plain = strip_comments(text).expandtabs(1)
    entries = [_modern(entry) for entry in read_entries(plain, str(source), table.BLOCKS)]
    if not entries:
        raise ConfigError(f"{source} holds no keys. Give a DeepSpeed configuration, or leave --deepspeed-config away.")
    reader = _Reader({entry.name: entry for entry in entries}, source)
    for entry in entries:
        reader.refuse_unknown(entry)
    _refuse_contradicting_batches(reader)
    for read in (_batches, _zero, _offload, _precision, _gradients, _optimizer, _scheduler, _rest):
        reader.reading.add(read(reader))
    order = [entry.name for entry in entries]
    reader.reading.notes.sort(key=lambda note: order.index(note.key) if note.key in order else len(order))
    return reader.reading


def strip_comments(text: str) -> str:
    """`text` with comments as spaces, so that every other character keeps its line and column."""
    kept: list[str] = []
    position, end = 0, len(text)
    while position < end:
        two = text[position : position + 2]
        if text[position] == '"':
            stop = _end_of_string(text, position)
            kept.append(text[position:stop])
        elif two == "/*":
            close = text.find("*/", position + 2)
            stop = end if close < 0 else close + 2
            kept.append("".join("\n" if c == "\n" else " " for c in text[position:stop]))
        elif two == "//" or text[position] == "#":
            close = text.find("\n", position)
            stop = end if close < 0 else close
        else:
            stop = position + 1
            kept.append(text[position])
        position = stop
    return "".join(kept)


def _end_of_string(text: str, start: int) -> int:
    position = start + 1
    while position < len(text) and text[position] not in '"\n':
        position += 2 if text[position] == "\\" else 1
    return min(position + 1, len(text))


def looks_like_deepspeed(names: Sequence[str]) -> bool:
    """Whether top-level names are those of a DeepSpeed configuration."""
    own = {"zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"}
    return bool(own & set(names)) and set(names) <= {name.partition(".")[0] for name in _KNOWN}


def _modern(entry: Entry) -> Entry:
    """``bfloat16`` is an older name of ``bf16``."""
    return Entry(entry.name.replace("bfloat16", "bf16", 1), entry.value, entry.origin) if (
        entry.name.partition(".")[0] == "bfloat16"
    ) else entry  # fmt: skip


class _Reader:
    """The file's entries by name, and what has been made of them."""

    def __init__(self, found: dict[str, Entry], source: Path) -> None:
        self.found, self.source, self.reading = found, source, Reading()

    def refuse_unknown(self, entry: Entry) -> None:
        """A typo ends here: DeepSpeed itself ignores unknown keys at the top level."""
        if entry.name in _KNOWN or entry.name in table.BLOCKS:
            return
        outer, _, leaf = entry.name.rpartition(".")
        siblings = [name for name in (*_KNOWN, *table.BLOCKS) if name.rpartition(".")[0] == outer]
        near = nearest(entry.name, siblings) or nearest(leaf, [name.rpartition(".")[2] for name in siblings])
        guess = f"The nearest known key is {near}." if near else f"Known keys there: {', '.join(sorted(siblings))}."
        raise ConfigError(
            f"{entry.origin}: {entry.name!r} is not a key of a DeepSpeed 0.19 configuration. {guess} Mend it or take "
            f"it out."
        )

    def get(self, name: str) -> Any:
        """The value; None when it is absent, ``auto`` or null."""
        entry = self.found.get(name)
        return None if entry is None or entry.value == AUTO else entry.value

    def is_auto(self, name: str) -> bool:
        return name in self.found and self.found[name].value == AUTO

    def refuse(self, name: str, words: str) -> ConfigError:
        return ConfigError(f"{self.found[name].origin}: {words}")

    def number(self, name: str, least: float = -math.inf) -> float | None:
        """The value as a number.

        Raises:
            ConfigError: it is none.
        """
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
            rule = "a number" if least == -math.inf else f"a number of at least {least:g}"
            raise self.refuse(name, f'{name} was set to {describe_value(value)}, and it takes {rule} or "auto".')
        return value

    def switch(self, name: str, default: bool = False) -> bool:
        """The value as true or false.

        Raises:
            ConfigError: it is neither.
        """
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, f"{name} was set to {describe_value(value)}, and it takes true or false.")
        return value

    def plain(self, names: dict[str, str]) -> Reading:
        """The keys of `names` that are there, as the settings they stand for."""
        reading = Reading()
        for name, target in names.items():
            if name in self.found:
                reading.add(self.one(name, [(target, self.found[name].value)]))
        return reading

    def one(
        self, name: str, targets: Sequence[tuple[str, object]], remark: str = "", outcome: Outcome | None = None
    ) -> Reading:
        """One key as `targets`; ``auto`` is left to the rest of the configuration."""
        entry = self.found[name]
        if entry.value == AUTO or entry.value is None:
            return noted(entry, "auto", "", *(target for target, _ in targets))
        return translated(entry, targets, remark, outcome)


def _refuse_contradicting_batches(reader: _Reader) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = (reader.number(name, 1) for name in names)
    if total and micro and total % (micro * (steps or 1)):
        per_rank = f"{micro:g} x {steps:g} = {micro * steps:g}" if steps else f"{micro:g}"
        raise reader.refuse(
            names[0],
            f"train_batch_size {total:g} is no multiple of what one GPU takes in a step, {per_rank} "
            f"({names[1]} x {names[2]}); train_batch_size = micro-batch x accumulation x GPUs. Leave out one of the "
            f"three, or mend it.",
        )


def _batches(reader: _Reader) -> Reading:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    reading = reader.plain({name: table.SAME[name] for name in names})
    if reader.get(names[1]) and not any(name in reader.found for name in (names[0], names[2])):
        reading.defaults.append(Entry("accumulation_steps", 1, _silence(reader)))
    return reading


def _stage(reader: _Reader) -> int | None:
    """The ZeRO stage; None for ``auto``. An absent block is stage 0."""
    if reader.is_auto(f"{_ZERO}.stage"):
        return None
    value = reader.get(f"{_ZERO}.stage")
    if value is None:
        return 0
    if isinstance(value, bool) or value not in (0, 1, 2, 3):
        raise reader.refuse(f"{_ZERO}.stage", f"{_ZERO}.stage was set to {describe_value(value)}; stages are 0 to 3.")
    return int(value)


def _zero(reader: _Reader) -> Reading:
    reading, stage = Reading(), _stage(reader)
    name = f"{_ZERO}.stage"
    if stage is None:
        reading.add(reader.one(name, [("strategy", AUTO)]))
    elif name in reader.found and reader.found[name].value is not None:
        strategy = f"zero{stage}" if stage else "ddp"
        remark = "" if stage else "stage 0 is torch's DDP; on one GPU it is the same as single"
        reading.add(reader.one(name, [("strategy", strategy)], remark))
    else:
        reading.defaults.append(Entry("strategy", "ddp", _silence(reader)))
    for key, target in (table.STAGE_3_SAME | {k: v for k, v in table.SAME.items() if k.startswith(_ZERO)}).items():
        needed = 3 if key in table.STAGE_3_SAME else 1
        if key in reader.found and stage is not None and stage < needed:
            reading.add(noted(reader.found[key], "ignored", f"read by stage {needed} and above; the stage is {stage}"))
        elif key in reader.found:
            reading.add(reader.one(key, [(target, reader.found[key].value)]))
    return reading


def _offload(reader: _Reader) -> Reading:
    reading, stage = Reading(), _stage(reader)
    targets = {"offload_optimizer": "offload", "offload_param": "offload_parameters"}
    for block, target in targets.items():
        prefix, legacy = f"{_ZERO}.{block}", f"{_ZERO}.cpu_{block.removesuffix('_optimizer')}"
        if prefix in reader.found:  # "offload_optimizer": null
            reading.add(noted(reader.found[prefix], "ignored", "an empty block turns nothing on"))
        device = _device(reader, f"{prefix}.device")
        if device is None and reader.switch(legacy):
            _refuse_stage(reader, legacy, stage, target, "cpu")
            reading.add(reader.one(legacy, [(target, "cpu")], table.REMOVED[legacy], "removed"))
        elif f"{prefix}.device" in reader.found:
            _refuse_stage(reader, f"{prefix}.device", stage, target, device or "none")
            reading.add(reader.one(f"{prefix}.device", [(target, device)]))
        elif stage:
            reading.defaults.append(Entry(target, "none", _silence(reader)))
        reading.add(_offload_details(reader, prefix, device))
    return reading


def _offload_details(reader: _Reader, prefix: str, device: str | None) -> Reading:
    """Where on NVMe, and page-locking. Both offloads share one folder and one wish here."""
    reading = Reading()
    for name, target in (("nvme_path", "nvme_path"), ("pin_memory", "zero.pin_memory")):
        entry = reader.found.get(f"{prefix}.{name}")
        other = reader.get(f"{_ZERO}.offload_optimizer.{name}")
        if entry is None:
            continue
        if device in (None, "none") or (name == "nvme_path" and device != "nvme"):
            reading.add(noted(entry, "ignored", f"the device of {prefix.rpartition('.')[2]} is {device or 'not set'}"))
        elif prefix.endswith("offload_param") and other is not None and other != entry.value:
            remark = f"one {target} serves both: that of offload_optimizer is taken"
            reading.add(noted(entry, "overridden", remark, target))
        elif prefix.endswith("offload_param") and other is not None:
            reading.add(noted(entry, "used", "", target))
        else:
            reading.add(reader.one(entry.name, [(target, entry.value)]))
    return reading


def _device(reader: _Reader, name: str) -> str | None:
    value = reader.get(name)
    if value is not None and value not in ("none", "cpu", "nvme"):
        raise reader.refuse(name, f"{name} was set to {describe_value(value)}, and it takes none, cpu or nvme.")
    return None if value is None else str(value)


def _refuse_stage(reader: _Reader, name: str, stage: int | None, target: str, device: str) -> None:
    """What DeepSpeed would ignore in silence."""
    if device == "none" or stage is None:
        return
    needed = 3 if target == "offload_parameters" or device == "nvme" else 1
    if stage < needed:
        what = "parameters" if target == "offload_parameters" else "optimizer states"
        raise reader.refuse(
            name,
            f"{what} are to go to {device} at stage {stage}; that takes stage {needed}{' or above' * (needed < 3)}, "
            f"and DeepSpeed ignores it below. Set {_ZERO}.stage to {needed}, or the device to "
            f"{'cpu' if device == 'nvme' and stage and target == 'offload' else 'none'}.",
        )
    if target == "offload_parameters" and _device(reader, f"{_ZERO}.offload_optimizer.device") in (None, "none"):
        raise reader.refuse(
            name,
            f"parameters are to go to {device} while optimizer states stay on the GPU, which are six times as large; "
            f"zerofit moves them first. Set {_ZERO}.offload_optimizer.device to {device} too, or take offload_param "
            f"out.",
        )


def _precision(reader: _Reader) -> Reading:
    reading = Reading()
    on = {name: reader.switch(f"{name}.enabled") for name in ("fp16", "bf16")}
    if all(on.values()):
        raise reader.refuse(
            "bf16.enabled",
            f"bf16 and fp16 ({reader.found['fp16.enabled'].origin}) are both enabled, and a run has one precision. "
            f"Disable one.",
        )
    for name, enabled in on.items():
        key = f"{name}.enabled"
        if key in reader.found and reader.found[key].value not in (AUTO, None) and not enabled:
            reading.add(noted(reader.found[key], "ignored", f"{name} is off"))
        elif key in reader.found:
            reading.add(reader.one(key, [("precision", name)]))
    if not any(on.values()) and not any(reader.is_auto(f"{name}.enabled") for name in on):
        reading.defaults.append(Entry("precision", "fp32", _silence(reader)))
    reading.add(_loss_scale(reader, on["fp16"] or reader.is_auto("fp16.enabled")))
    return reading


def _loss_scale(reader: _Reader, enabled: bool) -> Reading:
    reading = Reading()
    static = reader.number("fp16.loss_scale", 0) or 0
    for name, target in table.FP16_SCALE.items():
        if name in reader.found and not enabled:
            reading.add(noted(reader.found[name], "ignored", "fp16 is off"))
        elif name in reader.found and static and target != "loss_scale.min_scale":
            reading.add(noted(reader.found[name], "ignored", "loss_scale sets a static scale"))
        elif name in reader.found:
            reading.add(reader.one(name, [(target, reader.found[name].value)]))
    if "fp16.loss_scale" in reader.found:
        entry = reader.found["fp16.loss_scale"]
        if not enabled or not static:
            remark = "fp16 is off" if not enabled else "0 means a dynamic scale, which is zerofit's"
            reading.add(noted(entry, "ignored" if not enabled else "used", remark))
        else:
            power = min(max(round(math.log2(static)), 0), 32)
            settings = [("loss_scale.initial_power", power), ("loss_scale.window", 2**31 - 1)]
            remark = f"the scale starts at {2**power}, never grows, and falls only where a gradient overflows"
            reading.add(reader.one(entry.name, settings, remark))
    return reading


def _gradients(reader: _Reader) -> Reading:
    """Types of gradients: one setting here, accumulated and reduced alike."""
    reading = Reading()
    accumulate, reduce = "data_types.grad_accum_dtype", "communication_data_type"
    wish = next((name for name in (accumulate, reduce) if reader.get(name) is not None), None)
    for name in (accumulate, reduce):
        if name not in reader.found:
            continue
        known = {"fp32": "fp32", "float32": "fp32", "fp16": "compute", "bf16": "compute", "bfp16": "compute"}
        value = reader.get(name)
        if value is not None and value not in known:
            raise reader.refuse(name, f"{name} was set to {describe_value(value)}, and it takes fp32, fp16 or bf16.")
        if value is not None and name != wish:
            reading.add(noted(reader.found[name], "overridden", f"gradients have one type: that of {wish}"))
        else:
            wanted = known.get(str(value), AUTO)
            reading.add(reader.one(name, [("gradient_dtype", wanted)], "for accumulation and reduction alike"))
    return reading


def _optimizer(reader: _Reader) -> Reading:
    reading = Reading()
    for block in ("optimizer", "optimizer.params"):
        if block in reader.found:
            reading.add(noted(reader.found[block], "ignored", "an empty block"))
    kind, removed = _optimizer_kind(reader)
    if "optimizer.type" in reader.found:
        remark = "" if kind is None or str(reader.get("optimizer.type")).lower() == kind else _of_optimizer(kind)
        if removed:
            remark = "1-bit optimizers are gone from DeepSpeed; AdamW with uncompressed gradients takes its place"
        reading.add(reader.one("optimizer.type", [("optimizer.kind", kind)], remark, "removed" if removed else None))
    for name, target in _OPTIMIZER_PARAMS.items():
        if name in reader.found:
            reading.add(_optimizer_parameter(reader, name, target))
    if "optimizer.params.betas" in reader.found:
        reading.add(_betas(reader))
    for name, why in (("momentum", _momentum(reader, kind)), ("adam_w_mode", _adam_w_mode(reader, kind))):
        if f"optimizer.params.{name}" in reader.found:
            reading.add(why)
    if "zero_force_ds_cpu_optimizer" in reader.found:
        kernel = "deepspeed" if reader.switch("zero_force_ds_cpu_optimizer", True) else "torch"
        reading.add(
            reader.one("zero_force_ds_cpu_optimizer", [("optimizer.cpu_kernel", kernel)], "matters with CPU offload")
        )
    return reading


def _optimizer_kind(reader: _Reader) -> tuple[str | None, bool]:
    """zerofit's kind, and whether DeepSpeed 0.19 dropped the named one."""
    name = reader.get("optimizer.type")
    if name is None:
        return None, False
    folded = str(name).lower()
    kind, ours = table.OPTIMIZERS.get(folded), _kinds("optimizer")
    if kind not in ours:
        raise reader.refuse(
            "optimizer.type",
            f"the optimizer {name!r} is not one of zerofit's, {', '.join(ours)}"
            f"{' (DeepSpeed 0.19 has dropped it too)' if folded in table.REMOVED_OPTIMIZERS else ''}. Another one "
            f"wants other learning rates, so none is put in its place: choose one of them.",
        )
    return kind, folded in table.REMOVED_OPTIMIZERS


def _of_optimizer(kind: str) -> str:
    return "AdamW: decay is decoupled, as DeepSpeed's Adam does it by default" if kind == "adamw" else ""


def _optimizer_parameter(reader: _Reader, name: str, target: str) -> Reading:
    entry = reader.found[name]
    if name.endswith(".lr") and reader.get("scheduler.params.warmup_max_lr") is not None:
        return noted(entry, "overridden", "the scheduler's warmup_max_lr is the peak", target)
    if name.endswith(".max_grad_norm") and reader.get("gradient_clipping") is not None:
        return noted(entry, "overridden", "gradient_clipping is what DeepSpeed reads", target)
    return reader.one(name, [(target, entry.value)])


def _betas(reader: _Reader) -> Reading:
    name = "optimizer.params.betas"
    value = reader.get(name)
    targets = ("optimizer.beta1", "optimizer.beta2")
    if value is None:
        return noted(reader.found[name], "auto", "", *targets)
    if not (isinstance(value, list) and len(value) >= 2):
        raise reader.refuse(name, f"betas was set to {describe_value(value)}, and it takes a list of two numbers.")
    return translated(reader.found[name], list(zip(targets, value, strict=False)))


def _momentum(reader: _Reader, kind: str | None) -> Reading:
    name = "optimizer.params.momentum"
    if name not in reader.found:
        return Reading()
    if kind in ("sgd", "muon"):
        return reader.one(name, [("optimizer.momentum", reader.found[name].value)])
    return noted(reader.found[name], "ignored", f"{kind or 'this optimizer'} has no momentum of that name")


def _adam_w_mode(reader: _Reader, kind: str | None) -> Reading:
    name = "optimizer.params.adam_w_mode"
    if name not in reader.found:
        return Reading()
    if reader.switch(name, True) or kind not in (None, "adamw") or not reader.number("optimizer.params.weight_decay"):
        return noted(reader.found[name], "used", "decay is decoupled")
    raise reader.refuse(
        name,
        "adam_w_mode false adds the decay to the gradient (Adam with L2), and zerofit's AdamW decouples it. Set it "
        "true, or weight_decay to 0.",
    )


def _scheduler(reader: _Reader) -> Reading:
    reading = Reading()
    for block in ("scheduler", "scheduler.params"):
        if block in reader.found:
            reading.add(noted(reader.found[block], "ignored", "an empty block"))
    if "scheduler.type" not in reader.found:
        for name in [name for name in reader.found if name.startswith("scheduler.params.")]:
            raise reader.refuse(name, f"{name} stands there without a scheduler.type. Add the type, or take it out.")
        return reading
    if reader.get("scheduler.type") is None:
        for entry in [e for n, e in reader.found.items() if n.startswith("scheduler.")]:
            reading.add(noted(entry, "auto", "the schedule is what the rest of the configuration says"))
        return reading
    folded = str(reader.get("scheduler.type")).lower()
    kind, ours = table.SCHEDULERS.get(folded), _kinds("schedule")
    if kind not in ours:
        raise reader.refuse(
            "scheduler.type",
            f"the scheduler {reader.get('scheduler.type')!r} has no counterpart among zerofit's schedules, "
            f"{', '.join(ours)}. Take the block out and set schedule.kind.",
        )
    reading.add(reader.one("scheduler.type", [("schedule.kind", kind)]))
    known = table.SCHEDULER_PARAMS[folded]
    for entry in [e for n, e in reader.found.items() if n.startswith("scheduler.params.")]:
        leaf = entry.name.rpartition(".")[2]
        if leaf not in known:
            raise reader.refuse(entry.name, f"{leaf} is no parameter of {reader.get('scheduler.type')}; those are "
                                f"{', '.join(known)}. Take it out, or mend it.")  # fmt: skip
        reading.add(_scheduler_parameter(reader, entry, leaf))
    return reading


def _scheduler_parameter(reader: _Reader, entry: Entry, leaf: str) -> Reading:
    value = entry.value
    match leaf:
        case "warmup_num_steps":
            return reader.one(entry.name, [("schedule.warmup_steps", value)])
        case "warmup_max_lr":
            return reader.one(entry.name, [("optimizer.learning_rate", value)], "the peak")
        case "total_num_steps":
            remark = "the decay ends there; max_steps says how long the run is"
            return reader.one(entry.name, [("schedule.decay_steps", value)], remark)
        case "cos_min_ratio":
            peak, ratio = reader.number("optimizer.params.lr", 0), reader.number(entry.name, 0)
            if "schedule.min_ratio" in keys():
                return reader.one(entry.name, [("schedule.min_ratio", ratio)])
            if peak is None or ratio is None:
                return noted(entry, "auto", "a share of a learning rate that stands elsewhere; set min_learning_rate",
                             "schedule.min_learning_rate")  # fmt: skip
            return reader.one(entry.name, [("schedule.min_learning_rate", ratio * peak)], "that share of the peak")
        case "warmup_type":
            return noted(entry, "used" if value == "linear" else "translated",
                         "" if value == "linear" else "warm-up is linear here, not logarithmic")  # fmt: skip
        case "warmup_min_lr" | "warmup_min_ratio" if not reader.number(entry.name):
            return noted(entry, "auto" if value == AUTO else "used", "warm-up starts from 0")
    return noted(entry, "ignored", "warm-up starts from 0" if "min" in leaf else "the step is the run's own")


def _rest(reader: _Reader) -> Reading:
    reading = reader.plain({"gradient_clipping": table.SAME["gradient_clipping"]})
    if "steps_per_print" in reader.found:
        steps = reader.number("steps_per_print")
        often = steps is not None and 1 <= steps < 2**31
        reading.add(
            reader.one("steps_per_print", [("log_interval", steps)], "steps between printed lines")
            if often or steps is None
            else noted(reader.found["steps_per_print"], "ignored", "it asks for no lines; see log_interval")
        )
    for name, entry in reader.found.items():
        if name in table.REMOVED and not any(note.key == name for note in reader.reading.notes):
            reading.add(noted(entry, "removed", table.REMOVED[name]))
        elif name in table.IGNORED:
            reading.add(noted(entry, "ignored", table.IGNORED[name]))
        elif name in table.BLOCKS and not any(note.key == name for note in reader.reading.notes):
            reading.add(noted(entry, "ignored", "an empty block"))
    return reading


def _kinds(section: str) -> tuple[str, ...]:
    """The values of ``section.kind``."""
    annotation: Any = Config.model_fields[section].annotation
    return get_args(annotation.model_fields["kind"].annotation)


def _silence(reader: _Reader) -> str:
    return f"DeepSpeed's default ({reader.source} is silent)"
