"""All the tokens that a run reads: one folder, a mixture of several, and other ones in other stages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.models import LanguageModelShape
from ..config.schema import Config, DataConfig
from ..config.stages import spans
from ..errors import DataError
from .metadata import read_meta
from .mixture import Mixture, Samples, Staged
from .prepare import is_prepared, prepare
from .tokens import SPLITS, check_data, describe_inferred, fingerprint, open_split, vocabulary_size

_NOT_A_WORD = re.compile(r"[^A-Za-z0-9_]+")


def all_data(config: Config) -> list[DataConfig]:
    """The run's own data, then what its stages have instead; each once."""
    found: list[DataConfig] = []
    assert isinstance(config.data, DataConfig)  # `Config` refuses other data for a model of text
    for data in (config.data, *(span.data for span in spans(config))):
        if data not in found:
            found.append(data)
    return found


def first_folder(data: DataConfig) -> Path:
    """A folder that tells the tokenizer: all of them have the same."""
    return next(iter(data.folders().values()))


def folders(everything: Sequence[DataConfig]) -> dict[Path, str]:
    """Folder -> its name in metrics, unique words; the empty one for a single folder of the run's own data.

    Args:
        everything: the run's own data first.
    """
    found: dict[Path, str] = {}
    for data in everything:
        for name, folder in data.folders().items():
            if folder in found:
                continue
            word = _NOT_A_WORD.sub("_", name or folder.name).strip("_") or "data"
            if not name and data is everything[0]:
                word = ""
            taken = set(found.values())
            found[folder] = next(w for w in (word, *(f"{word}_{n}" for n in range(2, 999))) if w not in taken)
    return found


def prepare_all(config: Config, say: Callable[[str], None], console: Any = None) -> None:
    """Prepare what is missing and says of what it is made.

    Raises:
        DataError: it cannot be made.
    """
    for data in all_data(config):
        for request in _requests(data):
            if request.prepare and not is_prepared(request.path):
                say(f"Preparing {', '.join(request.prepare)} …")
                say(prepare(request, console=console).describe())


def _requests(data: DataConfig) -> Iterator[DataConfig]:
    if not data.sources:
        yield data
    for name, folder in data.folders().items():
        if name:
            yield data.model_copy(update={"path": folder, "prepare": data.sources[name].prepare, "sources": {}})


def check_all(config: Config) -> list[str]:
    """Check every folder against the model; returns what was inferred about those without metadata.

    Raises:
        DataError: a source is missing, too short, beyond the vocabulary, or has another tokenizer than the others.
    """
    notes = []
    for data in all_data(config):
        _check_sources_exist(data)
    assert isinstance(config.model, LanguageModelShape)
    for folder in folders(all_data(config)):
        check_data(folder, config.model)
        notes += [said] if (said := describe_inferred(folder)) else []
    _check_same_tokenizer(list(folders(all_data(config))))
    return notes


def vocabulary_of(config: Config) -> int:
    """Tokens of the vocabulary: that of the largest source.

    Raises:
        DataError: a source is missing.
    """
    for data in all_data(config):
        _check_sources_exist(data)
    return max(vocabulary_size(folder) for folder in folders(all_data(config)))


def fingerprints(config: Config) -> dict[str, dict[str, Any]]:
    """Split, and of several folders NAME/SPLIT -> what tells other data."""
    found: dict[str, dict[str, Any]] = {}
    for folder, name in folders(all_data(config)).items():
        for split, value in fingerprint(folder).items():
            found[f"{name}/{split}" if name else split] = value
    return found


def open_data(data: DataConfig, split: str, model: LanguageModelShape, seed: int) -> Samples:
    """A split of one folder or of a mixture."""
    parts = [open_split(folder, split, model, seed) for folder in data.folders().values()]
    return Mixture(parts, [source.weight for source in data.sources.values()]) if data.sources else parts[0]


def open_training(config: Config, model: LanguageModelShape, global_batch: int) -> Samples:
    """The training samples of all stages; a stage begins with the first sample of its first step."""
    stages = spans(config)
    if len(stages) == 1:
        return open_data(stages[0].data, "train", model, config.seed)
    distinct = list({repr(span.data): span.data for span in stages}.values())
    parts = [open_data(data, "train", model, config.seed) for data in distinct]
    order = [distinct.index(span.data) for span in stages]
    return Staged(parts, order, [span.start * global_batch for span in stages])


def open_evaluation(everything: Sequence[DataConfig], model: LanguageModelShape, seed: int) -> Mapping[str, Samples]:
    """``train`` and ``val`` of the run's own data in its shares, and ``val/NAME`` of every source and stage alone.

    Args:
        everything: as for `folders`.
    """
    found = {split: open_data(everything[0], split, model, seed) for split in SPLITS}
    return found | {
        f"val/{name}": open_split(folder, "val", model, seed) for folder, name in folders(everything).items() if name
    }


def _check_sources_exist(data: DataConfig) -> None:
    for name, folder in data.folders().items():
        if name and not is_prepared(folder):
            beside = sorted(path.parent.name for path in data.path.glob("*/train.bin"))
            raise DataError(
                f"data.sources names {name}, and {folder} holds no train.bin and val.bin. A source is a folder of "
                f"tokens below data.path {data.path} (there are: {', '.join(beside) or 'none'}), or has a path of its "
                f"own: `{name}: {{weight: …, path: FOLDER}}`. Make it with `zerofit data prepare TEXT --out {folder}`."
            )


def _check_same_tokenizer(paths: list[Path]) -> None:
    """Folders that tell their tokenizer must tell the same one: a token would mean different things."""
    known = {path: told for path in paths if (told := _tokenizer_of(path)) is not None}
    if len(set(known.values())) > 1:
        first, other = next((a, b) for a in known for b in known if known[a] != known[b])
        raise DataError(
            f"{first} and {other} were made with different tokenizers or alphabets "
            f"({read_meta(first).get('tokenizer')} with {vocabulary_size(first)} tokens, "
            f"{read_meta(other).get('tokenizer')} with {vocabulary_size(other)}), so that a token means one thing here "
            f"and another there. Prepare them with the same --tokenizer (of char: from one corpus; gpt2 and bytes fit "
            f"every text)."
        )


def _tokenizer_of(folder: Path) -> str | None:
    meta = read_meta(folder)
    if meta.get("tokenizer") is None:
        return None
    file = folder / str(meta.get("tokenizer_file") or "")
    return repr((meta.get("characters"), file.read_text(encoding="utf-8")) if file.is_file() else
                (meta["tokenizer"], meta.get("characters")))  # fmt: skip
