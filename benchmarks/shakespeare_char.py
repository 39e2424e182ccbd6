"""nanoGPT's published small setting on Shakespeare's characters, beside nanoGPT itself: same text, same budget.

    zerofit data prepare shakespeare --out PEER/data/plays
    python benchmarks/shakespeare_char.py --peer PEER --out shakespeare_char.json

PEER: a folder with nanoGPT's train.py, model.py, configurator.py and config/train_shakespeare_char.py. Its settings (6
layers of 384, block 256, batch 64, dropout 0.2, 5,000 steps, learning rate 1e-3 to 1e-4) are given to both, evaluations
too: every ``--eval-interval`` steps over ``--eval-batches`` batches of each split. Seconds are those of the whole
command, start, compilation and evaluations included. Both best checkpoints are then evaluated on the whole validation
split by the same code. ``--steps`` shortens it for a dry run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("shakespeare_char.json"))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--eval-interval", type=int, default=500)
    parser.add_argument("--eval-batches", type=int, default=100)
    parser.add_argument("--cases", default="zerofit,nanogpt")
    parser.add_argument("--runs", type=Path, default=Path("/tmp/zerofit-char"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--limit-seconds", type=float, default=200)
    parser.add_argument("zerofit", nargs="*", help="more arguments for zerofit, after --")
    args = parser.parse_args()
    args.peer = args.peer.resolve()
    found: dict[str, Any] = {"date": date.today().isoformat(), "steps": args.steps}
    for name in args.cases.split(","):
        found[name] = {"zerofit": ours, "nanogpt": theirs}[name](args)
        print(name, json.dumps(found[name]), flush=True)
        args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def command(program: list[str], folder: Path | None, limit_seconds: float) -> tuple[float, str]:
    """Wall seconds, and what it printed."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *program], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=limit_seconds,
    )  # fmt: skip
    if done.returncode:
        print(done.stdout[-3000:])
        raise SystemExit(f"{program} ended with {done.returncode}")
    return time.perf_counter() - started, done.stdout


def theirs(args: argparse.Namespace) -> dict[str, Any]:
    """nanoGPT's own train.py."""
    import torch

    flags = {"dataset": "plays", "max_iters": args.steps, "lr_decay_iters": args.steps, "out_dir": "out",
             "eval_interval": args.eval_interval, "eval_iters": args.eval_batches}  # fmt: skip
    if not torch.cuda.is_available():
        flags |= {"device": "cpu", "compile": False}
    if args.small:
        flags |= {"n_layer": 1, "n_head": 2, "n_embd": 32, "batch_size": 4}
    program = ["train.py", "config/train_shakespeare_char.py", *(f"--{name}={value}" for name, value in flags.items())]
    seconds, text = command(program, args.peer, args.limit_seconds)
    losses = [float(loss) for loss in re.findall(r"val loss ([\d.]+)", text)]
    times = [float(value) for value in re.findall(r"time ([\d.]+)ms", text)]
    times.sort()
    return {
        "seconds": seconds,
        "val_losses": losses,
        "step_milliseconds": times[len(times) // 2],
        "best_on_all_of_val": evaluated(args.peer / "out" / "ckpt.pt", args),
    }


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """``zerofit train`` with the same settings."""
    import torch

    settings: dict[str, Any] = {
        "model.n_layer": 6, "model.n_head": 6, "model.n_embd": 384, "model.block_size": 256, "model.dropout": 0.2,
        "model.bias": False, "data.path": args.peer / "data" / "plays", "data.prepare": "[]",
        "global_batch": 64, "micro_batch": 64, "strategy": "single", "num_gpus": 1, "max_steps": args.steps,
        "optimizer.learning_rate": 1e-3, "optimizer.beta2": 0.99, "optimizer.weight_decay": 0.1,
        "schedule.warmup_steps": 100, "schedule.min_learning_rate": 1e-4,
        "eval_interval": args.eval_interval, "eval_batches": args.eval_batches, "sample_tokens": 0,
        "compile": str(torch.cuda.is_available()).lower(), "activation_checkpointing": "none",
        "name": f"char-{time.time_ns()}", "runs_dir": args.runs,
    }  # fmt: skip
    if args.small:
        settings |= {"model.n_layer": 1, "model.n_head": 2, "model.n_embd": 32, "global_batch": 4, "micro_batch": 4}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    program = ["-m", "zerofit.cli.main", "train", "--preset", "shakespeare_char", *flags, *args.zerofit]
    seconds, _ = command(program, None, args.limit_seconds)
    run = args.runs / str(settings["name"])
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    times = sorted(event["step_seconds"] * 1e3 for event in events if event["kind"] == "step")
    return {
        "seconds": seconds,
        "val_losses": [event["val_loss"] for event in events if event["kind"] == "eval"],
        "step_milliseconds": times[len(times) // 2],
        "best_on_all_of_val": evaluated(run, args),
        "arguments": args.zerofit,
    }


def evaluated(path: Path, args: argparse.Namespace) -> float:
    """Loss of a checkpoint on every block of the validation split, in fp32."""
    import torch

    from zerofit.checkpoint.foreign import open_foreign
    from zerofit.checkpoint.model import load_model
    from zerofit.checkpoint.source import own_checkpoint
    from zerofit.data.loader import Share, evaluation_window
    from zerofit.data.tokens import open_split
    from zerofit.engines.common import Inputs, evaluate_window
    from zerofit.types import World

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = own_checkpoint(path, "best") if path.is_dir() else open_foreign(path)
    assert source is not None
    model, config = load_model(source, device)
    dataset = open_split(args.peer / "data" / "plays", "val", config, seed=0)  # type: ignore[arg-type]
    window = evaluation_window(dataset, Share(64, 1, 0, 1), -(-dataset.blocks // 64))
    return evaluate_window(model, window, World(0, 1, 0, device), Inputs(device)).read()["loss"].mean


if __name__ == "__main__":
    main()
