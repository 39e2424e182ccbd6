"""Any causal language model of transformers, built from its settings: for the planner's traces.

Training such a model needs the engines' init, import and export by name as well; that comes with chat tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config.models import HuggingFaceConfig
from ..errors import ConfigError, MissingDependency
from .base import named_unique_parameters
from .gpt2 import IGNORE


class HuggingFaceModel(nn.Module):
    """``forward(tokens, targets)`` -> ``{"loss": sum}``, with the model's own head and attention (SDPA)."""

    def __init__(self, config: HuggingFaceConfig, checkpoint_every: int = 0) -> None:
        super().__init__()
        self.model = causal_lm(config.settings)
        self.config, self.checkpoint_every = config, checkpoint_every
        for index, block in enumerate(blocks_of(self.model, config.depth)):
            if checkpoint_every and index % checkpoint_every == 0:
                _recompute(block)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        """Args: tokens, targets: (B, T) int64."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        if targets is None:
            return logits
        flat = logits.reshape(-1, logits.shape[-1]).float()
        return {"loss": F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORE, reduction="sum")}


def causal_lm(settings: Mapping[str, Any]) -> Any:
    """The transformers module, its values whatever its constructor makes.

    Raises:
        MissingDependency: transformers is not installed.
        ConfigError: transformers knows no causal language model of this kind.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights
    except ImportError as reason:
        raise MissingDependency(
            f"Planning for a Hugging Face model builds it with transformers, which cannot be imported here ({reason}). "
            f"Run `pip install transformers`."
        ) from reason
    try:
        config = AutoConfig.for_model(**settings)
        return _built(AutoModelForCausalLM, config, no_init_weights)
    except (ValueError, KeyError, TypeError, AttributeError) as reason:
        raise ConfigError(
            f"model_type {settings.get('model_type')!r}: transformers makes no causal language model of these "
            f"settings ({reason}). A newer transformers may know it; models of other kinds cannot be planned."
        ) from reason


def _built(factory: Any, config: Any, no_init_weights: Any) -> Any:
    """With fused attention where the architecture has it."""
    with no_init_weights():
        try:
            model = factory.from_config(config, attn_implementation="sdpa")
        except ValueError:  # some cap their attention's logits, which no fused kernel does
            model = factory.from_config(config, attn_implementation="eager")
    model.tie_weights()  # left out where weights are not initialised
    return model


def blocks_of(model: nn.Module, depth: int) -> list[nn.Module]:
    """The repeated blocks: the list of modules that has as many entries as the config counts.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise ValueError(f"no list of {depth} blocks in {type(model).__name__}")


def _recompute(block: nn.Module) -> None:
    """Recompute the block's activations in the backward pass."""
    inner = block.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(x, *args, **kwargs)
        return checkpoint(inner, x, *args, use_reentrant=False, **kwargs)

    block.forward = forward


def parameter_shapes(config: HuggingFaceConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape, from the model built without storage."""
    with torch.device("meta"):
        model = HuggingFaceModel(config)
    return {name: tuple(parameter.shape) for name, parameter in named_unique_parameters(model).items()}


class HuggingFaceSpec:
    """The recipe; see `zerofit.models.base.ModelSpec`. What only training needs says that it is not there yet."""

    def build(self, config: HuggingFaceConfig, *, checkpoint_every: int = 0) -> nn.Module:
        return HuggingFaceModel(config, checkpoint_every)

    def init(self, config: HuggingFaceConfig, name: str, seed: int) -> Tensor:
        raise ConfigError(NOT_TRAINED)

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, HuggingFaceModel)
        return blocks_of(model.model, model.config.depth)

    def compiled_units(self, model: nn.Module) -> Sequence[nn.Module]:
        return self.blocks(model)

    def example_inputs(self, config: HuggingFaceConfig, samples: int) -> dict[str, Tensor]:
        return {name: torch.zeros(samples, config.max_seq_length, dtype=torch.int64) for name in ("tokens", "targets")}

    def decays(self, config: HuggingFaceConfig, name: str) -> bool:
        return len(config.parameter_shapes()[name]) >= 2

    def flops_per_item(self, config: HuggingFaceConfig) -> int:
        return config.flops_per_item()


NOT_TRAINED = "model.kind huggingface can be planned, not trained yet. GPT-2's weights train as model.kind gpt2."

SPEC = HuggingFaceSpec()
