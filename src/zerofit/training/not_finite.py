"""Where a loss stopped being a number: one more forward pass over the same samples, watched layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..types import Batch, World


def first_bad_layer(engine: Any, window: Sequence[Batch], world: World) -> str | None:
    """The first place, in the model's order, at which something is not finite, in words; None when all is finite.

    Collective: every rank looks at its own samples, and all learn what the lowest rank found.
    """
    with _watched(engine.model) as found:
        engine.eval_step(window, compiled=False)
    words = found[0] if found else None
    if world.world_size == 1:
        return words
    every: list[str | None] = [None] * world.world_size
    dist.all_gather_object(every, words)
    return next((word for word in every if word), None)


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Inside, what is not finite is noted: a module's own parameters, what it receives, what it returns."""
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            handles += _watch(name, module, found)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _watch(name: str, module: nn.Module, found: list[str]) -> list[Any]:
    says = getattr(module, "computes", "")
    title = f"{name} ({says})" if says else name

    def before(module: nn.Module, args: Any) -> None:
        if found:
            return
        bad = next((f"{name}.{own}" for own, p in module.named_parameters(recurse=False) if _bad(p)), None)
        if bad:
            found.append(f"the parameter {bad} holds values that are not finite")
        elif any(map(_bad, tree_leaves(args))):
            found.append(f"{title} receives values that are not finite, although the layers before it give finite ones")

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if not found and any(map(_bad, tree_leaves(output))):
            found.append(f"{title} returns values that are not finite for a finite input")

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _bad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all())
