"""zerofit's ResNet-18 beside torchvision's under one recipe, and under every strategy: the same validation accuracy.

    python benchmarks/resnet_parity.py --pictures FOLDER_OF_CLASSES --out results.json [--epochs 5] [--seeds 1]

The reference is a loop in plain PyTorch around ``torchvision.models.resnet18``: the same initial weights, the same
batches, AdamW, clipping and schedule. Beside a CPU-only PyTorch the import of a CUDA build of torchvision fails unless
the schemas of its operators are registered first; that is done here too.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from zerofit.config.load import load_config
from zerofit.config.schema import Config
from zerofit.data.loader import Share
from zerofit.data.prepare.images import prepare_images
from zerofit.models.resnet import SPEC
from zerofit.tasks.image_classification import TASK, image_model, pictures_of
from zerofit.training.schedule import learning_rate
from zerofit.training.start import with_model_of_data

BATCH = 64
CASES = {"single": 1, "ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2, "fsdp2": 2}


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = write_config(folder, arguments)
        prepare_images(pictures_of(load_config(source, None).config), workers=1)
        found: dict[str, Any] = {"torch": torch.__version__, "arguments": vars(arguments) | {"out": None}, "rows": []}
        for seed in range(arguments.seeds):
            for case in ("torchvision", *arguments.cases.split(",")):
                if case == "torchvision":
                    row = reference(source, seed)
                else:
                    row = run_zerofit(source, folder, f"{case}-{seed}", case, CASES[case], seed)
                found["rows"].append({"seed": seed, "case": case, "ranks": CASES.get(case, 1), **row})
                print(json.dumps(found["rows"][-1]), flush=True)
                arguments.out.write_text(json.dumps(found, indent=1, default=str), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=Path, required=True, help="folder with a folder of pictures a class")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--val-fraction", type=float, default=0.3)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def write_config(folder: Path, arguments: argparse.Namespace) -> Path:
    size, files = arguments.size, sum(1 for path in arguments.pictures.rglob("*") if path.is_file())
    steps = arguments.epochs * math.ceil(files * (1 - arguments.val_fraction) / BATCH)
    config = {
        "model": {"kind": "resnet", "layers": 18},
        "data": {
            "kind": "images", "path": str(folder / "data"), "prepare": [str(arguments.pictures.absolute())],
            "cache_size": size, "image_size": size, "eval_resize": size, "val_fraction": arguments.val_fraction,
            "augment": {"crop_scale_min": 0.6},
        },
        "optimizer": {"learning_rate": 2e-3, "beta2": 0.999, "weight_decay": 0.05},
        "schedule": {"warmup_steps": 10},
        "global_batch": BATCH, "max_steps": steps, "eval_interval": steps, "eval_batches": 1, "precision": "fp32",
        "device": arguments.device, "save_interval": "never", "save_on_improvement": False,
        "runs_dir": str(folder / "runs"),
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def run_zerofit(source: Path, folder: Path, name: str, strategy: str, ranks: int, seed: int) -> dict[str, Any]:
    """Through the command line; the losses and the last evaluation out of its events."""
    command = [sys.executable, "-m", "zerofit.cli.main", "train", str(source), "--name", name, "--strategy", strategy]
    command += ["--num_gpus", str(ranks), "--seed", str(seed)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    events = [json.loads(line) for line in (folder / "runs" / name / "events.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["kind"] == "step"]
    last = [event for event in events if event["kind"] == "eval"][-1:]
    return summary(losses, last[0]["val_accuracy"] if last else math.nan, time.perf_counter() - started)


def summary(losses: list[float], accuracy: float, seconds: float) -> dict[str, Any]:
    return {"val_accuracy": accuracy, "first_losses": losses[:5], "last_loss": losses[-1], "seconds": seconds}


def reference(source: Path, seed: int) -> dict[str, Any]:
    """A plain PyTorch loop around torchvision's model."""
    config: Config = with_model_of_data(load_config(source, None, [("seed", str(seed))])).config
    model = torchvision_resnet18(image_model(config.model).classes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(SPEC.init(config.model, name, seed))
    device = torch.device(config.device)
    model.to(device)
    feed = TASK.open(config, config.model, Share(BATCH, 1, 0, 1), pin_memory=device.type == "cuda")
    transform = feed.transform
    assert transform is not None
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim >= 2) is decays], "weight_decay": 0.05 * decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    losses, started = [], time.perf_counter()
    for step in range(config.max_steps):
        (batch,) = feed.train.window(step)
        inputs = transform({name: tensor.to(device) for name, tensor in batch.inputs.items()}, True)
        loss = torch.nn.functional.cross_entropy(model(inputs["images"]), inputs["targets"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    right = count = 0
    with torch.no_grad():
        for batch in feed.evaluation["val"]:
            inputs = transform({name: tensor.to(device) for name, tensor in batch.inputs.items()}, False)
            real = inputs["targets"] >= 0
            right += int((model(inputs["images"]).argmax(1) == inputs["targets"])[real].sum())
            count += int(real.sum())
    feed.train.close()
    return summary(losses, right / count, time.perf_counter() - started)


def torchvision_resnet18(classes: int) -> torch.nn.Module:
    if not torch.cuda.is_available() and "torchvision" not in sys.modules:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    model: torch.nn.Module = torchvision.models.resnet18(num_classes=classes)
    return model


if __name__ == "__main__":
    main()
