"""What a save allocates beside the states: low-bit ones are decoded, a piece at a time. Pure.

Mirrors `engines.decoding`, and `checkpoint.blocks`, which lets go of a piece when the next one has come. So two pieces
are there at once, and while signed 8-bit codes are decoded as much for their magnitudes: 3 x 16 MiB with 8 bits, 2 x 16
with bf16. On a GPU pieces come from the stream of the copies, whose memory no other stream uses again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .memory_fsdp import busiest_rank, shard_groups
from .optimizer_states import BLOCK, MEANS, flat_elements, planned_groups
from .plan import Plan
from .timeline import SAVE, Ledger

#: `kernels.optimizer_step.DECODED_ELEMENTS`: elements that are decoded at a time.
DECODED_ELEMENTS = 1 << 22
#: Means whose codes have no sign: `kernels.optimizer_step.Rule.signed_moments`.
UNSIGNED = ("exp_avg_sq",)


@dataclass(frozen=True)
class _State:
    """A flat state as it is saved.

    Attributes:
        start, stop, elements: the rank's interval, of so many.
        kind: ``fp32``, ``bf16`` or ``8bit``.
        signed: its codes have a sign.
    """

    start: int
    stop: int
    elements: int
    kind: str
    signed: bool


def decodes(plan: Plan) -> bool:
    """Whether a save decodes anything."""
    return plan.optimizer.master == "bf16" or (plan.optimizer.state != "fp32" and bool(MEANS[plan.optimizer.kind]))


def play_save(plan: Plan, ledger: Ledger) -> None:
    """One save of a plan with low-bit states: a phase of its own."""
    ledger.begin("save")
    held = None
    for number, (length, magnitudes) in enumerate(_pieces(plan)):
        if length:
            ledger.alloc(("decoded", number), 4 * length, "decoded states", SAVE)
        if magnitudes:
            ledger.temporary(4 * length, "decoded states", SAVE)
        if held is not None:
            ledger.free(held)
        held = ("decoded", number) if length else None
    if held is not None:
        ledger.free(held)


def _pieces(plan: Plan) -> Iterator[tuple[int, bool]]:
    """Elements of each piece in order (0: a state of which views are saved), and whether its decoding takes as much
    again."""
    for state in _states(plan):
        at = state.start
        if state.kind == "fp32" and at < state.stop:
            yield 0, False
            continue
        while at < state.stop:
            high = min(at + DECODED_ELEMENTS, state.elements)
            whole = BLOCK * (-(-high // BLOCK) - at // BLOCK) if state.kind == "8bit" else high - at
            yield whole, state.kind == "8bit" and state.signed
            at = high


def _states(plan: Plan) -> Iterator[_State]:
    """Of the rank that `memory` predicts, in the order in which engines save them."""
    optimizer, n = plan.optimizer, plan.world_size
    rank = busiest_rank(plan) if plan.strategy == "fsdp2" else n - 1
    groups = shard_groups(plan, rank) if plan.strategy == "fsdp2" else planned_groups(plan)
    for group in groups:
        elements = flat_elements(optimizer, group)
        start, stop = 0, elements
        if plan.strategy.startswith("zero"):
            stop = elements = -(-elements // n)
        elif plan.strategy != "fsdp2":
            start = elements * rank // n
        yield _State(start, stop, elements, optimizer.master, True)
        for role in MEANS[group.kind]:
            yield _State(start, stop, elements, optimizer.state, role not in UNSIGNED)
        if optimizer.ema_decay is not None:
            yield _State(start, stop, elements, "fp32", True)
