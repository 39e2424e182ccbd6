"""What models are trained for: data, loss sums' meaning, samples. Lazy references, as for models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config.models import ModelShape
    from .base import Task

TASKS = {
    "language_modeling": "zerofit.tasks.language_modeling:TASK",
    "image_classification": "zerofit.tasks.image_classification:TASK",
}


def task_of(model: ModelShape) -> Task:
    """The task that `model` is made for. Imports no torch."""
    module, _, attribute = TASKS[model.task].partition(":")
    task: Task = getattr(import_module(module), attribute)
    return task
