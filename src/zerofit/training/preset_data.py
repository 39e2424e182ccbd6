"""A preset's corpus is for the preset's folder: it is not prepared, unasked, into one that somebody named."""

from __future__ import annotations

from pathlib import Path

from ..config.images import ImageDataConfig
from ..config.load import DEFAULT, ResolvedConfig
from ..config.schema import DataConfig
from ..data.images.store import is_prepared_images
from ..data.prepare import is_prepared
from ..data.prepare.files import file_of
from ..errors import DataError


def refuse_presets_data(resolved: ResolvedConfig) -> None:
    """Refuse to train on the preset's data where ``data.path`` names something else that is not prepared. Pictures may
    be prepared into a new folder: the preset names folders of the user's, not a corpus.

    Raises:
        DataError: names the commands that prepare what is there.
    """
    data, origins = resolved.config.data, resolved.origins
    named, supposed = (origins.get(key, DEFAULT) for key in ("data.path", "data.prepare"))
    if not data.prepare or not supposed.startswith("preset ") or named == DEFAULT or named.startswith("preset "):
        return
    try:
        _refuse(data, named, supposed)
    except PermissionError as error:
        raise DataError(
            f"{named}: data.path {data.path} cannot be read ({error.strerror}: {error.filename}). Let this user read "
            f"it, or name another folder."
        ) from None


def _refuse(data: DataConfig | ImageDataConfig, named: str, supposed: str) -> None:
    if is_prepared_images(data.path):  # where tokens are wanted, that is said when they are looked for
        return
    if isinstance(data, DataConfig):
        if not data.sources and not is_prepared(data.path):
            raise DataError(_about_text(data, named, supposed))
    elif data.path.exists() and _holds_something(data.path):
        raise DataError(
            f"{named}: data.path {data.path} holds no prepared pictures, and what the {supposed} prepares "
            f"({', '.join(data.prepare)}) is not put beside what lies there. Prepare the pictures with `zerofit data "
            f"prepare images {data.path} --out {_target(data.path)}` and train with --data.path {_target(data.path)}."
        )


def _about_text(data: DataConfig, named: str, supposed: str) -> str:
    texts, found = _texts(data.path)
    corpus = " ".join(data.prepare)
    return (
        f"{named}: data.path {data.path} {found}, so there are no tokens to train on (train.bin and val.bin), and the "
        f"corpus of the {supposed} ({corpus}) is not put there unasked. Prepare your text with `zerofit data prepare "
        f"{texts} --tokenizer {data.tokenizer} --out {_target(data.path)}` and train with --data.path "
        f"{_target(data.path)}; for the preset's corpus leave data.path out, or add --data.prepare {corpus}."
    )


def _texts(folder: Path) -> tuple[str, str]:
    """What to name as text, and what lies there, in words."""
    if not folder.exists():
        return "TEXT", "does not exist"
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else [folder]
    texts = [path for path in files if file_of(path) is not None]
    if not texts:
        return "TEXT", "is empty" if not files else "holds neither tokens nor text files"
    if folder.is_file():
        return str(folder), "is a file"
    count = "a text file that is" if len(texts) == 1 else f"{len(texts):,} text files that are"
    return str(folder), f"holds {count} not prepared"


def _target(path: Path) -> Path:
    """Where prepared data goes: there, or beside what is there already."""
    if not path.exists() or not _holds_something(path):
        return path
    named = path if path.name not in ("", "..") else path.resolve()  # . and .. have no name of their own
    if not named.name:
        return Path("prepared")
    return named.with_name(f"{named.name.split('.')[0] or named.name}-prepared")


def _holds_something(path: Path) -> bool:
    return path.is_file() or any(path.iterdir())
