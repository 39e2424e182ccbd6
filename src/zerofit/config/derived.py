"""Settings that follow from several others, once all layers are merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from ..errors import ConfigError
from .dialects.aliases import (
    ALL_RANKS_ACCUMULATION,
    EVAL_ITERS,
    OF_OTHER_KINDS,
    SEQUENCE_LENGTH,
    TRAIN_DIR,
    VAL_DIR,
    ratio_to_batches,
)
from .documents import Entry, describe_value
from .images import PICTURE_SUFFIXES
from .keys import keys, kinds

#: The layer of what DeepSpeed takes where its file is silent: everything wins over it.
SILENCE = 0
#: Two ways to say one thing: that of the later layer holds.
_SAME_THING = (
    ("schedule.min_ratio", "schedule.min_learning_rate"),
    ("schedule.warmup_fraction", "schedule.warmup_steps"),
)


@dataclass
class Merged:
    """Settings by full name, and the layer that each came from (a later layer has a higher number)."""

    settings: dict[str, Entry] = field(default_factory=dict)
    levels: dict[str, int] = field(default_factory=dict)
    ignored: list[tuple[Entry, str]] = field(default_factory=list)
    """What turned out to mean nothing for this kind of data, and why."""
    became: dict[str, tuple[tuple[str, ...], str]] = field(default_factory=dict)
    """Alias -> what it set, where that followed from other settings, and what to know about it."""

    def put(self, entry: Entry, level: int) -> None:
        """Set; a later layer wins."""
        self.settings[entry.name], self.levels[entry.name] = entry, level

    def drop(self, name: str) -> None:
        """Unset."""
        self.settings.pop(name, None)
        self.levels.pop(name, None)

    def level(self, name: str) -> int:
        """Layer of `name`; -1 when nothing sets it."""
        return self.levels.get(name, -1)

    def number(self, name: str) -> int | None:
        """The value where it is a whole number."""
        value = self.settings[name].value if name in self.settings else None
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
        return int(value) if whole and isinstance(value, int | float) else None


def derive(merged: Merged, deepspeed_level: int) -> None:
    """Replace what depends on several settings by settings of its own.

    Raises:
        ConfigError: two ways of counting accumulation contradict each other.
    """
    _displace_global_batch(merged, deepspeed_level)
    _count_over_all_ranks(merged, deepspeed_level)
    _evaluation_batches(merged)
    _sequence_length(merged)
    _folders(merged)
    _of_other_kinds(merged)
    for one, other in _SAME_THING:
        if min(merged.level(one), merged.level(other)) > -1 and merged.level(one) != merged.level(other):
            merged.drop(one if merged.level(one) < merged.level(other) else other)


def _sequence_length(merged: Merged) -> None:
    """The length of a sample under the name that the architecture has for it."""
    entry = merged.settings.get(SEQUENCE_LENGTH)
    if entry is None:
        return
    kind = merged.settings["model.kind"].value if "model.kind" in merged.settings else None
    named = "model.d_model" in merged.settings if kind is None else kind in keys()["model.max_seq_length"].kinds
    name, level = "model.max_seq_length" if named else "model.block_size", merged.level(SEQUENCE_LENGTH)
    merged.drop(SEQUENCE_LENGTH)
    merged.became["seq_length"] = (name,), ""
    if merged.level(name) <= level:
        merged.put(Entry(name, entry.value, entry.origin), level)


def _folders(merged: Merged) -> None:
    """Folders for training and validation: of pictures both are prepared, of text the first holds all tokens."""
    found = [merged.settings.get(name) for name in (TRAIN_DIR, VAL_DIR)]
    level = max(merged.level(TRAIN_DIR), merged.level(VAL_DIR))
    for name in (TRAIN_DIR, VAL_DIR):
        merged.drop(name)
    train, validation = found
    if train is not None and _of_pictures(merged, train):
        folders = [str(entry.value) for entry in found if entry is not None]
        prepared = str(PurePath(str(train.value)).parent / "prepared")
        for name, value in (("data.kind", "images"), ("data.prepare", folders), ("data.path", prepared)):
            if merged.level(name) < level:
                merged.put(Entry(name, value, train.origin), level)
        remark = "a folder of pictures: prepared into data.path"
        merged.became["train_dir"] = ("data.kind", "data.prepare", "data.path"), remark
        merged.became["val_dir"] = ("data.prepare",), remark
        return
    if train is not None and merged.level("data.prepare") < level and Path(str(train.value)).is_dir():
        merged.drop("data.prepare")  # what is there is to be trained on: no preset's corpus is written beside it
    if train is not None and merged.level("data.path") < level:
        merged.put(Entry("data.path", train.value, train.origin), level)
    if validation is not None:
        alone = train is None and _kind_of_data(merged) == "images"
        why = "train_dir is missing" if alone else "validation tokens lie in data.path, beside those for training"
        merged.ignored.append((Entry("val_dir", validation.value, validation.origin), why))


def _kind_of_data(merged: Merged) -> object:
    return merged.settings["data.kind"].value if "data.kind" in merged.settings else None


def _of_pictures(merged: Merged, train: Entry) -> bool:
    """Whether the folder for training is one of pictures: because it is said, or because that is what lies in it.

    Raises:
        ConfigError: it holds pictures, and the model is one of text.
    """
    pictured, kind = keys()["model.num_classes"].kinds, merged.settings.get("model.kind")
    if _kind_of_data(merged) is not None:
        return _kind_of_data(merged) == "images"
    if kind is not None and kind.value in pictured:
        return True
    if not _holds_classes(Path(str(train.value))):
        return False
    shape = kind or next((e for n, e in merged.settings.items() if n in keys() and n.startswith("model.")
                          and keys()[n].kinds.isdisjoint(pictured)), None)  # fmt: skip
    if shape is not None:
        raise ConfigError(
            f"{train.origin}: train_dir {train.value} holds pictures in folders of classes, and {shape.name} "
            f"{shape.value} ({shape.origin}) is of a model of text. Train a classifier of pictures (--preset "
            f"animals90, or model.kind {' or '.join(sorted(pictured))}), or name a folder of tokens."
        )
    return True


def _holds_classes(folder: Path) -> bool:
    """Whether `folder` holds folders with pictures, and no tokens."""
    if not folder.is_dir() or (folder / "train.bin").exists():
        return False
    inside = (file for place in folder.iterdir() if place.is_dir() for file in place.iterdir())
    return any(file.suffix.lower() in PICTURE_SUFFIXES for file in inside)


def _of_other_kinds(merged: Merged) -> None:
    """Settings of readers that this kind of data does not have: scripts pass them whatever they train on."""
    for entry in list(merged.settings.values()):
        key = keys().get(entry.name)
        if key is None or not key.kinds or key.leaf not in OF_OTHER_KINDS:
            continue
        section = entry.name.partition(".")[0]
        kind = merged.settings.get(f"{section}.kind")
        if (str(kind.value) if kind else next(iter(kinds(section)))) not in key.kinds:
            merged.drop(entry.name)
            merged.ignored.append((Entry(key.leaf, entry.value, entry.origin), OF_OTHER_KINDS[key.leaf]))


def _displace_global_batch(merged: Merged, deepspeed_level: int) -> None:
    """A layer that says micro-batch and accumulation has said the batch: an earlier layer's total yields.

    Not between a file and its DeepSpeed JSON, which must not contradict each other: the plan compares them, when it
    knows the number of GPUs.
    """
    parts = [merged.level(name) for name in ("micro_batch", "accumulation_steps")]
    both = {merged.level("global_batch"), *parts}
    if both == {deepspeed_level - 1, deepspeed_level}:
        return
    if parts[1] == SILENCE < merged.level("global_batch"):
        merged.drop("accumulation_steps")
        return
    if -1 < merged.level("global_batch") < min(parts):
        merged.drop("global_batch")
    # The other way round: a total of a later layer is split anew.
    elif merged.level("global_batch") > max(parts) and min(parts) > -1:
        merged.drop("accumulation_steps")


def _count_over_all_ranks(merged: Merged, deepspeed_level: int) -> None:
    """nanoGPT's gradient_accumulation_steps, times the micro-batch, is the global batch."""
    name = ALL_RANKS_ACCUMULATION
    if name not in merged.settings:
        return
    total, per_rank = merged.settings[name], merged.settings.get("accumulation_steps")
    if per_rank is not None and merged.level("accumulation_steps") == deepspeed_level:
        _refuse_two_counts(merged, total, per_rank)
    if merged.level("global_batch") <= merged.level(name) and merged.level("accumulation_steps") <= merged.level(name):
        micro = merged.number("micro_batch")
        if micro is None:
            raise ConfigError(
                f"{total.origin}: gradient_accumulation_steps {total.value} counts over all ranks here (nanoGPT), and "
                f"the batch follows from it and batch_size, which nothing sets. Set batch_size, or global_batch."
            )
        merged.put(Entry("global_batch", int(str(total.value)) * micro, total.origin), merged.level(name))
        merged.drop("accumulation_steps")
    merged.drop(name)


def _refuse_two_counts(merged: Merged, total: Entry, per_rank: Entry) -> None:
    everywhere, each = int(str(total.value)), merged.number("accumulation_steps")
    ranks = merged.number("num_gpus")
    if each is None or (ranks is not None and each * ranks == everywhere):
        return
    agree = f" They agree on {everywhere // each} GPUs: say --num-gpus {everywhere // each} if that is meant." if (
        everywhere % each == 0 and ranks is None
    ) else ""  # fmt: skip
    on = f" on {ranks} GPUs" if ranks else ""
    raise ConfigError(
        f"gradient_accumulation_steps stands at {total.origin} as {everywhere}, which counts over all ranks (nanoGPT), "
        f"and at {per_rank.origin} as {each}, which counts those of each rank (DeepSpeed): {everywhere} in all, or "
        f"{f'{each * ranks}' if ranks else f'{each} times the number of GPUs'}{on}.{agree} Otherwise take one of the "
        f'two out, or write "auto" in the JSON.'
    )


def _evaluation_batches(merged: Merged) -> None:
    """nanoGPT's eval_iters counts micro-batches of one GPU; eval_batches counts global batches."""
    entry = merged.settings.get(EVAL_ITERS)
    if entry is None:
        return
    level = merged.level(EVAL_ITERS)
    merged.drop(EVAL_ITERS)
    if isinstance(entry.value, bool) or not isinstance(entry.value, int) or entry.value < 1:
        raise ConfigError(
            f"{entry.origin}: eval_iters was set to {describe_value(entry.value)}, and it takes a whole number of at "
            f"least 1."
        )
    micro, total = merged.number("micro_batch"), merged.number("global_batch")
    if micro and not total and (steps := merged.number("accumulation_steps")) and (n := merged.number("num_gpus")):
        total = micro * steps * n
    # Without both sizes, an iteration is taken for a global batch: never fewer samples than were asked for.
    batches = ratio_to_batches(entry.value, micro, total) if micro and total else entry.value
    if merged.level("eval_batches") <= level:
        merged.put(Entry("eval_batches", batches, entry.origin), level)


def conflicts(mine: Mapping[str, Entry], theirs: Mapping[str, Entry], settled: Mapping[str, Entry]) -> list[str]:
    """Settings that a file and a DeepSpeed JSON give different values, in words; those in `settled` are decided."""
    return [
        f"{name} is {describe_value(mine[name].value)} at {mine[name].origin} and "
        f"{describe_value(entry.value)} at {entry.origin}"
        for name, entry in theirs.items()
        if name in mine and name not in settled and name in keys() and not _same(mine[name].value, entry.value)
    ]


def _same(one: object, other: object) -> bool:
    if one in ("auto", None) or other in ("auto", None):
        return True
    return one == other or str(one) == str(other)
