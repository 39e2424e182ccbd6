"""The seam of generation: a model that goes on from a state instead of reading its whole text again.

A Transformer's state is its keys and values, which grow with the text; a recurrent model's (Mamba) is of constant size.
An architecture that has one names its class in `models.STEPPERS`; one that has none is generated from with its forward
pass alone.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Stepper(Protocol):
    """Wraps one built model, in evaluation mode, on one device; not for sharded models."""

    @property
    def context_length(self) -> int | None:
        """Tokens that a state can hold at most; None when there is no limit (a recurrent model)."""

    def initial_state(self, batch: int) -> Any:
        """The state of `batch` rows that have read nothing, on the model's device."""

    def step(self, tokens: Tensor, state: Any, padding: Tensor | None = None) -> tuple[Tensor, Any]:
        """Read some tokens on top of the state.

        Args:
            tokens: (B, T) int64 on the model's device; T of any size in a state's first call (the prompts), 1 after.
            state: from `initial_state` or from the last call, which may be changed in place.
            padding: (B,) int64: so many leading tokens of each row are none, and must leave no trace in that row's
                state or logits (a recurrent model keeps the state as it was). In a state's first call only; None: no
                row has any.

        Returns:
            Logits (B, V) of the token that follows the last one, and the new state.
        """
