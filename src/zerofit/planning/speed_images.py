"""How long a micro-step of an image classifier takes: arithmetic over rates, part by part. No torch, no GPU.

A convolution is products of ``kernel² x inputs`` by ``outputs`` over the pixels of its output; what follows it (batch
norm, ReLU, the residual sum) moves its output through memory. The shares below were set so that two measurements on
one H200 come out (torchvision's ResNet-18, 224 x 224: 17,939 images/s with AMP at batch 256, 19,892 compiled); they are
no fit over a range, and other ResNets, GPUs and batches may be off by tens of percent.

A model of timm is counted layer by layer when it is described: its convolutions and what its layers return are taken as
a ResNet's, its linear layers and its attention as those of the text models (`speed`). No such model was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..config.image_models import ResNetConfig, TimmConfig
from .calibration import Rates
from .plan import Plan
from .work import GPT2_BLOCK_KERNELS

#: Share of the large-matrix rate that convolutions reach. Set, see above.
CONVOLUTION_SHARE = 0.5
#: Elements that move for each element of a convolution's output in a forward pass: written by it, read and written by
#: batch norm, ReLU and residual sum, which compiled kernels do together. Set, see above; counting gives 7 and 4.5. The
#: backward pass moves twice as many.
EAGER_TRAFFIC, COMPILED_TRAFFIC = 6.2, 4.65
#: Layers of a ResNet that return a map for each convolution: itself, batch norm, ReLU. So each element that a layer
#: returns moves a third of the above.
LAYERS_A_CONVOLUTION = 3
#: What a convolution with all that follows it takes of the launching process in both passes. Set to one measurement: a
#: step of ResNet-18 at batch 16 in fp16 took 11.5 ms eager and 10.2 compiled on a host with an H200, of which the GPU
#: worked 3.0 (2026-11-21, docs/experiments.md); 1.5 ms are the step's own.
EAGER_SECONDS, COMPILED_SECONDS = 0.50e-3, 0.43e-3
#: Linear layers of a GPT-2 block, whose kernels are counted.
GPT2_BLOCK_PRODUCTS = 4
#: Of what launching takes in both passes, the forward pass's share: as of the work.
FORWARD_SHARE = 1 / 3


@dataclass(frozen=True)
class Part:
    """A block, or what is in no block: one picture's forward pass.

    Attributes:
        convolution_flops, product_flops, attention_flops: of convolutions, of linear layers, of products of attention.
        returned: elements that convolutions, linear layers, norms and activations return.
        convolutions, products: calls of convolutions and of linear layers.
    """

    convolution_flops: int
    product_flops: int
    attention_flops: int
    returned: int
    convolutions: int
    products: int


#: (width, rows) -> FLOP/s of products of matrices, and FLOP/s of attention; `speed` has them.
ProductRates = Callable[[float, float], tuple[float, float]]


def parts_of(model: ResNetConfig | TimmConfig) -> list[Part] | None:
    """What lies outside the blocks, then each block; None where it was never counted."""
    if isinstance(model, TimmConfig):
        work = model.work
        return None if work is None else [Part(**part) for part in work["parts"]]
    found = []
    for number in range(model.depth + 1):
        own = [conv for conv in model.convolutions() if conv.block == number]
        flops, maps = sum(conv.flops for conv in own), sum(conv.output_elements for conv in own)
        found.append(Part(flops, 0, 0, LAYERS_A_CONVOLUTION * maps, len(own), 0))
    return found


def gpu_seconds(
    plan: Plan, model: ResNetConfig | TimmConfig, found: Rates, product_rates: ProductRates, attention_backward: float
) -> tuple[float, float, float] | None:
    """Forward, backward and recomputation of one micro-step, without launching and without communication; None where
    the model's work is not known.

    Args:
        attention_backward: what attention takes backward against forward.
    """
    parts = parts_of(model)
    if parts is None:
        return None
    width, rows = (model.work["width"], model.work["rows"]) if isinstance(model, TimmConfig) and model.work else (0, 0)
    product, attention = product_rates(width, rows * plan.micro_batch) if width else (1.0, 1.0)
    h, traffic = 2 if plan.mixed else 4, COMPILED_TRAFFIC if plan.compile else EAGER_TRAFFIC
    linear, attended = [], []
    for part in parts:
        moved = part.returned / LAYERS_A_CONVOLUTION * traffic * h / found.bandwidth
        seconds = part.convolution_flops / (found.convolution_flops * CONVOLUTION_SHARE) + part.product_flops / product
        linear.append(plan.micro_batch * (seconds + moved))
        attended.append(plan.micro_batch * part.attention_flops / attention)
    forward = sum(linear) + sum(attended)
    if plan.frozen:  # the gradient of the head's weights alone
        return forward, plan.micro_batch * 2 * plan.parameters / (product if width else found.matrix_flops), 0.0
    every = plan.activation_checkpointing_every
    again = [number for number in range(1, len(parts)) if every and (number - 1) % every == 0]
    backward = 2 * sum(linear) + attention_backward * sum(attended)
    return forward, backward, sum(linear[number] + attended[number] for number in again)


def launch_seconds(
    plan: Plan, model: ResNetConfig | TimmConfig, kernel_seconds: float, compiled_block_seconds: float
) -> float:
    """What the process that launches a micro-step's kernels needs; nothing where CUDA graphs replay them.

    Args:
        kernel_seconds: of one kernel.
        compiled_block_seconds: of calling a compiled unit without convolutions, beside its kernels.
    """
    parts = parts_of(model)
    if plan.cuda_graphs or parts is None:
        return 0.0
    kernels = GPT2_BLOCK_KERNELS["compiled" if plan.compile else "eager"] / GPT2_BLOCK_PRODUCTS
    seconds = sum(part.convolutions for part in parts) * (COMPILED_SECONDS if plan.compile else EAGER_SECONDS)
    seconds += sum(part.products for part in parts) * kernels * kernel_seconds
    if plan.compile:
        units = sum(part.products > 0 and not part.convolutions for part in parts[1:])
        one_by_one = plan.activation_checkpointing_every or plan.strategy == "fsdp2"
        seconds += (units if one_by_one else min(units, 1)) * compiled_block_seconds
    return seconds * (FORWARD_SHARE if plan.frozen else 1.0)
