"""When a frozen backbone thaws, and what a run says of it. Imports no torch; `phases` does the work."""

from __future__ import annotations

import math

from ..config.image_models import ImageModelShape
from ..config.schema import Config
from ..errors import ConfigError
from ..planning.plan import Plan
from ..tasks import task_of


def thaw_step(config: Config, plan: Plan) -> int:
    """Steps before the whole network is trained: until the first step that begins in epoch ``freeze_epochs``; 0 where
    nothing is frozen."""
    epochs = getattr(plan.model, "freeze_epochs", 0)
    return math.ceil(epochs * task_of(plan.model).epoch_samples(config) / plan.global_batch) if epochs else 0


def refuse_nothing_to_keep(model: object) -> None:
    """A frozen backbone keeps what it starts from.

    Raises:
        ConfigError: that would be random numbers.
    """
    if isinstance(model, ImageModelShape) and model.freeze_epochs:
        raise ConfigError(
            f"model.freeze_epochs {model.freeze_epochs} in a run that starts from scratch: a frozen backbone keeps its "
            f"values, and these would be random numbers. Start from weights (model.pretrained true, model.weights_from "
            f"FILE, or --load-checkpoint RUN --weights-only), or leave model.freeze_epochs out."
        )


def freezing_words(config: Config, plan: Plan) -> str | None:
    """What a run with a frozen phase says of it before it starts; None for others."""
    step = thaw_step(config, plan)
    if not step:
        return None
    frozen = plan.frozen_phase()
    whole = f"then the whole network from step {step + 1:,}" if step < config.max_steps else "and the run ends with it"
    return (
        f"Frozen backbone: the head alone ({frozen.parameters:,} of {plan.parameters:,} parameters) trains for "
        f"{min(step, config.max_steps):,} steps, {whole}."
    )
