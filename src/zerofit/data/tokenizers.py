"""Text to token ids and back: characters of a corpus, or GPT-2's byte-pair encoding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, MissingDependency
from .tokens import read_meta

GPT2_VOCABULARY = 50_257
GPT2_END_OF_TEXT = 50_256


class Tokenizer(Protocol):
    """Encodes text. ``name`` is what configurations say; ``end_of_text`` separates documents (None: nothing does)."""

    name: str
    vocab_size: int
    end_of_text: int | None

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Token ids of `text`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; an id outside the vocabulary becomes the replacement character."""

    def describe(self) -> dict[str, Any]:
        """JSON from which `load_tokenizer` makes the same tokenizer."""


class CharTokenizer:
    """One token a character; ids follow the characters' code points."""

    name: str = "char"
    end_of_text: int | None = None

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = sorted(set(characters))
        self.vocab_size = len(self.characters)
        self._code_points = np.array([ord(c) for c in self.characters], dtype=np.uint32)

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Token ids of `text`.

        Raises:
            DataError: a character that the corpus did not hold.
        """
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = np.searchsorted(self._code_points, points).astype(np.uint32)
        unknown = (ids >= self.vocab_size) | (self._code_points[np.minimum(ids, self.vocab_size - 1)] != points)
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
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._encoding.decode([i for i in ids if i < GPT2_VOCABULARY])
        return text

    def describe(self) -> dict[str, Any]:
        return {"tokenizer": self.name}


def make_tokenizer(name: str, characters: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer of a name; `characters` is the corpus's alphabet, for ``char``."""
    return GPT2Tokenizer() if name == "gpt2" else CharTokenizer(characters)


def tokenizer_from_meta(meta: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that ``meta.json`` describes; None when it describes none."""
    if meta.get("tokenizer") == "gpt2":
        return GPT2Tokenizer()
    if meta.get("tokenizer") == "char":
        return CharTokenizer(meta["characters"])
    return None


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a prepared folder; None for a folder without ``meta.json``."""
    return tokenizer_from_meta(read_meta(folder))
