"""What one micro-step of a model allocates and frees, as data: traced at a small size, composed at any. Pure.

A traced step is cut into segments: in the forward pass what comes before the blocks (position 0), each block (1 to L)
and what comes after them (L + 1); in the backward pass the same from L + 1 down to 0. Blocks are alike, so that three
of them (first, middle, last) stand for any number, and sizes are linear in the batch.

A segment is a list of events:

``["+", id, slope, offset, item]``
    ``slope * samples + offset`` bytes are allocated. Ids count within a segment; 0 is the block's output in a forward
    segment and the gradient of the block's input in a backward segment, so that blocks of different kinds join.
``["-", pass, anchor, value, id]``
    Freed. ``pass`` 0 forward, 1 backward. ``anchor`` 0: position 0; 1: position L + 1; 2: ``value`` positions away.
``["g", pass, anchor, value, id, parameter]``
    The allocation holds the finished gradient of a parameter (``@`` stands for the block's name).
``["m", when, parameters]``
    A module that owns parameters begins (``f+``) or ends (``f-``) its forward pass, or its backward pass (``b+ b-``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

#: Any change of what a trace holds or means.
FORMAT = 1
Event = list[Any]
FORWARD, BACKWARD = 0, 1


class Alloc(NamedTuple):
    """`size_bytes` under `item` are allocated as `key`."""

    key: Any
    size_bytes: int
    item: str


class Free(NamedTuple):
    key: Any


class Gradient(NamedTuple):
    """`key` holds the finished gradient of `parameter`; its `Free` follows, unless the engine keeps it."""

    key: Any
    parameter: str


class ModuleEvent(NamedTuple):
    """``f+ f- b+ b-`` of a module that owns `parameters`."""

    when: str
    parameters: tuple[str, ...]


class BlockEvent(NamedTuple):
    """``f+ f- b+ b-`` of the block `name`; of the whole model with an empty name."""

    when: str
    name: str


class Backward(NamedTuple):
    """The backward pass begins."""


StepEvent = Alloc | Free | Gradient | ModuleEvent | BlockEvent | Backward


@dataclass(frozen=True)
class Template:
    """One kind of blocks (plain or recomputed), traced at `depth` blocks.

    Attributes:
        forward, backward: position -> events, positions 0 to ``depth + 1``.
        inputs: (slope, offset) of each input tensor's bytes.
        block_name: name of block ``{}`` within the model, or the names of all blocks with ``|`` between; see `name_of`.
    """

    depth: int
    forward: Sequence[Sequence[Event]]
    backward: Sequence[Sequence[Event]]
    inputs: Sequence[tuple[int, int]]
    block_name: str

    def json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "depth": self.depth,
            "forward": self.forward,
            "backward": self.backward,
            "inputs": self.inputs,
            "block_name": self.block_name,
        }

    def segment(self, which: int, position: int, depth: int) -> Sequence[Event]:
        """The events of a position of a model with `depth` blocks."""
        segments = (self.forward, self.backward)[which]
        if depth == self.depth:
            return segments[position]
        if position >= depth:
            return segments[self.depth + position - depth]
        return segments[min(position, 2)]


def compose(plain: Template, recomputed: Template | None, depth: int, every: int, samples: int) -> Iterator[StepEvent]:
    """One micro-step of `depth` blocks at `samples` samples, every `every`-th block recomputed (0: none).

    Keys of allocations are ``(pass, position, id)``.
    """
    return _freed_once(_composed(plain, recomputed, depth, every, samples))


def _freed_once(events: Iterator[StepEvent]) -> Iterator[StepEvent]:
    """Where kinds of blocks are mixed, several may believe that they are the last to need what comes before the blocks
    (rotary positions, a mask), or none: the last one is right, and the end of the step."""
    listed = list(events)
    last = {event.key: index for index, event in enumerate(listed) if isinstance(event, Free)}
    forgotten = [event.key for event in listed if isinstance(event, Alloc) and event.key not in last]
    yield from (event for index, event in enumerate(listed) if not isinstance(event, Free) or last[event.key] == index)
    yield from (Free(key) for key in forgotten if key[1] == 0)


def _composed(
    plain: Template, recomputed: Template | None, depth: int, every: int, samples: int
) -> Iterator[StepEvent]:
    def kind(position: int) -> Template:
        if every == 1 and recomputed is not None:
            return recomputed
        if every and recomputed is not None and 1 <= position <= depth and (position - 1) % every == 0:
            return recomputed
        return plain

    for which, order in ((FORWARD, range(depth + 2)), (BACKWARD, range(depth + 1, -1, -1))):
        if which == BACKWARD:
            yield Backward()
        letter = "fb"[which]
        yield BlockEvent(f"{letter}+", "")
        for position in order:
            template = kind(position)
            name = name_of(template.block_name, position) if 1 <= position <= depth else None
            if name is not None:
                yield BlockEvent(f"{letter}+", name)
            events = template.segment(which, position, depth)
            yield from _placed(events, which, position, depth, template.block_name, samples)
            if name is not None:
                yield BlockEvent(f"{letter}-", name)
        yield BlockEvent(f"{letter}-", "")


def name_of(block_name: str, position: int) -> str:
    """Name of the block at a position (the first has 1); of a position outside the blocks one that nothing has."""
    names = block_name.split("|")
    if len(names) == 1:
        return block_name.format(position - 1)
    return names[position - 1] if 1 <= position <= len(names) else "|"


def _placed(
    events: Sequence[Event], which: int, position: int, depth: int, block_name: str, samples: int
) -> Iterator[StepEvent]:
    name = name_of(block_name, position)

    def key(where: int, anchor: int, value: int, number: int) -> tuple[int, int, int]:
        return where, (0, depth + 1, position + value)[anchor], number

    for event in events:
        tag = event[0]
        if tag == "+":
            yield Alloc((which, position, event[1]), event[2] * samples + event[3], event[4])
        elif tag == "-":
            yield Free(key(*event[1:5]))
        elif tag == "g":
            yield Gradient(key(*event[1:5]), event[5].replace("@", name))
        else:
            yield ModuleEvent(event[1], tuple(parameter.replace("@", name) for parameter in event[2]))


def from_json(data: Mapping[str, Any]) -> Template:
    """The template that `Template.json` wrote."""
    inputs = [(slope, offset) for slope, offset in data["inputs"]]
    return Template(data["depth"], data["forward"], data["backward"], inputs, data["block_name"])
