"""zerofit beside nanoGPT's own train.py: the same data, settings, budget and machine.

    zerofit data prepare shakespeare --out PEER/data/plays
    python benchmarks/beside_nanogpt.py --peer PEER --setting char --out char.json
    zerofit data prepare TEXTS --tokenizer gpt2 --split documents --val-fraction 0.02 --out PEER/data/text
    python benchmarks/beside_nanogpt.py --peer PEER --setting 124m --gpus 1 --out 124m-1gpu.json

PEER: a folder with nanoGPT's train.py, model.py and configurator.py. ``char`` is its published small setting on
characters (6 layers of 384, block 256, batch 64, dropout 0.2, 5,000 steps, learning rate 1e-3 to 1e-4); ``124m`` its
GPT-2 on BPE tokens (12 layers of 768, block 1024, learning rate 6e-4 to 6e-5) with 16 samples a step, on 1 GPU or
spread over 4, for 1,000 steps. All settings are given to both, evaluations too. Seconds are those of the whole command:
start, compilation and evaluations included. Best checkpoints are then evaluated on the whole validation split by the
same code. ``--steps`` shortens it, ``--small`` shrinks the model for a dry run.
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

#: nanoGPT's names. `folder` is the data's, `batch` the samples of a step on all GPUs.
SETTINGS: dict[str, dict[str, Any]] = {
    "char": {
        "folder": "plays", "batch": 64, "steps": 5000, "eval_interval": 500, "eval_batches": 100,
        "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2, "bias": False,
        "learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 100, "weight_decay": 0.1, "beta2": 0.99,
    },
    "124m": {
        "folder": "text", "batch": 16, "steps": 1000, "eval_interval": 250, "eval_batches": 50,
        "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "dropout": 0.0, "bias": False,
        "learning_rate": 6e-4, "min_lr": 6e-5, "warmup_iters": 100, "weight_decay": 0.1, "beta2": 0.95,
    },
}  # fmt: skip
SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 32, "batch": 4, "block_size": 64}
SCHEDULE = ("learning_rate", "min_lr", "warmup_iters", "weight_decay", "beta2")
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "dropout", "bias")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--setting", choices=SETTINGS, default="char")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("beside_nanogpt.json"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--eval-interval", type=int)
    parser.add_argument("--eval-batches", type=int)
    parser.add_argument("--cases", default="zerofit,nanogpt")
    parser.add_argument("--runs", type=Path, default=Path("/tmp/zerofit-beside"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--limit-seconds", type=float, default=200)
    parser.add_argument("zerofit", nargs="*", help="more arguments for zerofit, after --")
    args = parser.parse_args()
    args.peer = args.peer.resolve()
    given = {name: getattr(args, name) for name in ("steps", "eval_interval", "eval_batches")}
    setting = SETTINGS[args.setting] | {name: value for name, value in given.items() if value is not None}
    setting |= SMALL if args.small else {}
    found: dict[str, Any] = {"date": date.today().isoformat(), "setting": setting, "gpus": args.gpus, **versions()}
    for name in args.cases.split(","):
        try:
            found[name] = {"zerofit": ours, "nanogpt": theirs}[name](setting, args)
        except RuntimeError as error:
            found[name] = {"error": str(error)}
        print(name, json.dumps({k: v for k, v in found[name].items() if k != "train_losses"}), flush=True)
        args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def versions() -> dict[str, str]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"torch": torch.__version__, "gpu": gpu}


def command(program: list[str], folder: Path | None, limit_seconds: float) -> tuple[float, str]:
    """Wall seconds, and what it printed."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *program], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=limit_seconds,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{program} ended with {done.returncode}: {done.stdout[-3000:]}")
    return time.perf_counter() - started, done.stdout


def theirs(setting: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """nanoGPT's own train.py."""
    import torch

    out = f"out-{args.setting}-{args.gpus}"
    flags: dict[str, Any] = {
        "dataset": setting["folder"], "max_iters": setting["steps"], "lr_decay_iters": setting["steps"],
        "out_dir": out, "eval_interval": setting["eval_interval"], "eval_iters": setting["eval_batches"],
        "batch_size": setting["batch"] // args.gpus, "gradient_accumulation_steps": args.gpus, "log_interval": 10,
        "always_save_checkpoint": False,
        **{name: setting[name] for name in (*SHAPE, *SCHEDULE)},
    }  # fmt: skip
    if not torch.cuda.is_available():
        flags |= {"device": "cpu", "compile": False}
    program = ["train.py", *(f"--{name}={value}" for name, value in flags.items())]
    if args.gpus > 1:
        program = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus}", *program]
    seconds, text = command(program, args.peer, args.limit_seconds)
    times = sorted(float(value) for value in re.findall(r"time ([\d.]+)ms", text))
    return {
        "seconds": seconds,
        "val_losses": [float(loss) for loss in re.findall(r"val loss ([\d.]+)", text)],
        "train_losses": [float(loss) for loss in re.findall(r"iter \d+: loss ([\d.]+)", text)],
        "step_milliseconds": times[len(times) // 2],
        "best_on_all_of_val": evaluated(args.peer / out / "ckpt.pt", setting, args),
    }


def ours(setting: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """``zerofit train`` with the same settings."""
    import torch

    settings: dict[str, Any] = {
        **{f"model.{name}": setting[name] for name in SHAPE},
        "data.path": args.peer / "data" / setting["folder"], "data.prepare": "[]",
        "global_batch": setting["batch"], "micro_batch": setting["batch"] // args.gpus, "num_gpus": args.gpus,
        "strategy": "ddp" if args.gpus > 1 else "single", "max_steps": setting["steps"],
        "optimizer.learning_rate": setting["learning_rate"], "optimizer.beta2": setting["beta2"],
        "optimizer.weight_decay": setting["weight_decay"], "schedule.warmup_steps": setting["warmup_iters"],
        "schedule.min_learning_rate": setting["min_lr"], "eval_interval": setting["eval_interval"],
        "eval_batches": setting["eval_batches"], "sample_tokens": 0,
        "compile": str(torch.cuda.is_available()).lower(), "activation_checkpointing": "none",
        "name": f"{args.setting}-{time.time_ns()}", "runs_dir": args.runs,
    }  # fmt: skip
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    preset = "shakespeare_char" if args.setting == "char" else "gpt2"
    program = ["-m", "zerofit.cli.main", "train", "--preset", preset, *flags, *args.zerofit]
    seconds, _ = command(program, None, args.limit_seconds)
    run = args.runs / str(settings["name"])
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [event for event in events if event["kind"] == "step"]
    times = sorted(event["step_seconds"] * 1e3 for event in steps)
    return {
        "seconds": seconds,
        "val_losses": [event["val_loss"] for event in events if event["kind"] == "eval"],
        "train_losses": [event["loss"] for event in steps[::10]],
        "step_milliseconds": times[len(times) // 2],
        "best_on_all_of_val": evaluated(run, setting, args),
        "arguments": args.zerofit,
        "cuda_graphs": json.loads((run / "plan.json").read_text(encoding="utf-8"))["cuda_graphs"],
    }


def evaluated(path: Path, setting: dict[str, Any], args: argparse.Namespace) -> float:
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
    dataset = open_split(args.peer / "data" / setting["folder"], "val", config, seed=0)  # type: ignore[arg-type]
    size = max(1, 16384 // setting["block_size"])
    window = evaluation_window(dataset, Share(size, 1, 0, 1), -(-dataset.blocks // size))
    return evaluate_window(model, window, World(0, 1, 0, device), Inputs(device)).read()["loss"].mean


if __name__ == "__main__":
    main()
