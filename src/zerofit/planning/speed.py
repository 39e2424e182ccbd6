"""How long a step takes: pure arithmetic over rates. No torch, no GPU.

P parameters, N ranks, h bytes of the compute type, M tokens of a micro-batch, C width. Each part is FLOPs or bytes
over a rate; the constants that no data sheet tells were fitted to GPT-2 XL on 1 and 4 H200s (docs/experiments.md has
the fit and its residuals). `FORMULAS` says all of it in words, for ``zerofit plan --explain``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.image_models import ResNetConfig, TimmConfig
from . import speed_images as images
from .calibration import Rates
from .optimizer_states import BLOCK, MEANS, gathers_gradients, planned_groups
from .plan import Plan, input_bytes
from .work import Work, work_of

#: Share of the large-matrix rate that a Transformer's products reach when width and tokens are large. Fitted.
PRODUCT_SHARE = 0.88
#: Width and tokens at which a product reaches half of that, on a GPU of 790 TFLOP/s; smaller GPUs fill up sooner.
HALF_WIDTH, HALF_TOKENS, REFERENCE_FLOPS = 343.0, 250.0, 790e12
#: Flash attention's share of the large-matrix rate, and its backward pass against its forward (it recomputes).
ATTENTION_SHARE, ATTENTION_BACKWARD = 0.40, 2.5
#: Seconds that a selective scan takes for one state of one channel and token, each way, on the reference GPU; inside
#: training steps 0.46 and 1.16 ms for 4096 tokens, 9728 channels and 16 states in bf16, 0.27 and 0.83 ms for 8192
#: tokens and 4096 channels (H200, 2026-11-22). Bound by exponentials and shared memory, so on other GPUs it is taken to
#: follow their arithmetic rate.
SCAN_SECONDS, SCAN_BACKWARD_SECONDS = 6.2e-13, 1.75e-12
#: Elementwise traffic against compiled, fused kernels; bytes a logit moves: written, read by the softmax, its
#: gradient written and read; eager keeps an fp32 copy as well.
EAGER_TRAFFIC, LOGIT_BYTES = 1.2, {"eager": 34, "compiled": 16}
#: Bytes the optimizer's step moves a parameter: AdamW in one pass over flat fp32 masters reads the gradient, reads and
#: writes master and moments, writes the compute copy (28), and the norm reads the gradient (2); in full fp32 32.
#: An H200 took 12.9 to 13.4 ms for 1.71e9 parameters, the norm apart. The rows of GPT-2 XL that the other constants
#: were fitted to ran a step that gathered gradients first and took 23 ms: those constants hold the difference.
#: DeepSpeed's step around the same kernel takes as long as 190 (fitted: 252 against 184 ms on one GPU).
ADAM_BYTES, ADAM_FP32_BYTES, ZERO_STEP_BYTES = 30, 32, 190
#: Seconds a parameter at least where moments have 8 bits, for finding their codes (20.8 ms for 1.71e9 parameters on an
#: H200); arithmetic, so in proportion on other GPUs.
CODES_SECONDS = 1.22e-11
#: AdamW on the CPU: gradient, master and moments read, master and moments written, in fp32.
CPU_ADAM_BYTES = 28
#: Seconds of the launching process: a kernel, a parameter's hook under DDP and under ZeRO-1/2, a module's gathering
#: and freeing under ZeRO-3, a step's loop and agreement. Fitted to ZeRO-2 at micro-batch 1 and ZeRO-3 at 8, eager.
KERNEL_SECONDS, DDP_HOOK_SECONDS, ZERO_HOOK_SECONDS, ZERO3_MODULE_SECONDS = 7e-6, 2e-6, 95e-6, 530e-6
STEP_SECONDS = 1.5e-3
#: More of that for a compiled block, beside its kernels: its guards and its two calls through autograd. On a host with
#: an H200 a step of 6 compiled blocks took 8.9 ms, of which the GPU worked 5.0 (2026-11-21, docs/experiments.md).
COMPILED_BLOCK_SECONDS = 0.9e-3
#: What several ranks lose by waiting for the slowest in each step. Fitted.
STRAGGLER = 1.02
#: Share of a collective's time that shows although it overlaps: it takes units and bandwidth from the backward pass.
#: Fitted at NVLink's rates; over slower links it takes less a second. The rest hides behind this much of backward.
OVERLAP_COST, SLOW_LINK_OVERLAP_COST, OVERLAP_WINDOW = 0.6, 0.3, 0.9
#: The same under ZeRO-3, whose gathers block the modules that wait for them. Fitted to a checkpointed 6.9B Mamba on
#: 4 H200s, 4% slower under ZeRO-3 than under ZeRO-2; over slower links, PCIe's transfers among them, assumed.
ZERO3_OVERLAP_COST, ZERO3_SLOW_LINK_OVERLAP_COST = 0.95, 0.5
#: The same under FSDP2, from one pair of measurements that are not zerofit's own (decision 7): 0.6 to 0.8, by what was
#: reduced in which type. Over slower links taken to be DDP's.
FSDP_OVERLAP_COST, FSDP_SLOW_LINK_OVERLAP_COST = 0.7, 0.3
#: Seconds of the launching process for one group's gathering, or its reducing: what Mamba 1B and 3B took more than
#: under DDP on the same hosts (0.94 and 0.89 ms, 2 H200s; docs/experiments.md).
FSDP_GROUP_SECONDS = 900e-6

FORMULAS = (
    ("matrix products", "6 x P_blocks x M + 6 x V x C x M FLOPs over matrix rate x 0.88 x C/(C+c0) x M/(M+m0); c0 = "
     "343 and m0 = 250 at 790 TFLOP/s, in proportion to the rate below it",
     "rate: measured or data sheet; 0.88, c0, m0 fitted on H200 (docs/experiments.md)"),
    ("attention", "2 L C T x M FLOPs forward (causal half), 2.5 times that backward, over 0.40 x matrix rate",
     "Dao 2023 (FlashAttention-2), section 4.1; 0.40 fitted"),
    ("selective scan", "0.62 ps a token, channel and state forward and 1.75 ps backward at 790 TFLOP/s, more in "
     "proportion on slower GPUs", "measured on H200"),
    ("elementwise", "18 x C x L x M x h bytes forward (Mamba: 10 x C + 2 x D instead of 18 x C), twice that backward "
     "(x 1.2 eager), 16 bytes a logit (34 eager), over memory bandwidth",
     "counted in zerofit's models; bandwidth x 0.875"),
    ("recomputation", "the forward pass of the checkpointed blocks once more; light: norm, convolution and step size; "
     "selective: the scan too", "Chen et al. 2016"),
    ("launching", "7 us a kernel, 0.9 ms a compiled block, 0.5 ms a convolution; nothing with CUDA graphs; hooks: 2 us "
     "a parameter under DDP, 95 us under ZeRO-1/2, 0.53 ms a module and pass under ZeRO-3, 0.9 ms a group and pass "
     "under FSDP2; a micro-step takes the longer of this and the GPU's work", "fitted on H200"),
    ("communication", "all-reduce 2hP(N-1)/N once a step (DDP, ZeRO-1) or once a micro-step (ZeRO-2); ZeRO-1/2 "
     "all-gather hP(N-1)/N after the step; ZeRO-3 two all-gathers and a reduce-scatter of hP(N-1)/N each micro-step, "
     "FSDP2 as well (one all-gather with fsdp.reshard_after_forward false); over bus bandwidth; what overlaps costs "
     "0.6 of its time on NVLink (ZeRO-3 0.95, FSDP2 0.7), 0.3 (ZeRO-3 0.5) over slower links",
     "Rajbhandari et al. 2020, section 7; the sources of DeepSpeed 0.19.8 and PyTorch; 0.6, 0.95 and 0.7 fitted, the "
     "others assumed"),
    ("optimizer", "30 bytes a parameter (28 AdamW in one pass, 2 the norm); ZeRO 190 and FSDP2 30 bytes a parameter of "
     "the rank's 1/N; with 8-bit moments 12.2 ps a parameter at 790 TFLOP/s at least",
     "30 counted, 190 fitted, 12.2 measured on H200"),
    ("offload", "gradients to the host hP/N each micro-step, AdamW there 28P/N bytes a rank at the node's rate, "
     "parameters back hP/N; with parameters offloaded, hP/N in for each pass", "measured on H200: 51 and 37 GB/s, "
     "84 GB/s a node for AdamW"),
    ("convolutions", "FLOPs of all convolutions x samples over 0.5 x matrix rate (fp32 in TF32 where there is some), "
     "twice that backward; 6.2 elements moved for each of an output (4.65 compiled) over bandwidth; of timm's models a "
     "third of that for each element that a layer returns, linear layers and attention as above",
     "set to two measurements of ResNet-18 on one H200; not a fit over a range; no model of timm was measured"),
    ("frozen backbone", "the forward pass, the gradient of the head's weights, a third of launching",
     "counted; not measured"),
)  # fmt: skip


@dataclass(frozen=True)
class StepPrediction:
    """One optimizer step.

    Attributes:
        parts: seconds by part: ``compute``, ``recompute``, ``launch`` (what launching adds), ``communication`` (not
            hidden), ``optimizer``, ``offload``, ``overhead``.
        step_seconds: their sum.
        tokens_per_second: of all ranks; of a classifier, images.
        mfu: model FLOPs of the tokens over the data sheet's peak, all ranks.
        error: relative, stated.
        source: of the rates.
    """

    parts: dict[str, float]
    step_seconds: float
    tokens_per_second: float
    mfu: float
    error: float
    source: str


def predict_step(plan: Plan, found: Rates | None) -> StepPrediction | None:
    """A step's time (of a frozen phase, one of its own); None where `why_not_predicted` says why."""
    if found is None or plan.device != "cuda":
        return None
    work, model = work_of(plan.model), plan.model
    if isinstance(model, ResNetConfig | TimmConfig):
        micro_step = images.gpu_seconds(plan, model, found, _product_rates(found), ATTENTION_BACKWARD)
        if micro_step is None:
            return None
        trained = plan.trained_shapes()
        modules = len({name.rpartition(".")[0] for name in trained})
        launch = images.launch_seconds(plan, model, KERNEL_SECONDS, COMPILED_BLOCK_SECONDS)
        parts = _parts(plan, micro_step, launch + _hook_seconds(plan, len(trained), modules, 0.0), found)
    elif work is not None:
        parts = _parts(plan, _gpu_seconds(plan, work, found), _launch_seconds(plan, work), found)
    else:
        return None
    seconds = sum(parts.values())
    items_per_second = plan.global_batch * model.items_per_sample / seconds
    flops = model.flops_per_item() / (3 if plan.frozen else 1)  # of a frozen backbone the forward pass alone
    return StepPrediction(
        parts=parts,
        step_seconds=seconds,
        tokens_per_second=items_per_second,
        mfu=items_per_second * flops / (found.peak_flops * plan.world_size),
        error=found.error,
        source=found.source,
    )


def why_not_predicted(plan: Plan, found: Rates | None) -> str | None:
    """Why `predict_step` gives nothing, in a clause; None where it does, and without a GPU, where nobody expects it."""
    if plan.device != "cuda":
        return None
    if found is None:
        return "this GPU's rates are not known (`zerofit plan --calibrate`)"
    if isinstance(plan.model, TimmConfig):
        return "what this model computes was not counted when it was described" if plan.model.work is None else None
    known = isinstance(plan.model, ResNetConfig) or work_of(plan.model) is not None
    return None if known else f"what a model of kind {plan.model.kind} computes is not counted"


def _product_rates(found: Rates) -> images.ProductRates:
    """Of products of matrices by width and rows, and of attention, in FLOP/s; see `_gpu_seconds`."""
    fill = min(1.0, found.matrix_flops / REFERENCE_FLOPS)

    def rates(width: float, rows: float) -> tuple[float, float]:
        shares = width / (width + HALF_WIDTH * fill) * rows / (rows + HALF_TOKENS * fill)
        return found.matrix_flops * PRODUCT_SHARE * shares, found.matrix_flops * ATTENTION_SHARE

    return rates


def _parts(plan: Plan, micro_step: tuple[float, float, float], launch: float, found: Rates) -> dict[str, float]:
    """Of a step, from the forward pass, backward pass and recomputation of a micro-step on the GPU, and the time of
    launching them."""
    steps = plan.accumulation_steps
    forward, backward, recompute = micro_step
    straggle = STRAGGLER if plan.world_size > 1 else 1.0
    forward, backward, recompute = forward * straggle, backward * straggle, recompute * straggle
    on_gpu = forward + backward + recompute
    each, last, after = _communication(plan, found, backward + recompute)
    # A micro-step takes the longer of launching and what was launched, collectives included.
    idle = (steps - 1) * max(0.0, launch - on_gpu - each) + max(0.0, launch - on_gpu - last)
    return {
        "compute": steps * (forward + backward),
        "recompute": steps * recompute,
        "launch": idle,
        "communication": (steps - 1) * each + last + after,
        "optimizer": _optimizer_seconds(plan, found),
        "offload": _offload_seconds(plan, found, backward + recompute)
        + _input_seconds(plan, found, forward, backward + recompute),
        "overhead": STEP_SECONDS,
    }


def _gpu_seconds(plan: Plan, work: Work, found: Rates) -> tuple[float, float, float]:
    """Forward, backward and recomputation of one micro-step on the GPU, without launching and without communication."""
    tokens = plan.micro_batch * work.sample_tokens
    h, mode = 2 if plan.mixed else 4, "compiled" if plan.compile else "eager"
    product, attention_rate = _product_rates(found)(work.width, tokens)
    attention = work.attention_flops / attention_rate
    traffic = work.block_traffic * h / found.bandwidth * (1.0 if plan.compile else EAGER_TRAFFIC)
    logits = work.logits * LOGIT_BYTES[mode] / found.bandwidth
    scan = work.scan_elements * REFERENCE_FLOPS / found.matrix_flops
    blocks = work.block_flops / product + attention + traffic + SCAN_SECONDS * scan
    forward = tokens * (blocks + work.head_flops / product + logits / 3)
    backward = tokens * (
        2 * (work.block_flops + work.head_flops) / product
        + ATTENTION_BACKWARD * attention
        + 2 * traffic
        + SCAN_BACKWARD_SECONDS * scan
        + logits * 2 / 3
    )
    again = {
        "full": blocks,
        "light": work.light_flops / product + work.light_traffic * h / found.bandwidth,
    }
    again["selective"] = again["light"] + SCAN_SECONDS * scan
    return forward, backward, tokens * again[plan.recomputation] * _checkpointed_share(plan, work)


def _checkpointed_share(plan: Plan, work: Work) -> float:
    every = plan.activation_checkpointing_every
    return -(-work.blocks // every) / work.blocks if every else 0.0


def _launch_seconds(plan: Plan, work: Work) -> float:
    """What the process that launches a micro-step's kernels needs itself; nothing where a CUDA graph is replayed."""
    if plan.cuda_graphs:
        return 0.0
    block = work.kernels["compiled" if plan.compile else "eager"] * KERNEL_SECONDS
    block += COMPILED_BLOCK_SECONDS if plan.compile else 0.0
    seconds = work.blocks * block * (1 + _checkpointed_share(plan, work) / 3)
    return seconds + _hook_seconds(plan, work.tensors, work.modules, _checkpointed_share(plan, work))


def _hook_seconds(plan: Plan, tensors: int, modules: int, checkpointed: float) -> float:
    """What the strategy's hooks take of the launching process."""
    if plan.strategy == "zero3":
        return (2 + checkpointed) * modules * ZERO3_MODULE_SECONDS  # recomputation gathers once more
    if plan.strategy == "fsdp2":
        # Blocks and the rest; gathered in either pass, reduced once.
        return 3 * (plan.model.depth + 1) * FSDP_GROUP_SECONDS
    hook = ZERO_HOOK_SECONDS if plan.strategy.startswith("zero") else DDP_HOOK_SECONDS if plan.world_size > 1 else 0.0
    return tensors * hook


def _communication(plan: Plan, found: Rates, backward: float) -> tuple[float, float, float]:
    """Seconds that show: of each micro-step but the last, of the last, and after the optimizer."""
    n = plan.world_size
    if n == 1:
        return 0.0, 0.0, 0.0
    ring = (n - 1) / n
    h = 2 if plan.mixed else 4
    parameters = h * plan.parameters * ring
    gradients = (4 if plan.gradient_dtype == "fp32" else h) * plan.parameters * ring
    if plan.strategy == "zero3":
        moved = 2 * parameters / found.all_gather + gradients / found.reduce_scatter
        shown = _exposed(moved, 1.5 * backward, plan, found)  # the gathers of the forward pass overlap with that
        return shown, shown, 0.0
    if plan.strategy == "fsdp2":
        gathers = 2 if plan.fsdp.reshard_after_forward else 1
        moved = gathers * parameters / found.all_gather + gradients / found.reduce_scatter
        shown = _exposed(moved, 1.5 * backward, plan, found)
        return shown, shown, 0.0
    shown = _exposed(2 * gradients / found.all_reduce, backward, plan, found)
    gather = parameters / found.all_gather if plan.strategy in ("zero1", "zero2") else 0.0
    return (shown if plan.strategy == "zero2" else 0.0), shown, gather


def _exposed(moved: float, window: float, plan: Plan, found: Rates) -> float:
    """Seconds of a collective that the step is longer by, when it may overlap with `window` seconds of work."""
    if plan.strategy.startswith("zero") and not plan.zero.overlap_comm:
        return moved
    fast, slow = OVERLAP_COST, SLOW_LINK_OVERLAP_COST
    if plan.strategy == "zero3":
        fast, slow = ZERO3_OVERLAP_COST, ZERO3_SLOW_LINK_OVERLAP_COST
    if plan.strategy == "fsdp2":
        fast, slow = FSDP_OVERLAP_COST, FSDP_SLOW_LINK_OVERLAP_COST
    cost = fast if found.shares_units else slow
    return max(cost * moved, moved - (1 - cost) * OVERLAP_WINDOW * window)


def _optimizer_seconds(plan: Plan, found: Rates) -> float:
    """On the GPU; offloaded, it is part of `_offload_seconds`."""
    if plan.offload != "none":
        return 0.0
    more = _state_traffic(plan)
    if plan.strategy.startswith("zero"):
        return (ZERO_STEP_BYTES + more) * plan.parameters / plan.world_size / found.bandwidth
    usual = ADAM_BYTES if plan.mixed else ADAM_FP32_BYTES
    share = plan.world_size if plan.strategy == "fsdp2" else 1
    seconds = (usual + more) * plan.parameters / share / found.bandwidth
    if plan.optimizer.state == "8bit":
        seconds = max(seconds, CODES_SECONDS * plan.parameters / share * REFERENCE_FLOPS / found.matrix_flops)
    return seconds + orthogonal_flops(plan) / (PRODUCT_SHARE * found.matrix_flops)


def _state_traffic(plan: Plan) -> float:
    """Bytes a parameter that another optimizer than fp32 AdamW reads and writes more (or less): states there and back,
    no compute copy beside a bf16 master; under ZeRO, and for Muon and Adafactor, the fp32 gradient gathered first.
    Counted, not measured."""
    optimizer = plan.optimizer
    if optimizer.is_plain:
        return 8.0 if optimizer.ema_decay is not None else 0.0
    means = {"fp32": 4.0, "bf16": 2.0, "8bit": 1 + 4 / BLOCK}[optimizer.state] * len(MEANS[optimizer.kind])
    fewer = 2 * (8 - means) + (2 * 2 + 2 if optimizer.master == "bf16" else 0)
    gathered = plan.strategy.startswith("zero") or gathers_gradients(optimizer.kind, plan.device)
    return (8 if gathered else 0) - fewer + (8 if optimizer.ema_decay is not None else 0)


def orthogonal_flops(plan: Plan) -> float:
    """Of Muon's Newton-Schulz iterations over all matrices: 4 r^2 c + 2 r^3 each, r the shorter side."""
    if plan.optimizer.kind != "muon":
        return 0.0
    total = 0.0
    for group in planned_groups(plan):
        for shape in group.members.values() if group.kind == "muon" else ():
            r, c = sorted((shape[0], math.prod(shape[1:])))
            total += plan.optimizer.orthogonal_steps * (4 * r * r * c + 2 * r**3)
    return total


def _input_seconds(plan: Plan, found: Rates, forward: float, backward: float) -> float:
    """What moving the blocks' inputs to the host and back adds to a step: what does not hide behind the passes."""
    if plan.activation_offload == "none":
        return 0.0
    moved = sum(input_bytes(plan))
    out = max(0.0, moved / found.device_to_host - OVERLAP_WINDOW * forward)
    back = max(0.0, moved / found.host_to_device - OVERLAP_WINDOW * backward)
    return plan.accumulation_steps * (out + back)


def _offload_seconds(plan: Plan, found: Rates, backward: float) -> float:
    if plan.offload == "none":
        return 0.0
    part, h, steps = plan.parameters / plan.world_size, 2 if plan.mixed else 4, plan.accumulation_steps
    out = h * part / found.device_to_host
    # ZeRO-1 accumulates on the GPU and sends once; ZeRO-2 and 3 send in every micro-step.
    seconds = out * (1 if plan.strategy == "zero1" else steps)
    ranks = plan.world_size if plan.ranks_per_node is None else plan.ranks_per_node
    seconds += CPU_ADAM_BYTES * part * ranks / found.adam_bytes
    if plan.offload_parameters == "none":
        seconds += h * part / found.host_to_device
    else:
        fetched = 2 * h * part / found.host_to_device
        cost = ZERO3_SLOW_LINK_OVERLAP_COST
        seconds += steps * max(cost * fetched, fetched - (1 - cost) * OVERLAP_WINDOW * backward)
    if plan.offload == "nvme":
        # Master and moments in (12) and out (12), gradients in (4).
        seconds += 28 * part * ranks / found.nvme
    if plan.offload_parameters == "nvme":
        seconds += steps * 2 * h * part * ranks / found.nvme
    return seconds
