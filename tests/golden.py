"""Golden losses: what a small model's first 20 steps are. See scripts/write_golden_losses.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zerofit.checkpoint.model import initial_reader
from zerofit.config.models import MambaConfig
from zerofit.engines.build import build
from zerofit.models import model_spec
from zerofit.planning.plan import Plan
from zerofit.types import Batch, World

FOLDER = Path(__file__).with_name("golden_losses")
STEPS, SAMPLES, LEARNING_RATE = 20, 4, 3e-3
MODELS = {
    "mamba": MambaConfig(n_layers=2, d_model=32, d_state=8, vocab_size=65, max_seq_length=32),
}


def losses_of(name: str) -> list[float]:
    """The losses of the first steps, on one CPU process in fp32."""
    model = MODELS[name]
    spec = model_spec(model.kind)
    plan = Plan.model_validate(
        {
            "model": model,
            "parameters": model.parameter_count(),
            "strategy": "single",
            "device": "cpu",
            "world_size": 1,
            "micro_batch": SAMPLES,
            "accumulation_steps": 1,
            "precision": "fp32",
        }
    )
    engine: Any = build(plan, spec, World(0, 1, 0, torch.device("cpu")))
    engine.load(initial_reader(spec, model, plan.seed))
    losses = [engine.train_step([_batch(model, step)], LEARNING_RATE, step).read().loss for step in range(STEPS)]
    engine.close()
    return losses


def _batch(model: MambaConfig, step: int) -> Batch:
    """A repeated text with noise, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    text = torch.arange(SAMPLES * (model.max_seq_length + 1)).view(SAMPLES, -1) * 7 % 13
    noise = torch.randint(0, model.padded_vocab_size, text.shape, generator=generator)
    tokens = torch.where(torch.rand(text.shape, generator=generator) < 0.2, noise, text)
    inputs = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    return Batch(inputs, inputs["targets"].numel())
