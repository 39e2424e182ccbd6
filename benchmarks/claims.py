"""The tables of docs/claims.md: claims that circulate beside the arithmetic and zerofit's own numbers.

    python benchmarks/claims.py            writes the tables into docs/claims.md
    python benchmarks/claims.py --check    exit code 1 when the page holds other numbers

Everything here is computed: bytes from the planner's memory model, seconds from its speed model, measurements from
benchmarks/results. GB are 10^9 bytes, as in the claims.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from zerofit.config.models import GPT2Config
from zerofit.planning.calibration import rates
from zerofit.planning.gpus import GPUS
from zerofit.planning.ledger import Measurement, hardware_of, plan_of
from zerofit.planning.memory import state_bytes
from zerofit.planning.optimizer_states import checkpoint_bytes_a_parameter
from zerofit.planning.speed import predict_step

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "claims.md"
RESULTS = ROOT / "benchmarks" / "results" / "2026-11-21-h200-gpt2_xl-4gpu.json"
#: GPT-2 XL's own vocabulary, unpadded.
XL = GPT2Config(n_layer=48, n_head=25, n_embd=1600, block_size=1024, vocab_size=50257)
#: The 6.9B Mamba of the claims: 45 layers, width 4864, tied table.
MAMBA = 6_922_702_592
GB, TERA = 1e9, 1e12


def states(parameters: float, ranks: int, stage: int, *, gradients: bool = True) -> float:
    """Bytes of half-precision training with fp32 masters on one rank: 2P parameters, 2P gradients, 12P optimizer.

    ZeRO-1 shards the 12P over N ranks, ZeRO-2 the gradients too, ZeRO-3 the parameters too. Stage 0: nothing.
    """
    share = [1 / ranks if stage >= level else 1.0 for level in (3, 2, 1)]
    return parameters * (2 * share[0] + (2 * share[1] if gradients else 0) + 12 * share[2])


def gigabytes(size_bytes: float) -> str:
    return f"{size_bytes / GB:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def mamba_memory() -> str:
    """A 6.9B model: what the states alone need."""
    rows = []
    for claim, ranks in (("23.1", 4), ("16.1", 6), ("12.6", 8)):
        idle = states(MAMBA, ranks, 2, gradients=False)
        rows.append([f"ZeRO-2, {ranks} GPUs", f"{claim} GB", f"2P + 12P/{ranks} = {gigabytes(idle)} GB"])
    low = MAMBA * 10 / 4
    rows.append(["ZeRO-3, 4 GPUs", "15.0 GB", f"16P/4 = {gigabytes(states(MAMBA, 4, 3))} GB; with bf16 states "
                 f"10P/4 = {gigabytes(low)} GB"])  # fmt: skip
    rows.append(["data parallel", "87.5 GB", f"16P = {gigabytes(states(MAMBA, 4, 0))} GB"])
    saved, with_master = (MAMBA * width * (1 - 1 / 4) for width in (8, 12))
    rows.append(["sharding Adam over 4", "saves 55 GB a GPU", f"8P x 3/4 = {gigabytes(saved)} GB; with fp32 masters "
                 f"{gigabytes(with_master)} GB"])  # fmt: skip
    return table(["setting", "claim", "states alone, before activations"], rows)


def seven_billion() -> str:
    """Round figures without a number of GPUs."""
    p = 7e9
    least = math.ceil(16 * p / (6 * GB))
    rows = [
        ["7B, DDP", "28 GB", f"16P = {gigabytes(states(p, 1, 0))} GB"],
        ["7B, ZeRO-1", "20 GB", f"more than 4P = {gigabytes(4 * p)} GB on any number of GPUs"],
        ["7B, ZeRO-2", "12 GB", f"more than 2P = {gigabytes(2 * p)} GB on any number of GPUs"],
        ["7B, ZeRO-3", "6 GB", f"16P/N: from {least} GPUs on"],
        ["under 1B, DDP", "fits 8 GB", f"1B: {gigabytes(states(1e9, 1, 0))} GB"],
        ["1-7B, ZeRO-2 on 2", "fits 12 GB", f"7B: 2P + 14P/2 = {gigabytes(states(p, 2, 2))} GB"],
        ["7-30B, ZeRO-3 on 4", "fits 16 GB", f"30B: 16P/4 = {gigabytes(states(30e9, 4, 3))} GB"],
    ]
    return table(["setting", "claim", "states alone"], rows)


def savings() -> str:
    """What each stage saves, by number of GPUs."""
    rows = []
    for ranks in (1, 2, 4, 8, 64):
        parts = [1 - states(1, ranks, stage) / states(1, ranks, 0) for stage in (1, 2, 3)]
        rows.append([str(ranks), *(f"{part:.0%}" for part in parts), f"{1 / (1 - parts[2]):.0f}x"])
    return table(["GPUs", "ZeRO-1 saves", "ZeRO-2 saves", "ZeRO-3 saves", "ZeRO-3 as a factor"], rows)


def xl_row(micro_batch: int, accumulation_steps: int, gpu: str, precision: str) -> Measurement:
    """GPT-2 XL under ZeRO-2 on 4 GPUs, eager."""
    return Measurement.model_validate(
        {
            "date": "", "gpu": gpu, "link": "nvlink" if GPUS[gpu].nvlink else "pcie", "cpu_cores": 64, "model": XL,
            "strategy": "zero2", "world_size": 4, "micro_batch": micro_batch, "accumulation_steps": accumulation_steps,
            "precision": precision, "measured_gpu_peak_bytes": 0, "measured_step_seconds": 0,
        }
    )  # fmt: skip


def xl_memory() -> str:
    """GPT-2 XL under ZeRO-2 on 4 GPUs, micro-batch 1 x 8, fp16: the planner's model states and a measurement."""
    plan = plan_of(xl_row(1, 8, "h200", "fp16"))
    measured = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"]["zero2-fp16-acc8"]
    p, items = plan.parameters, state_bytes(plan)
    rows = [[name, gigabytes(size)] for name, size in items.items()]
    rows.append(["all states between steps", gigabytes(sum(items.values()))])
    rows.append(["measured peak on an H200: allocated", gigabytes(measured["peak_allocated_bytes"])])
    rows.append(["measured peak on an H200: reserved", gigabytes(measured["peak_reserved_bytes"])])
    rows.append(["for comparison: Adam's moments unsharded, 8P", gigabytes(8 * p)])
    rows.append(["the same with fp32 masters, 12P", gigabytes(12 * p)])
    return table(["item", "GB on one GPU"], rows)


def disk() -> str:
    """Four checkpoints of GPT-2 XL."""
    p, one = XL.parameter_count(), checkpoint_bytes_a_parameter("adamw", ema=False) * XL.parameter_count()
    rows = [
        ["DeepSpeed's own, 14P", gigabytes(14 * p), gigabytes(4 * 14 * p)],
        ["zerofit's, 12P", gigabytes(one), gigabytes(4 * one)],
    ]
    return table(["checkpoint of GPT-2 XL", "GB each", "GB for four"], rows)


def xl_speed() -> str:
    """What a claimed step time would mean, and what the speed model expects there."""
    flops = XL.flops_per_item()
    plan, hardware = (f(xl_row(1, 32, "v100-16", "fp16")) for f in (plan_of, hardware_of))
    predicted = predict_step(plan, rates(hardware, plan.precision))
    assert predicted is not None
    measured = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"]["zero2-fp16-acc8"]
    rows = []
    for milliseconds in (303, 450, 1500):
        reached = 32 * 1024 * flops / (milliseconds / 1e3) / TERA
        rows.append([f"GPT-2 XL, 1 x 32 on 4 V100: {milliseconds} ms", f"{reached:,.0f} TFLOP/s a GPU", "125 TFLOP/s"])
    mamba = 6 * MAMBA * 8 * 4096 * 0.8 / TERA
    rows.append(["7B, T=4096, 1 x 8 on 4 RTX 4090: 0.8 steps/s", f"{mamba:,.0f} TFLOP/s a GPU", "165 TFLOP/s"])
    after = (
        f"\n\nThe planner expects {predicted.step_seconds:.1f} s for the first (within {predicted.error:.0%}), and "
        f"four H200s take {measured['step_seconds'] * 1e3:.0f} ms for a quarter of that work (1 x 8): measured."
    )
    return table(["claim", "what it would need", "the card's peak"], rows) + after


def zero3_speed() -> str:
    """ZeRO-3 against DDP, GPT-2 XL on 4 H200s."""
    cases = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"]
    eager = json.loads(RESULTS.with_name(RESULTS.stem + "-zero3-eager.json").read_text(encoding="utf-8"))["cases"]
    ours = eager["zero3"]["tokens_per_second"] / cases["ddp"]["tokens_per_second"]
    stock = cases["peer-zero3"]["tokens_per_second"] / cases["peer-ddp"]["tokens_per_second"]
    rows = [
        ["zerofit, ZeRO-3 eager against DDP compiled", f"{ours:.0%}"],
        ["nanoGPT's model compiled: DeepSpeed ZeRO-3 against DDP", f"{stock:.0%}"],
    ]
    return table(["measured on 4 x H200", "share of DDP's tokens/s"], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    block.__name__: block for block in (mamba_memory, seven_billion, savings, xl_memory, disk, xl_speed, zero3_speed)
}


def render(page: str) -> str:
    """The page with every block between ``<!-- NAME -->`` and ``<!-- end -->`` computed anew.

    Raises:
        KeyError: a block that does not exist.
    """

    def fill(found: re.Match[str]) -> str:
        return f"<!-- {found.group(1)} -->\n{BLOCKS[found.group(1)]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    page = PAGE.read_text(encoding="utf-8")
    if not parser.parse_args().check:
        PAGE.write_text(render(page), encoding="utf-8")
    elif render(page) != page:
        sys.exit("docs/claims.md holds other numbers than the planner: run `python benchmarks/claims.py`.")


if __name__ == "__main__":
    main()
