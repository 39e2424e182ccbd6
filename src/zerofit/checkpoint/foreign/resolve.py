"""From the names of a file to canonical ones: prefixes, ties, transposed matrices, padded vocabularies, checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...config.models import LanguageModelShape, ModelConfig
from ...errors import CheckpointError
from .contents import MOMENTS, PARAMETER, ROLES, Contents
from .names import ARCHITECTURES, Architecture, recognized
from .sources import Rows, Source, Transposed, all_zero, equal

#: What people round a vocabulary up to.
VOCABULARY_MULTIPLES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
Tensors = dict[str, dict[str, Source]]


class Foreign:
    """A foreign checkpoint opened for reading, with the interface of `checkpoint.store.Saved`.

    Attributes:
        folder: where it lies; for a single file, the file.
        step: optimizer steps attempted when it was written; None when it does not tell.
        scalars: as `types.Scalars`; ``optimizer_steps`` where known.
        state: ``best_loss``, ``best_step``, ``metrics``; ``client_state``, ``epoch`` and ``model`` where present.
        model: the model's shape: the one that was asked for, else the one that the source tells.
        what: its kind in a few words.
        notes: one sentence for each thing that was carried over or was absent.
    """

    def __init__(self, contents: Contents, tensors: Tensors, model: ModelConfig | None) -> None:
        self.folder: Path = contents.folder
        self.step = contents.step
        self.scalars: Mapping[str, float] = contents.scalars
        self.state: Mapping[str, Any] = {**contents.state, **({"model": model.model_dump()} if model else {})}
        self.model = model
        self.what = contents.what
        self.notes = tuple(contents.notes)
        self._tensors = tensors
        self._last: Source | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape."""
        return {name: source.shape for name, source in self._tensors[PARAMETER].items()}

    def read(self, name: str, role: str, start: int, stop: int) -> Tensor | None:
        """Elements ``[start, stop)`` of a flattened tensor, 1-D fp32 on the CPU; None when it is not there."""
        source = self._tensors.get(role, {}).get(name)
        if source is None:
            return None
        if source is not self._last and isinstance(self._last, Transposed):
            self._last.forget()
        self._last = source
        return source.read(start, stop)


def resolve(contents: Contents, model: ModelConfig | None) -> Foreign:
    """Give the parameters their canonical names and verify them.

    Raises:
        CheckpointError: an unknown, missing or misshapen parameter, a tie that is none, another model.
    """
    architecture = _architecture(contents, model)
    tensors = {role: _renamed(contents, architecture, role) for role in ROLES}
    _transpose(tensors, architecture)
    shapes = {name: source.shape for name, source in tensors[PARAMETER].items()}
    told = next((found for place in contents.descriptions if (found := architecture.told(place, shapes))), None)
    if model is not None:
        _check_hidden_fields(contents, architecture, told, model)
    found = model or told
    if found is not None:
        found = _with_vocabulary(contents, architecture, found, shapes)
        _fit_vocabulary(contents, tensors, architecture, found)
        _drop_zero_biases(contents, tensors, found)
        _check_shapes(contents, tensors, found.parameter_shapes())
    _note_missing_moments(contents, tensors)
    return Foreign(contents, tensors, found)


def _architecture(contents: Contents, model: ModelConfig | None) -> Architecture:
    if model is not None:
        if model.kind not in ARCHITECTURES:
            raise CheckpointError(
                f"{contents.folder} ({contents.what}) was written by another program, and the configuration is of a "
                f"{model.kind}: such files are read for {', '.join(ARCHITECTURES)}. A classifier starts from another "
                f"program's state dict with model.weights_from FILE."
            )
        return ARCHITECTURES[model.kind]
    architecture = recognized(contents.tensors[PARAMETER])
    if architecture is not None:
        return architecture
    raise CheckpointError(
        f"{contents.folder} ({contents.what}) holds parameters of no architecture that zerofit knows "
        f"({', '.join(ARCHITECTURES)}): {listed(contents.tensors[PARAMETER])}. Name the model with --config or "
        f"--preset if it is one of these under other names."
    )


def _renamed(contents: Contents, architecture: Architecture, role: str) -> dict[str, Source]:
    renamed: dict[str, Source] = {}
    seen: dict[str, str] = {}
    for name, source in contents.tensors[role].items():
        canonical = architecture.canonical(name)
        if canonical is None:
            continue
        canonical = architecture.tied.get(canonical, canonical)
        if canonical in renamed:
            _check_tie(contents, role, (seen[canonical], renamed[canonical]), (name, source))
            continue
        renamed[canonical], seen[canonical] = source, name
    return renamed


def _check_tie(contents: Contents, role: str, first: tuple[str, Source], second: tuple[str, Source]) -> None:
    """Two names of one tensor must hold the same values."""
    if not equal(first[1], second[1]):
        raise CheckpointError(
            f"{contents.folder}: {second[0]} and {first[0]} ({role}) are one tied tensor in zerofit's model, and the "
            f"checkpoint holds different values for them. The model was trained with separate weights, which zerofit's "
            f"does not have; there is no conversion for it."
        )


def _transpose(tensors: Tensors, architecture: Architecture) -> None:
    turned = architecture.transposed({name: source.shape for name, source in tensors[PARAMETER].items()})
    for role in ROLES:
        tensors[role] = {
            name: Transposed(source) if name in turned else source for name, source in tensors[role].items()
        }


def _check_hidden_fields(
    contents: Contents, architecture: Architecture, told: ModelConfig | None, model: ModelConfig
) -> None:
    for name in architecture.hidden_fields:
        if told is not None and getattr(told, name) != getattr(model, name):
            raise CheckpointError(
                f"{contents.folder} says that its model has {name} {getattr(told, name)}, and {getattr(model, name)} "
                f"was asked for. The parameters' shapes are the same, and the outputs are not: set model.{name} "
                f"{getattr(told, name)}."
            )
    if told is None and architecture.hidden_fields:
        fields = ", ".join(f"{name} {getattr(model, name)}" for name in architecture.hidden_fields)
        contents.note(f"The source does not tell {fields}: taken from the configuration.")


def _with_vocabulary(
    contents: Contents, architecture: Architecture, model: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> ModelConfig:
    """A configuration may leave the vocabulary to the data; here the source's table has it."""
    table = architecture.vocabulary_table
    if not isinstance(model, LanguageModelShape) or model.vocab_size is not None or table is None:
        return model
    if table not in shapes:
        raise CheckpointError(f"{contents.folder} ({contents.what}) lacks {table}. Name the model it was written from.")
    rows = shapes[table][0]
    contents.note(f"The configuration names no vocabulary: {rows} tokens, the rows of {table}, are taken.")
    return model.model_copy(update={"vocab_size": rows, "pad_vocab_to": 1})


def _fit_vocabulary(contents: Contents, tensors: Tensors, architecture: Architecture, model: ModelConfig) -> None:
    """Cut padding rows of the source's table, or add the rows with which this model pads its own."""
    name = architecture.vocabulary_table
    if name is None or name not in tensors[PARAMETER] or not isinstance(model, LanguageModelShape):
        return
    rows, wanted, used = tensors[PARAMETER][name].shape[0], model.parameter_shapes()[name][0], model.vocab_size
    assert used is not None
    if rows == wanted:
        return
    # Rows beyond the vocabulary belong to no token. More of them than rounding up explains are another vocabulary.
    if rows < used or (rows > wanted and rows not in {-(-used // m) * m for m in VOCABULARY_MULTIPLES}):
        raise CheckpointError(
            f"{contents.folder}: {name} has {rows} rows, and the model has a vocabulary of {used} tokens in {wanted} "
            f"rows. Only rows of padding may differ: rounding {used} up does not give {rows}, so the checkpoint has "
            f"another vocabulary. Set model.vocab_size {rows}."
        )
    for role in ROLES:
        if name in tensors[role]:
            tensors[role][name] = Rows(tensors[role][name], wanted)
    change = f"{rows - wanted} rows of padding were cut" if rows > wanted else f"{wanted - rows} rows of zeros added"
    contents.note(f"{name} has {rows} rows and the model {wanted}, for {used} tokens: {change}.")


def _drop_zero_biases(contents: Contents, tensors: Tensors, model: ModelConfig) -> None:
    """A model without biases may come back from a format that has them; zeros change nothing."""
    wanted = model.parameter_shapes()
    extra = [name for name in tensors[PARAMETER] if name.endswith(".bias") and name not in wanted]
    if (
        extra
        and not any(name.endswith(".bias") for name in wanted)
        and all(all_zero(tensors[PARAMETER][name]) for name in extra)
    ):
        for role in ROLES:
            for name in extra:
                tensors[role].pop(name, None)
        contents.note(f"{len(extra)} biases that are all 0 were left out: the model has none.")


def _check_shapes(contents: Contents, tensors: Tensors, wanted: Mapping[str, tuple[int, ...]]) -> None:
    there = tensors[PARAMETER]
    missing, unknown = [n for n in wanted if n not in there], [n for n in there if n not in wanted]
    if missing or unknown:
        found = [f"lacks {listed(missing)}"] if missing else []
        found += [f"holds {listed(unknown)}, which the model does not have"] if unknown else []
        raise CheckpointError(
            f"{contents.folder} ({contents.what}) is of another model: it {' and '.join(found)}. Name the model that "
            f"it was written from with --config or --preset, or in the model section."
        )
    for role in ROLES:
        for name, source in tensors[role].items():
            if source.shape != wanted.get(name):
                raise CheckpointError(
                    f"{contents.folder} ({contents.what}) is of another model: {name} ({role}) has the shape "
                    f"{source.shape} there and {wanted.get(name, 'absent')} in the model. Name the model that it was "
                    f"written from."
                )


def _note_missing_moments(contents: Contents, tensors: Tensors) -> None:
    parameters = tensors[PARAMETER].keys()
    lacking = sorted(n for n in parameters if any(tensors[role] and n not in tensors[role] for role in MOMENTS))
    if lacking:
        contents.note(f"{listed(lacking)}: no moments were stored; they start at 0.")


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first names and how many more, for a message."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + rest
