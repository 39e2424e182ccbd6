"""ResNet-18, 34 and 50 (He et al. 2016, "Deep Residual Learning for Image Recognition"), named as in torchvision.

Parameters, buffers and their order are those of ``torchvision.models.resnet``, so that state dicts go both ways.

Shape legend: B samples, C channels, S pixels of a side, K classes.

Precision: activations, convolutions and the head follow the compute type; batch norm computes its statistics, and keeps
its running ones, in fp32 whatever that is; the loss is fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.image_models import ResNetConfig
from ..config.shapes import Recomputation
from .base import apply_blocks, parameter_generator
from .batch_norm import batch_norm, recomputation_contexts
from .classification import classification_sums

#: Batches to average over: the weight of the newest batch in running statistics (torchvision's, PyTorch's default).
MOMENTUM, EPSILON = 0.1, 1e-5
STAGES = ("layer1", "layer2", "layer3", "layer4")


class BatchNorm(nn.BatchNorm2d):
    """Over (B, S, S), see `batch_norm`. (B, C, S, S) -> the same; running statistics move by `MOMENTUM`."""

    def __init__(self, channels: int, sync: bool) -> None:
        super().__init__(channels, eps=EPSILON, momentum=MOMENTUM)
        self.sync = sync

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(self, x, self.sync)


class Block(nn.Module):
    """A residual block. (B, C_in, S, S) -> (B, C_out, S / stride, S / stride).

    Args:
        channels: of the input, then of each convolution's output.
        kernels: of each convolution.
        strides: of each convolution.
    """

    def __init__(self, channels: Sequence[int], kernels: Sequence[int], strides: Sequence[int], sync: bool) -> None:
        super().__init__()
        for place, (kernel, stride) in enumerate(zip(kernels, strides, strict=True)):
            conv = _convolution(channels[place], channels[place + 1], kernel, stride)
            self.add_module(f"conv{place + 1}", conv)
            self.add_module(f"bn{place + 1}", BatchNorm(channels[place + 1], sync))
        stride = math.prod(strides)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels[0] != channels[-1]:
            shortcut = _convolution(channels[0], channels[-1], 1, stride)
            self.downsample = nn.Sequential(shortcut, BatchNorm(channels[-1], sync))
        self.convolutions = len(kernels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        for place in range(1, self.convolutions + 1):
            x = getattr(self, f"bn{place}")(getattr(self, f"conv{place}")(x))
            x = F.relu(x, inplace=True) if place < self.convolutions else x
        return F.relu(x.add_(shortcut), inplace=True)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class ResNet(nn.Module):
    """The classifier. ``forward(images, targets)`` -> sums, see `classification_sums`; ``forward(images)`` -> logits.

    Args:
        checkpoint_every: recompute every n-th residual block in the backward pass; 0: none.
    """

    def __init__(self, config: ResNetConfig, checkpoint_every: int = 0) -> None:
        super().__init__()
        self.config, self.checkpoint_every = config, checkpoint_every
        stem, *convolutions = config.convolutions(size=224)
        self.conv1 = _convolution(stem.inputs, stem.outputs, stem.kernel, stem.stride)
        self.bn1 = BatchNorm(stem.outputs, config.sync_batchnorm)
        stages: dict[str, list[nn.Module]] = {name: [] for name in STAGES}
        for number in range(1, config.depth + 1):
            own = [c for c in convolutions if c.block == number and ".downsample." not in c.name]
            channels = [own[0].inputs, *(c.outputs for c in own)]
            block = Block(channels, [c.kernel for c in own], [c.stride for c in own], config.sync_batchnorm)
            stages[own[0].name.partition(".")[0]].append(block)
        for name, blocks in stages.items():
            self.add_module(name, nn.Sequential(*blocks))
        self.fc = nn.Linear(config.features, config.classes)

    @property
    def blocks(self) -> list[nn.Module]:
        """The residual blocks, in order."""
        return [block for name in STAGES for block in self.get_submodule(name).children()]

    def forward(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        """Args: images: (B, 3, S, S), normalised, any floating type; targets: (B,) classes, or (B, K) probabilities."""
        logits = self.fc(self.features(images))
        if targets is None:
            return logits  # type: ignore[no-any-return]
        return classification_sums(
            logits, targets, self.config.label_smoothing if self.training else 0.0, self.training
        )

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, features): everything before the head."""
        x = images.to(self.fc.weight.dtype)
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, padding=1)
        x = apply_blocks(self.blocks, x, self.checkpoint_every, recomputation_contexts)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


class ResNetSpec:
    """The recipe; see `zerofit.models.base.ModelSpec`."""

    def build(
        self, config: ResNetConfig, *, checkpoint_every: int = 0, recomputation: Recomputation = "full"
    ) -> nn.Module:
        return ResNet(config, checkpoint_every)

    def init(self, config: ResNetConfig, name: str, seed: int) -> Tensor:
        """As torchvision's: convolutions normal with the variance 2 / fan-out (He et al. 2015), batch norms 1 and 0
        (statistics 0 and 1), the head uniform within 1 / sqrt(features)."""
        shape = (config.parameter_shapes() | config.buffer_shapes())[name]
        if name.startswith("fc."):
            bound = 1 / math.sqrt(config.features)
            return torch.empty(shape).uniform_(-bound, bound, generator=parameter_generator(seed, name))
        if len(shape) == 4:
            std = math.sqrt(2 / (shape[0] * shape[2] * shape[3]))
            return torch.empty(shape).normal_(0.0, std, generator=parameter_generator(seed, name))
        last = "bn3.weight" if config.layers == 50 else "bn2.weight"
        identity = config.zero_init_residual and name.startswith("layer") and name.endswith(last)
        return torch.full(shape, float(name.endswith((".weight", ".running_var")) and not identity))

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, ResNet)
        return model.blocks

    def compiled_units(self, model: nn.Module) -> Sequence[nn.Module]:
        """The whole: its operations are small, and launching them is what costs. With recomputation block by block,
        because what tells a recomputation lies outside."""
        assert isinstance(model, ResNet)
        return model.blocks if model.checkpoint_every else [model]

    def example_inputs(self, config: ResNetConfig, samples: int) -> dict[str, Tensor]:
        images = torch.zeros(samples, 3, config.pixels, config.pixels, dtype=torch.float32)
        return {"images": images, "targets": torch.zeros(samples, dtype=torch.int64)}

    def decays(self, config: ResNetConfig, name: str) -> bool:
        return name in config.decaying()

    def flops_per_item(self, config: ResNetConfig) -> int:
        return config.flops_per_item()


SPEC: Any = ResNetSpec()
