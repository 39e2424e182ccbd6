"""What a timm model computes in one forward pass, part by part: what `planning.speed_images` multiplies with rates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

#: Modules that hand on what they got, in evaluation.
_HAND_ON = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d)
_HAND_ON_NAMES = ("DropPath", "PatchDropout")
#: Norms into which timm puts an activation: they are no leaves.
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Operators by what bounds them; all others count as products of matrices.
_KINDS = {"convolution": "convolution_flops", "bmm": "attention_flops", "baddbmm": "attention_flops"}


def watch(model: nn.Module, blocks: Sequence[str], samples: int) -> Callable[[FlopCounterMode, Sequence[str]], Any]:
    """Hooks that count during the forward pass that follows.

    Args:
        blocks: names of modules that may be blocks.
        samples: of that pass.

    Returns:
        A function of the counter around that pass and of the names of the blocks. It gives ``parts`` (outside the
        blocks, then each block: FLOPs of convolutions, of matrix products and of attention, elements that layers
        return, calls of convolutions and of linear layers; of one sample), ``width`` and ``rows``: of a matrix product,
        the smaller of its features and the rows of one sample, averaged over FLOPs.
    """
    counted: dict[str, dict[str, int]] = {name: _nothing() for name in ("", *blocks)}
    linear: list[tuple[float, int, int]] = []
    for name, module in model.named_modules():
        leaf = next(module.children(), None) is None
        hands_on = isinstance(module, _HAND_ON) or type(module).__name__ in _HAND_ON_NAMES
        if (leaf and not hands_on) or isinstance(module, _NORMS):
            block = next((b for b in blocks if name == b or name.startswith(f"{b}.")), "")
            module.register_forward_hook(functools.partial(_count, counted[block], linear, samples))

    def finish(counter: FlopCounterMode, called: Sequence[str]) -> dict[str, Any]:
        flops = counter.get_flop_counts()
        parts = [counted[name] | _flops(flops[f"{type(model).__name__}.{name}"], samples) for name in called]
        whole = _flops(flops["Global"], samples)
        outside = _nothing()
        for name in set(counted) - set(called):
            for what, number in counted[name].items():
                outside[what] += number
        for what, number in whole.items():
            outside[what] = number - sum(part[what] for part in parts)
        total = sum(share for share, _, _ in linear) or 1.0
        width, rows = (sum(share * row[place] for share, *row in linear) / total for place in (0, 1))
        return {"parts": [outside, *parts], "width": width, "rows": rows}

    return finish


def _nothing() -> dict[str, int]:
    names = ("convolution_flops", "product_flops", "attention_flops", "returned", "convolutions", "products")
    return dict.fromkeys(names, 0)


def _count(
    part: dict[str, int], linear: list[tuple[float, int, int]], samples: int, module: nn.Module, args: Any, output: Any
) -> None:
    elements = output.numel() // samples if isinstance(output, Tensor) else 0
    part["returned"] += elements
    part["convolutions"] += isinstance(module, _CONVOLUTIONS)
    if isinstance(module, nn.Linear):
        part["products"] += 1
        features = (module.in_features, module.out_features)
        linear.append((elements * features[0], min(features), elements // features[1]))


def _flops(by_operator: Mapping[Any, int], samples: int) -> dict[str, int]:
    found = dict.fromkeys(("convolution_flops", "product_flops", "attention_flops"), 0)
    for operator, count in by_operator.items():
        name = str(operator).rpartition(".")[2]
        kind = "attention_flops" if "attention" in name else _KINDS.get(name, "product_flops")
        found[kind] += count // samples
    return found
