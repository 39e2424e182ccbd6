"""How much work one micro-step of a model is: what the speed model multiplies with rates. One function a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from ..config.models import GPT2Config, HuggingFaceConfig, MambaConfig, ModelConfig

#: Elements per token and channel that a GPT-2 block reads and writes outside matrix products in a forward pass: two
#: norms 4, the attention output's transposition 2, GELU 8, two residual sums 4. The backward pass moves about twice
#: as many.
GPT2_BLOCK_TRAFFIC = 18
#: GPU kernels that a GPT-2 block launches, forward and backward, eager and compiled (counted in the model's code:
#: 13 operations forward, each with two to three backward; compiled ones fuse between the matrix products).
GPT2_BLOCK_KERNELS = {"eager": 44, "compiled": 20}
#: Modules of a GPT-2 block that hold parameters: ZeRO-3 gathers and frees each in either pass.
GPT2_BLOCK_MODULES = 6
#: The same of a Mamba block. Per token and channel of the residual stream: norm 3, its input and the sum in fp32 7;
#: per inner channel the convolution 2. The scan moves its own, see `Work.scan_elements`.
MAMBA_STREAM_TRAFFIC, MAMBA_INNER_TRAFFIC = 10, 2
MAMBA_NORM_TRAFFIC = 3
#: Its operators are called through Python, which takes the time of many launches: 1.4B (48 blocks, `light`) took 215
#: to 231 ms a step on one H200 that worked for 193 of them; compiled, without recomputation, 195, working for 187.
MAMBA_BLOCK_KERNELS = {"eager": 480, "compiled": 300}
MAMBA_BLOCK_MODULES = 7


@dataclass(frozen=True)
class Work:
    """One token's work, forward only unless stated, and what a micro-step costs the processor that launches it.

    Attributes:
        block_flops: matrix products of all blocks, attention left out.
        attention_flops: of causal attention as flash kernels do it (the half above the diagonal is skipped).
        head_flops: logits.
        block_traffic: elements read and written by what is no matrix product, in all blocks.
        logits: logits a token.
        width: of the residual stream: small matrices use a GPU less well.
        blocks: how many.
        kernels: launched in forward and backward of one block, by ``eager`` and ``compiled``; what takes as long, too.
        tensors: parameters of the model as tensors: ZeRO hooks each.
        modules: modules with parameters: ZeRO-3 gathers each.
        sample_tokens: tokens of one sample.
        step_flops: of forward and backward, as MFU counts them.
        scan_elements: states that the selective scans of all blocks advance: inner channels x states.
        light_flops: matrix products that `light` and `selective` recomputation repeat.
        light_traffic: elements that they move again, as in `block_traffic`.
    """

    block_flops: int
    attention_flops: int
    head_flops: int
    block_traffic: int
    logits: int
    width: int
    blocks: int
    kernels: dict[str, int]
    tensors: int
    modules: int
    sample_tokens: int
    step_flops: int
    scan_elements: int = 0
    light_flops: int = 0
    light_traffic: int = 0


@cache
def work_of(model: ModelConfig) -> Work | None:
    """The work of a model; None when its speed is not modelled."""
    if isinstance(model, GPT2Config):
        return _gpt2(model)
    if isinstance(model, MambaConfig):
        return _mamba(model)
    return _huggingface(model) if isinstance(model, HuggingFaceConfig) else None


def _huggingface(model: HuggingFaceConfig) -> Work:
    """A dense decoder of L blocks; what moves and is launched is taken to be as in GPT-2's blocks, with rotary
    positions and norms in several operations, and has not been measured."""
    tables = sum(math.prod(shape) for shape in model.shapes.values() if model.padded_vocab_size in shape)
    return Work(
        block_flops=2 * (model.parameter_count() - tables),
        attention_flops=2 * model.depth * model.width * model.max_seq_length,
        head_flops=2 * model.padded_vocab_size * model.width,
        block_traffic=(10 * model.width + 6 * model.hidden_width) * model.depth,
        logits=model.padded_vocab_size,
        width=model.width,
        blocks=model.depth,
        kernels={"eager": 2 * GPT2_BLOCK_KERNELS["eager"], "compiled": GPT2_BLOCK_KERNELS["compiled"]},
        tensors=len(model.shapes),
        modules=9 * model.depth + 3,
        sample_tokens=model.max_seq_length,
        step_flops=model.flops_per_item(),
    )


def _gpt2(model: GPT2Config) -> Work:
    """L blocks of width C on T tokens; table of V rows, tied with the head."""
    length, width, table = model.block_size, model.n_embd, model.padded_vocab_size * model.n_embd
    in_blocks = model.parameter_count() - table - length * width
    return Work(
        block_flops=2 * in_blocks,
        attention_flops=2 * model.n_layer * width * length,  # two products, 2 C T each, half of it causal
        head_flops=2 * table,
        block_traffic=GPT2_BLOCK_TRAFFIC * width * model.n_layer,
        logits=model.padded_vocab_size,
        width=width,
        blocks=model.n_layer,
        kernels=GPT2_BLOCK_KERNELS,
        tensors=len(model.parameter_shapes()),
        modules=GPT2_BLOCK_MODULES * model.n_layer + 3,
        sample_tokens=length,
        step_flops=model.flops_per_item(),
    )


def _mamba(model: MambaConfig) -> Work:
    """L blocks of width C, inner width D and N states; table of V rows, tied with the head."""
    depth, width, inner = model.n_layers, model.d_model, model.d_inner
    matrices = 3 * inner * width + inner * (2 * model.step_rank + 2 * model.d_state)
    return Work(
        block_flops=2 * depth * matrices,
        attention_flops=0,
        head_flops=2 * model.padded_vocab_size * width,
        block_traffic=depth * (MAMBA_STREAM_TRAFFIC * width + MAMBA_INNER_TRAFFIC * inner),
        logits=model.padded_vocab_size,
        width=width,
        blocks=depth,
        kernels=MAMBA_BLOCK_KERNELS,
        tensors=len(model.parameter_shapes()),
        modules=MAMBA_BLOCK_MODULES * depth + 3,
        sample_tokens=model.max_seq_length,
        step_flops=model.flops_per_item(),
        scan_elements=depth * inner * model.d_state,
        light_flops=2 * depth * inner * model.step_rank,
        light_traffic=depth * (MAMBA_NORM_TRAFFIC * width + MAMBA_INNER_TRAFFIC * inner),
    )
