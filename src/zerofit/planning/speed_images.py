"""How long a micro-step of a ResNet takes: per-convolution arithmetic over rates. No torch, no GPU.

A convolution is products of ``kernel² x inputs`` by ``outputs`` over the pixels of its output; what follows it (batch
norm, ReLU, the residual sum) moves its output through memory. The shares below were set so that two measurements on
one H200 come out (torchvision's ResNet-18, 224 x 224: 17,939 images/s with AMP at batch 256, 19,892 compiled); they are
no fit over a range, and other ResNets, GPUs and batches may be off by tens of percent.
"""

from __future__ import annotations

from ..config.image_models import ResNetConfig
from .calibration import Rates
from .plan import Plan

#: Share of the large-matrix rate that convolutions reach. Set, see above.
CONVOLUTION_SHARE = 0.5
#: Elements that move for each element of a convolution's output in a forward pass: written by it, read and written by
#: batch norm, ReLU and residual sum, which compiled kernels do together. Set, see above; counting gives 7 and 4.5. The
#: backward pass moves twice as many.
EAGER_TRAFFIC, COMPILED_TRAFFIC = 6.2, 4.65
#: What a convolution with all that follows it takes of the launching process in both passes. Set to one measurement: a
#: step of ResNet-18 at batch 16 in fp16 took 11.5 ms eager and 10.2 compiled on a host with an H200, of which the GPU
#: worked 3.0 (2026-11-21, docs/experiments.md); 1.5 ms are the step's own.
EAGER_SECONDS, COMPILED_SECONDS = 0.50e-3, 0.43e-3


def gpu_seconds(plan: Plan, model: ResNetConfig, found: Rates) -> tuple[float, float, float]:
    """Forward, backward and recomputation of one micro-step, without launching and without communication."""
    forward = [_block_seconds(plan, model, found, number) for number in range(model.depth + 1)]
    every = plan.activation_checkpointing_every
    again = sum(s for number, s in enumerate(forward) if every and number and (number - 1) % every == 0)
    return sum(forward), 2 * sum(forward), again


def _block_seconds(plan: Plan, model: ResNetConfig, found: Rates, number: int) -> float:
    own = [conv for conv in model.convolutions() if conv.block == number]
    h, traffic = 2 if plan.mixed else 4, COMPILED_TRAFFIC if plan.compile else EAGER_TRAFFIC
    rate = found.convolution_flops * CONVOLUTION_SHARE
    moved = sum(conv.output_elements for conv in own) * traffic * h
    return plan.micro_batch * (sum(conv.flops for conv in own) / rate + moved / found.bandwidth)


def launch_seconds(plan: Plan, model: ResNetConfig) -> float:
    """What the process that launches a micro-step's kernels needs; nothing where CUDA graphs replay them."""
    if plan.cuda_graphs:
        return 0.0
    return len(model.convolutions()) * (COMPILED_SECONDS if plan.compile else EAGER_SECONDS)
