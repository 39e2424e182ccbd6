"""What a format reader found, under the file's own names and before any architecture has looked at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .sources import Source

PARAMETER = "parameter"
MOMENTS = ("exp_avg", "exp_avg_sq")
ROLES = (PARAMETER, *MOMENTS)

#: Keys under which scripts store how far they came, the most trustworthy first.
STEP_KEYS = ("global_steps", "global_step", "iter_num", "iteration", "step", "steps")
EPOCH_KEYS = ("epoch", "current_epoch", "epochs_done")
#: Keys under which scripts store the lowest validation loss.
BEST_LOSS_KEYS = ("best_val_loss", "best_loss", "best_eval_loss", "best_validation_loss", "min_val_loss")
BEST_STEP_KEYS = ("best_step", "best_iter", "best_global_step")
METRIC_KEYS = ("val_loss", "train_loss", "eval_loss", "loss")
#: Keys under which scripts store the shape of a GPT; the values have nanoGPT's or Hugging Face's names.
SHAPE_KEYS = ("model_args", "model_config", "gpt_config", "config", "model")


@dataclass
class Contents:
    """One foreign checkpoint.

    Attributes:
        what: its kind in a few words, for messages.
        folder: where it lies; for a single file, the file.
        tensors: role -> the file's own name -> source. Parameters are fp32 masters where there are some.
        step: optimizer steps attempted when it was written.
        scalars: as `types.Scalars`.
        state: JSON-ready; keys as in `checkpoint.store.Saved`.
        descriptions: dictionaries in the file that may tell the model's shape, with their own keys.
        notes: one sentence for each thing that was carried over or was absent.
    """

    what: str
    folder: Path
    tensors: dict[str, dict[str, Source]] = field(default_factory=lambda: {role: {} for role in ROLES})
    step: int | None = None
    scalars: dict[str, float] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    descriptions: list[Mapping[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, sentence: str) -> None:
        """Remember a sentence for people."""
        self.notes.append(sentence)

    def describe_model(self, client_state: Mapping[str, Any]) -> None:
        """Remember what of a script's own state may tell the model's shape."""
        found = [value for key in SHAPE_KEYS if isinstance(value := client_state.get(key), Mapping)]
        self.descriptions += [*found, client_state]

    def carry_progress(self, *places: Mapping[str, Any]) -> None:
        """Take step, epoch, best loss and metrics from the first place that has them, and say what was absent."""
        step = _first(places, STEP_KEYS)
        self.step = None if step is None else int(step[1])
        self.note(f"Step {self.step} is from {step[0]}." if step else "No step was stored: it counts from 0.")
        if epoch := _first(places, EPOCH_KEYS):
            self.state["epoch"] = epoch[1]
            self.note(f"Epoch {epoch[1]:g} is from {epoch[0]}.")
        best = _first(places, BEST_LOSS_KEYS)
        best_step = _first(places, BEST_STEP_KEYS) if best else None
        self.state["best_loss"] = best[1] if best else None
        self.state["best_step"] = int(best_step[1]) if best_step else (self.step or 0) if best else None
        self.note(f"Best loss {best[1]:.6g} is from {best[0]}." if best else "No best loss was stored.")
        if best and not best_step:
            self.note("The step of the best loss was not stored; the checkpoint's own step stands for it.")
        self.state["metrics"] = {key: found[1] for key in METRIC_KEYS if (found := _first(places, (key,)))}
        self._note_other_metrics(places)

    def _note_other_metrics(self, places: tuple[Mapping[str, Any], ...]) -> None:
        known = {*BEST_LOSS_KEYS, *BEST_STEP_KEYS}
        others = sorted({key for place in places for key in place if key.startswith("best_") and key not in known})
        if others:
            self.note(f"{', '.join(others)}: kept in client_state, not compared with a loss.")


def _first(places: tuple[Mapping[str, Any], ...], keys: tuple[str, ...]) -> tuple[str, float] | None:
    """The first finite number under one of `keys`, with its key."""
    for key in keys:
        for place in places:
            value = place.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return key, value
    return None
