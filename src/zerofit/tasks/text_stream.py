"""From a stream of tokens to text that can be shown: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: What decoders put in place of an unfinished character; UTF-8 characters have at most four bytes, so at most as many
#: tokens.
_UNFINISHED = "\ufffd"
_LONGEST_CHARACTER = 4


class TextStream:
    """The text of one row as its tokens arrive.

    Args:
        decode: token ids -> text.
        stops: the text ends before the first of these that appears.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._context = self._read = 0  # ids before `_read` are decoded; those from `_context` on are their context
        self._held = ""
        self.text = ""
        self.stopped = False

    @property
    def tokens(self) -> int:
        """Tokens taken in."""
        return len(self._ids)

    def push(self, token: int) -> str:
        """Take in a token; returns text that is now sure, to be shown."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._release(self._new_text(flush=False), flush=False)

    def finish(self) -> str:
        """The rest, when no token follows."""
        return "" if self.stopped else self._release(self._new_text(flush=True), flush=True)

    def _new_text(self, flush: bool) -> str:
        """What the last tokens add. Decoded behind some context, because tokens may join (a space, an accent)."""
        before = self._decode(self._ids[self._context : self._read])
        after = self._decode(self._ids[self._context :])
        pending = len(self._ids) - self._read
        if after.endswith(_UNFINISHED) and not flush and pending < _LONGEST_CHARACTER:
            return ""
        if not after[len(before) :] and not flush:
            return ""
        self._context, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _release(self, new: str, flush: bool) -> str:
        self._held += new
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            shown, self._held, self.stopped = self._held[: min(found)], "", True
        else:
            keep = 0 if flush else self._possible_stop()
            shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += shown
        return shown

    def _possible_stop(self) -> int:
        """Characters at the end that may turn out to be the start of a stop text."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
