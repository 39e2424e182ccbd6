"""Documents in pieces of bounded size, and what is counted on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

#: Longest piece, in characters; a longer document is tokenised in several.
PIECE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Some text of a document; `starts` and `ends` say whether the document does there."""

    text: str
    starts: bool = True
    ends: bool = True


@dataclass
class Tally:
    """What was read so far.

    Attributes:
        documents: that have text.
        empty: documents without text, which were skipped.
        characters: of text.
        replaced: replacement characters in text that was read with ``errors="replace"``.
        long: documents that were tokenised in more than one piece.
        cut_words: cuts inside a long document that found no white space to cut at.
        read_bytes: of the files, as they lie on the disk.
    """

    documents: int = 0
    empty: int = 0
    characters: int = 0
    replaced: int = 0
    long: int = 0
    cut_words: int = 0
    read_bytes: int = 0

    def notes(self) -> list[str]:
        """What people should hear, in sentences."""
        found = []
        if self.empty:
            found.append(f"{self.empty:,} empty documents were skipped.")
        if self.replaced:
            found.append(f"{self.replaced:,} characters that were not valid UTF-8 were replaced by U+FFFD.")
        if self.cut_words:
            found.append(
                f"{self.cut_words:,} cuts inside a word: documents are tokenised in pieces of at most "
                f"{PIECE_CHARACTERS:,} characters, which end before white space where there is some. There was none."
            )
        return found


def cut(text: str, tally: Tally) -> Iterator[Piece]:
    """A document in pieces."""
    starts = True
    while len(text) > PIECE_CHARACTERS:
        at = cut_position(text, tally)
        yield Piece(text[:at], starts, False)
        tally.long += starts
        text, starts = text[at:], False
    yield Piece(text, starts, True)


def cut_position(text: str, tally: Tally) -> int:
    """Where to cut a text that is longer than a piece: before the last white space that follows something else.

    GPT-2's encoding never joins text across such a place, so the tokens are those of the whole text; byte and
    character tokens are in any case. Line ends are preferred; in text without any white space the piece is full.
    """
    half = PIECE_CHARACTERS // 2
    for space in ("\n", " "):
        found = text.rfind(space, half, PIECE_CHARACTERS)
        while found > half and text[found - 1].isspace():
            found -= 1
        if found > half:
            return found
    tally.cut_words += 1
    return PIECE_CHARACTERS
