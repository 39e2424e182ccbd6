"""Text to token ids and back: characters, bytes, GPT-2's byte-pair encoding, any Hugging Face tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, MissingDependency
from .metadata import read_meta

GPT2_VOCABULARY = 50_257
GPT2_END_OF_TEXT = 50_256
#: A Hugging Face tokenizer's own file, also the name of its copy in a prepared folder.
TOKENIZER_FILE = "tokenizer.json"
#: Tokens that end a text, in tokenizers that do not say which one does.
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
CODE_POINTS = 0x110000
_UNKNOWN = np.uint32(0xFFFFFFFF)


class Tokenizer(Protocol):
    """Encodes text. ``name`` is what configurations say; ``end_of_text`` separates documents (None: nothing does)."""

    name: str
    vocab_size: int
    end_of_text: int | None

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Token ids of `text`. Text that looks like a special token is text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; an id outside the vocabulary becomes the replacement character."""

    def describe(self) -> dict[str, Any]:
        """JSON from which `load_tokenizer` makes the same tokenizer."""


class CharTokenizer:
    """One token a character; ids are positions in `characters`."""

    name: str = "char"
    end_of_text: int | None = None

    def __init__(self, characters: Sequence[str]) -> None:
        self.characters = list(characters)
        self.vocab_size = len(self.characters)

    @staticmethod
    def of_text(characters: Iterable[str]) -> CharTokenizer:
        """The tokenizer of an alphabet; ids follow the characters' code points, as nanoGPT's do."""
        return CharTokenizer(sorted(set(characters)))

    @cached_property
    def _ids(self) -> NDArray[np.uint32]:
        """Code point -> id."""
        table = np.full(CODE_POINTS, _UNKNOWN, dtype=np.uint32)
        table[[ord(c) for c in self.characters]] = np.arange(self.vocab_size, dtype=np.uint32)
        return table

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Token ids of `text`.

        Raises:
            DataError: a character that the corpus did not hold.
        """
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids: NDArray[np.uint32] = self._ids[points]
        unknown = ids == _UNKNOWN
        if unknown.any():
            found = "".join(sorted({chr(p) for p in points[unknown].tolist()}))[:20]
            raise DataError(
                f"The text holds characters that the vocabulary of {self.vocab_size} lacks: {found!r}. A character "
                f"vocabulary is fixed when its corpus is prepared; leave them out, or prepare a corpus that has them."
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.characters[i] if 0 <= i < self.vocab_size else "\ufffd" for i in ids)

    def describe(self) -> dict[str, Any]:
        return {"tokenizer": self.name, "characters": "".join(self.characters)}


class ByteTokenizer:
    """One token a byte of UTF-8 (ids 0 to 255), and 256 between documents."""

    name: str = "bytes"
    vocab_size: int = 257
    end_of_text: int | None = 256

    def encode(self, text: str) -> NDArray[np.uint32]:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def describe(self) -> dict[str, Any]:
        return {"tokenizer": self.name}


class GPT2Tokenizer:
    """GPT-2's byte-level byte-pair encoding, through tiktoken."""

    name: str = "gpt2"
    vocab_size: int = GPT2_VOCABULARY
    end_of_text: int | None = GPT2_END_OF_TEXT

    @cached_property
    def _encoding(self) -> Any:
        try:
            import tiktoken
        except ImportError as error:
            raise MissingDependency("The gpt2 tokenizer needs tiktoken: run `pip install tiktoken`.") from error
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken lets whatever its download raised through
            raise DataError(
                f"tiktoken could not get the files of the gpt2 encoding ({type(error).__name__}). It downloads them "
                f"once: connect this machine to the network, or copy them from another machine into a folder and name "
                f"it in TIKTOKEN_CACHE_DIR. Or use the tokenizer char."
            ) from error

    def encode(self, text: str) -> NDArray[np.uint32]:
        encoding = self._encoding
        if hasattr(encoding, "encode_to_numpy"):  # no list in between: nearly twice as fast
            ids: NDArray[np.uint32] = encoding.encode_to_numpy(text, disallowed_special=())
            return ids
        return np.array(encoding.encode_ordinary(text), dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._encoding.decode([i for i in ids if i < GPT2_VOCABULARY])
        return text

    def describe(self) -> dict[str, Any]:
        return {"tokenizer": self.name}


class HuggingFaceTokenizer:
    """Any tokenizer of the ``tokenizers`` library, from the content of its ``tokenizer.json``.

    Args:
        name: what configurations say: a name on the hub, a folder or a file.
        definition: the content of ``tokenizer.json``.
        end_of_text: the token that ends a text, as ``tokenizer_config.json`` names it; None looks for a usual one.
    """

    def __init__(self, name: str, definition: str, end_of_text: str | None = None) -> None:
        self.name, self.definition, self._end_name = name, definition, end_of_text
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        names = (end_of_text,) if end_of_text else END_OF_TEXT_NAMES
        self.end_of_text: int | None = next((vocabulary[name] for name in names if name in vocabulary), None)

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = _tokenizers(self.name).Tokenizer.from_str(self.definition)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # "</s>" in a text is five characters, not the end of it
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_tokenizer"}

    def encode(self, text: str) -> NDArray[np.uint32]:
        tokenizer = self._tokenizer
        if hasattr(tokenizer, "encode_batch_fast"):  # keeps no offsets: a quarter faster
            return np.array(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.uint32)
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        kept = [i for i in ids if i < self.vocab_size]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False)
        return text

    def describe(self) -> dict[str, Any]:
        return {"tokenizer": self.name, "tokenizer_file": TOKENIZER_FILE, "end_of_text": self._end_name}


def _tokenizers(name: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingDependency(
            f"The tokenizer {name!r} needs the tokenizers library: run `pip install 'zerofit[hf]'`. char, bytes and "
            f"gpt2 do without."
        ) from error
    return tokenizers


def find_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer of a name, a folder or a ``tokenizer.json``; None for ``char``, whose alphabet its corpus tells.

    Raises:
        DataError: there is no such tokenizer, or it cannot be read.
    """
    if name == "char":
        return None
    if name == "bytes":
        return ByteTokenizer()
    if name == "gpt2":
        return GPT2Tokenizer()
    path = Path(name)
    if path.is_dir() and (path / TOKENIZER_FILE).is_file():
        return _from_file(name, path / TOKENIZER_FILE)
    if path.is_file():
        return _from_file(name, path)
    if path.exists() or name.endswith(".json") or name.startswith((".", "/", "~")):
        raise DataError(
            f"The tokenizer {name!r} is no file, and no folder with a {TOKENIZER_FILE}. Tokenizers are char, bytes, "
            f"gpt2, a {TOKENIZER_FILE}, a folder that holds one, or a name on the Hugging Face hub."
        )
    return _from_hub(name)


def _from_file(name: str, file: Path, end_of_text: str | None = None) -> Tokenizer:
    try:
        definition = file.read_text(encoding="utf-8")
        return HuggingFaceTokenizer(name, definition, end_of_text or _end_beside(file))
    except MissingDependency:
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(
            f"{file} cannot be read as a tokenizer ({str(error)[:200]}). It must be the {TOKENIZER_FILE} that the "
            f"tokenizers library writes; a folder of the older kind (vocab.json, merges.txt) is converted by "
            f"transformers' save_pretrained."
        ) from error


def _end_beside(file: Path) -> str | None:
    """``eos_token`` of the ``tokenizer_config.json`` in the same folder."""
    try:
        found = json.loads(file.with_name("tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    found = found.get("content") if isinstance(found, dict) else found
    return found if isinstance(found, str) else None


def _from_hub(name: str) -> Tokenizer:
    library = _tokenizers(name)
    try:
        return HuggingFaceTokenizer(name, library.Tokenizer.from_pretrained(name).to_str())
    except Exception as error:  # the library lets whatever its download raised through
        raise DataError(
            f"There is no tokenizer {name!r} here, and the Hugging Face hub gave none "
            f"({type(error).__name__}: {str(error)[:200]}). Tokenizers are char, bytes, gpt2, a {TOKENIZER_FILE} or a "
            f"folder that holds one; copy it from a machine with network and name the file."
        ) from error


def tokenizer_from_meta(meta: Mapping[str, Any], folder: Path | None = None) -> Tokenizer | None:
    """The tokenizer that a prepared folder's metadata describes; None when it describes none.

    Args:
        folder: the prepared folder, which keeps a copy of a Hugging Face tokenizer's file.
    """
    name = meta.get("tokenizer")
    if name == "gpt2":
        return GPT2Tokenizer()
    if name == "bytes":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer(meta["characters"])
    if name is not None and meta.get("tokenizer_file") and folder is not None:
        return _from_file(name, folder / TOKENIZER_FILE, meta.get("end_of_text"))
    return None


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a prepared folder; None for a folder that does not tell it."""
    return tokenizer_from_meta(read_meta(folder), folder)
