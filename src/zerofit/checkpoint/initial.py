"""Weights that a new run starts from: of the hub, of other runs, of other programs; cut to fit where they may be."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from ..config.models import GPT2Config, LanguageModelShape, ModelConfig
from ..errors import CheckpointError, MissingDependency
from ..types import Scalars
from .manifest import MANIFEST, read_manifest, step_folders
from .retention import locate

if TYPE_CHECKING:
    from torch import Tensor

    from .source import Source

#: nanoGPT's names -> repository on the hub, and the published shapes (Radford et al. 2019, table 2).
PUBLISHED = {
    "gpt2": ("openai-community/gpt2", {"n_layer": 12, "n_head": 12, "n_embd": 768}),
    "gpt2-medium": ("openai-community/gpt2-medium", {"n_layer": 24, "n_head": 16, "n_embd": 1024}),
    "gpt2-large": ("openai-community/gpt2-large", {"n_layer": 36, "n_head": 20, "n_embd": 1280}),
    "gpt2-xl": ("openai-community/gpt2-xl", {"n_layer": 48, "n_head": 25, "n_embd": 1600}),
}
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
#: What a model needs of a repository. PyTorch files only where there is nothing else.
_SAFE_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
_TORCH_FILES = ("config.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin")
#: Tables of which a model may use the first rows only: architecture -> position table.
POSITION_TABLES = {"gpt2": "wpe.weight"}


def locate_initial(name: str) -> Path:
    """The files that ``init_from`` names, fetched from the hub where they are not here.

    Args:
        name: ``gpt2``, ``gpt2-medium``, ``gpt2-large``, ``gpt2-xl``; a run, one of its checkpoints, a folder or a file;
            else ORGANISATION/NAME on the hub.

    Raises:
        CheckpointError: there is no such thing, or the hub does not answer.
        MissingDependency: huggingface_hub is not installed.
    """
    path = Path(name)
    if name in PUBLISHED:
        return _from_hub(name, PUBLISHED[name][0])
    if path.is_file() and path.stat().st_size < 256:  # `best` and tags: a small file that names a step folder
        named = path.with_name(path.read_text(encoding="utf-8", errors="replace").strip() or "none")
        path = named if (named / MANIFEST).is_file() else path
    if path.exists():
        return path
    if _REPOSITORY.fullmatch(name):
        return _from_hub(name, name)
    raise CheckpointError(
        f"init_from {name}: there is nothing at that path. It takes scratch, resume, {', '.join(PUBLISHED)}, a run "
        f"folder or one of its checkpoints, a Hugging Face folder, a weights file (safetensors, ckpt.pt), or "
        f"ORGANISATION/NAME on the Hugging Face hub."
    )


def _from_hub(name: str, repository: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependency(
            f"init_from {name} comes from the Hugging Face hub, which needs a package: run `pip install "
            f"'zerofit[data]'`, or give the folder of a copy."
        ) from error
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(_SAFE_FILES)))
        if not any(folder.glob("*.safetensors")):
            folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(_TORCH_FILES)))
    except Exception as error:  # the library lets whatever its download raised through
        raise CheckpointError(
            f"init_from {name}: {repository} could not be fetched from the Hugging Face hub ({type(error).__name__}: "
            f"{str(error)[:200]}). Connect this machine to the network once, or download it elsewhere (`hf download "
            f"{repository}`) and give the folder: init_from: FOLDER."
        ) from error
    return folder


def published_model(name: str) -> ModelConfig | None:
    """The shape of one of the published sizes; known without its weights."""
    if name not in PUBLISHED:
        return None
    return GPT2Config(**PUBLISHED[name][1], block_size=1024, vocab_size=50_257)  # type: ignore[arg-type]


def told_model(path: Path) -> ModelConfig | None:
    """The shape that a checkpoint tells; None for a bare state dict. Reads no weights.

    Raises:
        CheckpointError: nothing readable.
    """
    state = _own_state(path)
    if state is not None:
        return TypeAdapter[ModelConfig](ModelConfig).validate_python(state["model"])
    from .foreign import open_foreign

    return open_foreign(path, None).model


def _own_state(path: Path) -> Mapping[str, Any] | None:
    """What the manifest of a run's newest checkpoint, or of a step folder, remembers; None for what is neither."""
    if (path / MANIFEST).is_file():
        return read_manifest(path).state
    run = path.parent if path.name == "checkpoints" else path
    if path.is_dir() and step_folders(run / "checkpoints"):
        return read_manifest(locate(run, "latest")).state
    return None


def open_initial(path: Path, model: ModelConfig, *, verified: bool = False) -> Source:
    """A checkpoint as weights of `model`: positions beyond ``block_size`` are cut, rows of padding may differ.

    Args:
        verified: a step folder's bytes have been checked already.

    Raises:
        CheckpointError: other weights, said in words.
    """
    from .source import open_source

    table = POSITION_TABLES.get(model.kind)
    own = _own_state(path)
    if own is not None:
        source = open_source(path, None, verified=verified)
        return _Fitted(source, model, _check_own(source, own, model, table))
    if table is None:
        return open_source(path, model)
    from .foreign import open_foreign

    positions = open_foreign(path, None).shapes().get(table, (0,))[0]
    wanted = model.parameter_shapes()[table][0]
    if not positions:
        return open_source(path, model)  # another architecture: said there
    _refuse_more_positions(path, positions, wanted)
    source = open_source(path, model.model_copy(update={"block_size": positions}))
    return _Fitted(source, model, (table,) if positions != wanted else ())


def _refuse_more_positions(path: Path, there: int, wanted: int) -> None:
    if wanted > there:
        raise CheckpointError(
            f"{path} has learned {there} positions, and model.block_size is {wanted}: positions can be cut and not be "
            f"added, since nothing was learned for more. Set model.block_size {there} or less."
        )


def _check_own(source: Source, state: Mapping[str, Any], model: ModelConfig, table: str | None) -> tuple[str, ...]:
    """Tensors of a run's checkpoint of which other rows are taken."""
    there, wanted = source.shapes(), model.parameter_shapes()
    fitted = []
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) == wanted.get(name):
            continue
        if name == table and name in there and name in wanted and there[name][1:] == wanted[name][1:]:
            _refuse_more_positions(source.folder, there[name][0], wanted[name][0])
        elif not _only_padding(name, state, model, there, wanted):
            raise CheckpointError(
                f"{source.folder} is of another model: {name} has the shape {there.get(name, 'absent')} there and "
                f"{wanted.get(name, 'absent')} in this configuration. Leave the model section out, and its shape is "
                f"taken from the weights."
            )
        fitted.append(name)
    return tuple(fitted)


def _only_padding(
    name: str,
    state: Mapping[str, Any],
    model: ModelConfig,
    there: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
) -> bool:
    """Whether a table of the vocabulary differs in rows that belong to no token."""
    if not isinstance(model, LanguageModelShape) or name not in there or name not in wanted:
        return False
    same_width = there[name][1:] == wanted[name][1:]
    return same_width and name == "wte.weight" and state["model"].get("vocab_size") == model.vocab_size


class _Fitted:
    """A source whose `names` have other rows than the model: the first ones are taken, those beyond are zeros."""

    def __init__(self, source: Source, model: ModelConfig, names: Sequence[str]) -> None:
        self.source, self.names = source, tuple(names)
        self.folder: Path = source.folder
        self.scalars: Scalars = source.scalars
        # The stored sample's loss is that of the whole weights.
        self.state: Mapping[str, Any] = {k: v for k, v in source.state.items() if k != "probe_loss" or not names}
        self._there = source.shapes()
        self._shapes = {**self._there, **{name: model.parameter_shapes()[name] for name in names}}

    @property
    def step(self) -> int | None:
        """See `source.Source`."""
        return self.source.step

    @property
    def notes(self) -> Sequence[str]:
        """See `source.Source`."""
        changes = [f"{n}: {self._there[n][0]} rows there, {self._shapes[n][0]} in the model." for n in self.names]
        return (*self.source.notes, *changes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `source.Source`."""
        return self._shapes

    def read(self, name: str, role: str, start: int, stop: int) -> Tensor | None:
        """See `source.Source`. Rows follow one another, so that the first ones are a prefix."""
        there = math.prod(self._there[name]) if name in self.names else stop
        if stop <= there:
            return self.source.read(name, role, start, stop)
        import torch

        out = torch.zeros(stop - start, dtype=torch.float32)
        if start < there:
            values = self.source.read(name, role, start, there)
            if values is None:
                return None
            out[: there - start] = values
        return out
