"""A network of which a part alone is trained: the rest keeps its values and runs as in evaluation.

Frozen parameters become buffers of the same name: nothing that partitions, reduces or steps parameters sees them, and
autograd keeps nothing for them. A module that is frozen as a whole stays in evaluation mode: a batch norm normalises by
its stored statistics and leaves them as they are, dropout and stochastic depth are off.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def freeze(model: nn.Module, trained: Collection[str]) -> None:
    """Freeze all parameters of `model` but those named in `trained`, in place. Names stay what they are."""
    for prefix, module in model.named_modules():
        own = {name: f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
        for name, full in own.items():
            if full not in trained:
                held = module._parameters.pop(name)
                assert held is not None
                module.register_buffer(name, held.detach())
    _keep_in_evaluation(model, trained, "")


def _keep_in_evaluation(module: nn.Module, trained: Collection[str], prefix: str) -> None:
    """Below `module`, what holds something and nothing that is trained stays in evaluation mode for good."""
    for name, child in module.named_children():
        full = f"{prefix}{name}."
        if any(known.startswith(full) for known in trained):
            _keep_in_evaluation(child, trained, full)
        elif next(child.buffers(), None) is not None:
            child.eval()
            child.train = _as_it_is.__get__(child)  # type: ignore[method-assign]


def _as_it_is(module: nn.Module, mode: bool = True) -> nn.Module:
    """In place of ``Module.train``."""
    return module
