"""Sizes that tensor cores or zerofit's kernels do not like, and what to do about them. Pure.

Rules: a matrix product in half precision is fastest where its sizes are multiples of 64 elements (128 bytes), and falls
off tensor cores' full rate below multiples of 8 (16 bytes) (NVIDIA, Matrix Multiplication Background User's Guide,
"Requirements to Use Tensor Cores"); fused attention takes heads of up to 256, in multiples of 8 (Dao 2023,
FlashAttention-2, and PyTorch's scaled_dot_product_attention, which pads others).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..config.models import (
    CONV_MAX_TAPS,
    SCAN_CAPABILITY,
    SCAN_MAX_STATES,
    GPT2Config,
    LanguageModelShape,
    MambaConfig,
    ModelConfig,
)
from ..config.schema import Precision
from .sizes import format_bytes

#: Elements of 128 bytes in half precision; what tensor cores need at least; the largest head of fused attention.
TILE, LEAST, LARGEST_HEAD = 64, 8, 256


def dimension_notes(model: ModelConfig, precision: Precision, device: str) -> tuple[str, ...]:
    """A sentence for each size that costs speed; none on a CPU and in fp32, which tensor cores do not compute here."""
    if device != "cuda" or precision == "fp32" or not isinstance(model, LanguageModelShape):
        return ()
    return (*_vocabulary(model), *_width(model), *_heads(model))


#: Tensors of 64 steps x samples x inner channels x states in fp32 that the scan's PyTorch path holds at once (counted),
#: and those steps.
_PYTORCH_SCAN_TENSORS, _PYTORCH_SCAN_STEPS = 6, 64


def fallback_warnings(model: ModelConfig, capability: tuple[int, int], micro_batch: int) -> tuple[str, ...]:
    """What of a Mamba no kernel takes on such a GPU, so that PyTorch computes it; with the cost, which the plan's time
    and memory leave out."""
    if not isinstance(model, MambaConfig):
        return ()
    found = []
    slow = _no_scan_kernel(model, capability)
    if slow:
        block_bytes = 4 * _PYTORCH_SCAN_STEPS * micro_batch * model.d_inner * model.d_state
        found.append(
            f"the selective scan runs in PyTorch, because its kernel {slow}: it takes 10 to 50 times as long and about "
            f"{format_bytes(_PYTORCH_SCAN_TENSORS * block_bytes)} more memory while it works. The time and memory "
            f"above are the kernel's."
        )
    if model.d_conv > CONV_MAX_TAPS:
        found.append(
            f"the short convolution runs in PyTorch, because its kernel takes d_conv up to {CONV_MAX_TAPS}, not "
            f"{model.d_conv}: it takes several times as long, in fp32 copies. The time above is the kernel's."
        )
    return tuple(found)


def _no_scan_kernel(model: MambaConfig, capability: tuple[int, int]) -> str:
    if capability < SCAN_CAPABILITY:
        needed, there = (".".join(map(str, version)) for version in (SCAN_CAPABILITY, capability))
        return f"needs a GPU of compute capability {needed}, and this one has {there}"
    if model.d_state > SCAN_MAX_STATES:
        return f"takes d_state up to {SCAN_MAX_STATES}, not {model.d_state}"
    return ""


def _vocabulary(model: LanguageModelShape) -> Iterator[str]:
    rows = model.padded_vocab_size
    if rows % TILE:
        better = _up(rows, TILE)
        share = 6 * rows * model.width / model.flops_per_item()
        yield (
            f"the vocabulary has {rows:,} rows, no multiple of {TILE}: the head's matrix product, {share:.0%} of the "
            f"model's arithmetic, runs below full speed. model.pad_vocab_to {TILE} makes {better:,} of them; the added "
            f"ones never enter the loss"
        )


def _width(model: LanguageModelShape) -> Iterator[str]:
    if model.width % TILE:
        how = "every matrix product" if model.width % LEAST else "most matrix products"
        yield (
            f"the model is {model.width:,} wide, no multiple of {TILE}: {how} of its blocks runs below full speed. The "
            f"nearest widths are {model.width // TILE * TILE or TILE:,} and {_up(model.width, TILE):,}"
        )


def _heads(model: LanguageModelShape) -> Iterator[str]:
    if not isinstance(model, GPT2Config):
        return
    size = model.n_embd // model.n_head
    if size % LEAST:
        yield (
            f"an attention head has {size} channels (n_embd {model.n_embd} / n_head {model.n_head}), no multiple of "
            f"{LEAST}: fused attention pads it to {_up(size, LEAST)}. Heads of 64 or 128 are "
            f"usual{_better_heads(model)}"
        )
    elif size > LARGEST_HEAD:
        yield (
            f"an attention head has {size} channels (n_embd {model.n_embd} / n_head {model.n_head}): fused attention "
            f"takes {LARGEST_HEAD} at most, and a slower kernel with T x T scores in memory takes its "
            f"place{_better_heads(model)}"
        )


def _better_heads(model: GPT2Config) -> str:
    """The number of heads nearest to the present one whose heads are of a liked size."""
    fitting = [
        n for n in range(1, model.n_embd + 1) if model.n_embd % n == 0 and model.n_embd // n in (32, 64, 96, 128)
    ]
    if not fitting:
        return ""
    return f"; n_head {min(fitting, key=lambda n: abs(n - model.n_head))} has them at this width"


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
