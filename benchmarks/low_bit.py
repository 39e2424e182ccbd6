"""Low-bit optimizer states against fp32 on real text: the loss curves, the bytes, and the time of a step.

    python benchmarks/low_bit.py --out low_bit.json            # a small GPT-2 on Shakespeare's plays, on this machine
    python benchmarks/low_bit.py --preset gpt2 --steps 1000 --micro-batch 8   # on a GPU
    python benchmarks/low_bit.py --kernel                      # on a GPU: the fused step alone, GB/s

Every run starts from the same weights and sees the same samples; the learning rate is the preset's in each. Also
other optimizers (``--cases lion,muon``) with the learning rates below.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from zerofit.checkpoint.model import initial_reader
from zerofit.config.load import load_config
from zerofit.data.loader import Share
from zerofit.engines.build import build
from zerofit.kernels.optimizer_step import Figures, Moment, Rule, step
from zerofit.models import model_spec
from zerofit.planning.choose import choose
from zerofit.planning.hardware import probe
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
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.kernel:
        rows = [time_kernel(state, master) for state in ("fp32", "bf16", "8bit") for master in ("fp32", "bf16")]
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


if __name__ == "__main__":
    main()
