"""Checkpoints of other programs, read interval by interval under zerofit's names.

How the kind is told, by what lies there and never by a flag:

==========================================  =======================================================================
found                                       read as
==========================================  =======================================================================
a folder with ``*_model_states.pt``, or     DeepSpeed, stage 0 to 3 (`zero_folder`)
``latest`` that names one, or one below
a folder with ``model.safetensors``,        Hugging Face (`huggingface_folder`)
``pytorch_model.bin`` or an index of these
a file that starts with a length and ``{``  safetensors (`single_files`)
any other file, with ``model_args`` and     nanoGPT's ``ckpt.pt`` (`single_files`)
``iter_num`` in it
any other file                              a state dict, at its top level or under ``module``, ``state_dict``,
                                            ``model`` or ``model_state_dict`` (`single_files`)
a folder with a single weights file         that file
==========================================  =======================================================================

Nothing that a file names is ever run: see `stand_ins`.
"""

from __future__ import annotations

from pathlib import Path

from ...config.models import ModelConfig
from ...errors import CheckpointError
from .contents import Contents
from .huggingface_folder import is_huggingface_folder, read_config, read_huggingface_folder
from .resolve import Foreign, resolve
from .single_files import is_safetensors, read_safetensors, read_torch_file
from .zero_folder import find_tag_folder, read_zero_folder

__all__ = ["Foreign", "open_foreign"]

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def open_foreign(path: Path, model: ModelConfig | None = None) -> Foreign:
    """Open a checkpoint that another program wrote. Reads its index and no weights, ties aside.

    Args:
        path: a folder or a file; the kind is told by its content (see this package's docstring).
        model: the shape to verify against; None takes what the source tells.

    Raises:
        CheckpointError: nothing to read there, a file that is torn or names code, or another model.
    """
    contents = _read_folder(path) if path.is_dir() else _read_file(path)
    return resolve(contents, model)


def _read_folder(folder: Path) -> Contents:
    tag_folder = find_tag_folder(folder)
    if tag_folder is not None:
        contents = read_zero_folder(tag_folder)
        # Trainers put the model's config beside DeepSpeed's files.
        contents.descriptions += [read_config(place) for place in (folder, tag_folder, tag_folder.parent)]
        return contents
    if is_huggingface_folder(folder):
        return read_huggingface_folder(folder)
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(files) == 1:
        return _read_file(files[0])
    raise CheckpointError(
        f"{folder} is no checkpoint that zerofit knows: a DeepSpeed folder holds `latest` or *_model_states.pt, a "
        f"Hugging Face folder model.safetensors or pytorch_model.bin"
        + (f". It holds {len(files)} weights files: name one of them." if files else "; it holds neither.")
    )


def _read_file(path: Path) -> Contents:
    if not path.is_file():
        raise CheckpointError(f"No file or folder {path}. Give a checkpoint's folder, or a weights file.")
    if path.name.endswith(("_model_states.pt", "_optim_states.pt")):
        return read_zero_folder(path.parent)  # one rank's share: the others lie beside it
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty. Copy it again from where it was written.")
    return read_safetensors(path) if is_safetensors(path) else read_torch_file(path)
