"""Buffers of timm's models in half precision: what is rounded, and what stays in fp32.

Under ``torch.autocast`` a model's buffers stay in fp32, and what matrix products read of them is rounded there; under
``model.to(dtype)`` all of them are rounded. Here the compute copy is a model of half-precision parameters, and:

- statistics (``running_mean``, ``running_var``) are fp32: `engines.buffers` sees to it for every model;
- angles of rotary positions, and the tables of their sines and cosines, are fp32: rounded to bf16 they are off by up to
  0.002, in every block alike. timm rotates in the wider type, and rounds the rotated queries and keys to the type of
  the activations, so that nothing after them is wider;
- all others take part in operations with half-precision parameters, which would fail or widen everything after them.
  They are made in fp32 by timm and rounded once, as autocast rounds them where a matrix product reads them (the
  logarithmic coordinates of Swin v2, blurring filters); masks, indices and zeros are exact. One that a checkpoint holds
  is fp32 in there: see `ROUNDED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

#: Attribute of a model: names of persistent buffers that its forward pass reads in the compute dtype; see
#: `engines.buffers`.
ROUNDED = "zerofit_rounded_buffers"
_STATISTICS = ("running_mean", "running_var")


def keep_exact(model: nn.Module, in_fp32: Callable[[], nn.Module]) -> None:
    """Put fp32 values into the rotary modules of a half-precision `model`, in place, and note what `ROUNDED` says.

    Args:
        in_fp32: makes the same model in fp32, on the CPU: values that were rounded cannot be made exact again.
    """
    known = model.state_dict().keys()
    constants = {name for name in known if name.rpartition(".")[2] not in _STATISTICS}
    floating = {name for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    vars(model)[ROUNDED] = frozenset(constants & floating)
    if torch.get_default_dtype() is torch.float32:
        return
    tables = dict(_rotary_buffers(model))
    narrow = [name for name, buffer in tables.items() if buffer.element_size() < 4]
    if narrow:
        exact = _without_values(tables) if _valueless(tables) else dict(in_fp32().named_buffers())
        for name in narrow:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = exact[name].to(tables[name].device)
    for owner in {name.rpartition(".")[0] for name in tables}:
        _stays_fp32(model.get_submodule(owner))


def _rotary_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Floating-point buffers of modules that make rotary positions; other tools know these by the class's name too."""
    for prefix, module in model.named_modules():
        if "RotaryEmbedding" in type(module).__name__:
            for leaf, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    yield f"{prefix}.{leaf}".lstrip("."), buffer


def _valueless(tables: dict[str, Tensor]) -> bool:
    """Whether only shapes are built: on fake tensors, or without storage (`engines.fsdp` puts values in)."""
    return detect_fake_mode() is not None or any(buffer.is_meta for buffer in tables.values())


def _without_values(tables: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty_like(buffer, dtype=torch.float32) for name, buffer in tables.items()}


def _stays_fp32(module: nn.Module) -> None:
    """From now on ``.half()`` and ``.bfloat16()`` of a model (DeepSpeed's) move the module's buffers and leave their
    type."""
    inner = module._apply

    def apply(function: Any, *args: Any, **kwargs: Any) -> nn.Module:
        held = {leaf: buffer for leaf, buffer in module._buffers.items() if buffer is not None}
        changed: nn.Module = inner(function, *args, **kwargs)  # type: ignore[no-untyped-call]
        for leaf, before in held.items():
            after = module._buffers[leaf]
            if after is not None and after.dtype != before.dtype:
                module._buffers[leaf] = before.to(after.device)
        return changed

    vars(module)["_apply"] = apply
