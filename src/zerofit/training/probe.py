"""One stored sample whose loss tells, after a resume, that the weights are those that were saved."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors.torch import load_file

from ..checkpoint.manifest import PROBE
from ..engines.base import Engine
from ..tasks.base import Task
from ..types import Batch, Pending

#: Relative difference of the probe's loss that rounding explains, by precision.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}


def probe_loss(engine: Engine, probe: Batch) -> Pending[float]:
    """Mean loss of the probe. Collective; does not wait. Not compiled: its shape is not that of training."""
    sums = engine.eval_step([probe], compiled=False)
    return Pending(lambda: sums.read()["loss"].mean)


def stored_probe(folder: Path, task: Task) -> Batch | None:
    """The probe of a checkpoint; None when it has none."""
    path = folder / PROBE
    if not path.is_file():
        return None
    return task.batch_of(load_file(path))


def differs(saved: float, now: float, *precisions: str) -> bool:
    """Whether the losses differ by more than rounding, of the coarsest precision that one of them was computed in."""
    tolerance = max(TOLERANCES[precision] for precision in precisions)
    return not math.isclose(saved, now, rel_tol=tolerance, abs_tol=1e-6)
