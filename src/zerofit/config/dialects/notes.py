"""What became of a key of another tool."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from ..documents import Entry

#: ``used``: the same setting under zerofit's name. ``translated``: the nearest setting, see the remark. ``auto``: left
#: to the rest of the configuration and to the plan. ``ignored``: nothing depends on it here, and why. ``overridden``:
#: another layer says otherwise. ``removed``: DeepSpeed 0.19 has it no more, and what takes its place.
Outcome = Literal["used", "translated", "auto", "ignored", "overridden", "removed"]


@dataclass(frozen=True)
class Note:
    """One line of the table.

    Attributes:
        key: as it stands there, dotted.
        value: as it stands there.
        origin: ``FILE:LINE`` or ``command line``.
        outcome: see `Outcome`.
        targets: zerofit's keys that it became; empty where there is none.
        remark: what to know about it; empty where the target says all.
        values: what it gives to each of `targets`; empty where it gives nothing.
    """

    key: str
    value: object
    origin: str
    outcome: Outcome
    targets: tuple[str, ...] = ()
    remark: str = ""
    values: tuple[object, ...] = ()


@dataclass
class Reading:
    """What a foreign document says, in zerofit's keys.

    Attributes:
        entries: settings that it states.
        defaults: settings that the other tool takes when its document is silent; anything else wins over them.
        notes: one for each of its keys.
    """

    entries: list[Entry] = field(default_factory=list)
    defaults: list[Entry] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def add(self, other: Reading) -> None:
        """Append what `other` says."""
        self.entries += other.entries
        self.defaults += other.defaults
        self.notes += other.notes


def translated(
    entry: Entry, targets: Iterable[tuple[str, object]], remark: str = "", outcome: Outcome | None = None
) -> Reading:
    """`entry` as the settings `targets`; ``used`` when it is one setting with the same value and nothing to remark."""
    settings = [Entry(name, value, entry.origin) for name, value in targets]
    same = len(settings) == 1 and settings[0].value == entry.value and not remark
    note = Note(
        entry.name,
        entry.value,
        entry.origin,
        outcome or ("used" if same else "translated"),
        tuple(setting.name for setting in settings),
        remark,
        tuple(setting.value for setting in settings),
    )
    return Reading(entries=settings, notes=[note])


def noted(entry: Entry, outcome: Outcome, remark: str, *targets: str) -> Reading:
    """`entry` without any setting."""
    return Reading(notes=[Note(entry.name, entry.value, entry.origin, outcome, targets, remark)])
