"""Low-bit optimizer states against fp32 on real text: the loss curves, the bytes, and the time of a step.

    python benchmarks/low_bit.py --out low_bit.json            # a small GPT-2 on Shakespeare's plays, on this machine
    python benchmarks/low_bit.py --preset gpt2 --steps 1000 --micro-batch 8   # on a GPU
    python benchmarks/low_bit.py --kernel                      # on a GPU: the fused step alone, GB/s
    python benchmarks/low_bit.py --step --out step.json        # on a GPU: the flat optimizer's, in one pass or not

Every run starts from the same weights and sees the same samples; the learning rate is the preset's in each. Also
other optimizers (``--cases lion,muon``) with the learning rates below.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zerofit.checkpoint.model import initial_reader
from zerofit.config.load import load_config
from zerofit.config.models import GPT2Config
from zerofit.data.loader import Share
from zerofit.engines.build import build
from zerofit.engines.flat_optimizer import FlatOptimizer
from zerofit.kernels.optimizer_step import Figures, Moment, Rule, step
from zerofit.models import model_spec
from zerofit.planning.choose import choose
from zerofit.planning.hardware import probe
from zerofit.planning.plan import OptimizerPlan
from zerofit.tasks import task_of
from zerofit.training.schedule import learning_rate
from zerofit.training.start import with_data
from zerofit.types import World

#: Name -> settings over the preset.
CASES: dict[str, list[tuple[str, str]]] = {
    "fp32": [],
    "bf16 moments": [("optimizer.state", "bf16")],
    "8-bit moments": [("optimizer.state", "8bit")],
    "bf16 master": [("optimizer.master", "bf16")],
    "bf16 master, bf16 moments": [("optimizer.master", "bf16"), ("optimizer.state", "bf16")],
    "bf16 master, 8-bit moments": [("optimizer.master", "bf16"), ("optimizer.state", "8bit")],
    "lion": [("optimizer.kind", "lion"), ("learning_rate", "5e-4"), ("schedule.min_learning_rate", "5e-5")],
    "muon": [("optimizer.kind", "muon")],
    "adafactor": [
        ("optimizer.kind", "adafactor"), ("learning_rate", "3e-2"), ("schedule.min_learning_rate", "3e-3")
    ],
    "sgd": [("optimizer.kind", "sgd"), ("learning_rate", "1.0"), ("schedule.min_learning_rate", "0.1")],
}  # fmt: skip
LOW_BIT = tuple(CASES)[:6]
#: With --step. Name -> optimizer, and the compute type.
STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "adamw, bf16 copy": ({}, "bf16"),
    "adamw, fp32": ({}, "fp32"),
    "adamw, bf16 copy, average": ({"ema_decay": 0.999}, "bf16"),
    "adamw, bf16 moments and master": ({"state": "bf16", "master": "bf16"}, "bf16"),
    "adamw, 8-bit moments, bf16 master": ({"state": "8bit", "master": "bf16"}, "bf16"),
    "lion, bf16 copy": ({"kind": "lion"}, "bf16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="shakespeare_char")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", default="1337")
    parser.add_argument("--precision", default="bf16", help="fp32 for cases without a bf16 master")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings over the preset")
    parser.add_argument("--cases", default=",".join(LOW_BIT), help="comma and names; a comma inside a name as +")
    parser.add_argument("--kernel", action="store_true")
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--layers", type=int, default=53, help="with --step: 53 make 1.71e9 parameters")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.kernel:
        rows = [time_kernel(state, master) for state in ("fp32", "bf16", "8bit") for master in ("fp32", "bf16")]
    elif args.step:
        rows = [row for name in STEPS for row in time_step(name, args.layers)]
    else:
        names = LOW_BIT if args.cases == ",".join(LOW_BIT) else [n.replace("+", ", ") for n in args.cases.split(",")]
        rows = [train(args, name, int(seed)) for seed in args.seeds.split(",") for name in names]
    if args.out:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        args.out.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1))


def train(args: Any, name: str, seed: int) -> dict[str, Any]:
    """One run on one process: losses, the last of them over the whole validation split's fixed samples."""
    settings = [
        *(tuple(text.split("=", 1)) for text in args.set),
        ("precision", args.precision), ("strategy", "single"), ("num_gpus", "1"), ("max_steps", str(args.steps)),
        ("seed", str(seed)), *CASES[name],
    ]  # fmt: skip
    if args.micro_batch:
        settings.append(("micro_batch", str(args.micro_batch)))
    from rich.console import Console

    config = with_data(load_config(None, args.preset, settings), Console()).config
    plan = choose(config, probe()).plan
    device = torch.device(plan.device, 0) if plan.device == "cuda" else torch.device("cpu")
    engine, spec = build(plan, model_spec(plan.model.kind), World(0, 1, 0, device)), model_spec(plan.model.kind)
    engine.load(initial_reader(spec, plan.model, plan.seed))
    share = Share(plan.micro_batch, plan.accumulation_steps, 0, 1)
    feed = task_of(plan.model).open(config, plan.model, share, pin_memory=plan.device == "cuda")
    losses = []
    began = time.perf_counter()
    for number in range(args.steps):
        pending = engine.train_step(feed.train.window(number), learning_rate(config, number), number)
        losses.append(pending.read().loss)
    seconds = time.perf_counter() - began
    validation = engine.eval_step(feed.evaluation["val"]).read()["loss"].mean
    held = engine.memory()
    row = {
        "case": name,
        "seed": seed,
        "val_loss": validation,
        "loss_of_last_50": sum(losses[-50:]) / len(losses[-50:]),
        "state_bytes_a_parameter": sum(held.values()) / plan.parameters,
        "step_milliseconds": 1000 * seconds / args.steps,
        "losses": losses[:: max(1, args.steps // 50)],
    }
    feed.train.close()
    engine.close()
    print(json.dumps({key: value for key, value in row.items() if key != "losses"}), flush=True)
    return row


def time_kernel(state: Any, master: str) -> dict[str, Any]:
    """The fused AdamW step over 256 Mi elements: milliseconds, and GB/s of what it must read and write."""
    n, device, rule = 256 * 1024**2, torch.device("cuda"), Rule()
    weights = torch.randn(n, device=device, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[master])
    gradient = torch.randn(n, device=device, dtype=torch.bfloat16)
    moments = tuple(Moment(n, state, signed, device) for signed in rule.signed_moments)
    one = torch.ones((), device=device)
    figures = Figures.of(rule, one, one, torch.zeros_like(one))
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step(rule, gradient, weights, moments, figures, lr=1e-4, weight_decay=0.1, seed=1, stream=0)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    moved = gradient.nbytes + 2 * weights.nbytes + 2 * sum(moment.nbytes for moment in moments)
    milliseconds = sorted(times)[len(times) // 2]
    row = {"state": state, "master": master, "milliseconds": milliseconds, "gb_per_second": moved / milliseconds / 1e6}
    print(json.dumps(row), flush=True)
    return row


def time_step(name: str, layers: int) -> Iterator[dict[str, Any]]:
    """`FlatOptimizer.step` over the shapes of a deeper GPT-2 XL: in one pass, and with gathered gradients. Milliseconds
    of the GPU and of the host, GB/s of what must be read and written, memory that the step takes for itself."""
    optimizer, compute = STEPS[name]
    dtype, device = {"fp32": torch.float32, "bf16": torch.bfloat16}[compute], torch.device("cuda")
    model = GPT2Config(n_layer=layers, n_head=25, n_embd=1600, block_size=1024, vocab_size=50257, pad_vocab_to=64)
    weights = {
        key: torch.nn.Parameter(torch.randn(shape, dtype=dtype, device=device))
        for key, shape in model.parameter_shapes().items()
    }
    gradients = {parameter: torch.randn_like(parameter) for parameter in weights.values()}
    decaying = model.decaying()
    own = FlatOptimizer(weights, decaying.__contains__, OptimizerPlan(**optimizer), gradients.__getitem__)
    moved = sum(gradient.nbytes for gradient in gradients.values())
    moved += sum(2 * state.nbytes for group in own.groups for state in group.states.values())
    moved += sum(parameter.nbytes for parameter in weights.values()) if own.copies else 0
    one = torch.ones((), device=device)
    for in_one_pass in (True, False, True, False):  # twice: the machine's clock may move
        own.in_one_pass, gpu, host = in_one_pass, [], []
        for _ in range(3):
            own.step(1e-4, one, 0 * one)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(12):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            began = time.perf_counter()
            own.step(1e-4, one, 0 * one)
            host.append(1000 * (time.perf_counter() - began))
            end.record()
            end.synchronize()
            gpu.append(begin.elapsed_time(end))
        milliseconds = sorted(gpu)[len(gpu) // 2]
        row = {
            "case": name,
            "way": "one pass" if in_one_pass else "gathering",
            "parameters": model.parameter_count(),
            "milliseconds": milliseconds,
            "host_milliseconds": sorted(host)[len(host) // 2],
            "gb_per_second": moved / milliseconds / 1e6,
            "step_mib": (torch.cuda.max_memory_allocated() - before) / 2**20,
        }
        print(json.dumps(row), flush=True)
        yield row
    for group in own.groups:
        if group.one_pass is None or not group.one_pass.runs(group.flat, own.places(group)):
            raise SystemExit("the kernel of the one pass did not run: see the warning above; both ways are the same")


if __name__ == "__main__":
    main()
