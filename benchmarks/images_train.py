"""Training ResNet-18 on GPUs: speed and memory against a plain PyTorch loop, the data path, small cards, several GPUs.

    python benchmarks/images_train.py --out images_train.json [--only speed,rows,fed,cards,scaling] [--gpus 4]
        [--data PREPARED_PICTURES]
    python benchmarks/images_train.py --out dry.json --device cpu --tiny        # what runs, on a CPU, in minutes

``speed``: the plain fp32 loop (torchvision's model, AdamW) against zerofit in fp16 and bf16, eager, compiled and with
CUDA graphs, batch 16 and 64, with peak memory. ``rows``: batch 16, 32 and 64 plain, fp16 and offloaded, the rows that
circulate for a small card. ``fed``: batches from a prepared folder's cache (`zerofit data prepare images`), or straight
from its files, through augmentation, against the same training on random pictures that are on the GPU. ``cards``: with
all but 2, 4, 6 and 8 GB of the GPU held by another process, the micro-batches that the planner says fit, fit tightly,
and do not. ``scaling``: images a second on 1, 2 and 4 GPUs under DDP. Every case is a process of its own with a time
limit, and the results are written after each. ``--data`` is needed for ``fed``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

MIB = 1024**2
CASE_SECONDS = 240.0
WARM_UP, STEPS = 15, 40
CARDS_MIB = {"2 GB": 2_000, "4 GB": 4_000, "6 GB": 6_000, "8 GB": 8_000}
#: What circulates for ResNet-18 on one small card: batch -> GB plain, GB with fp16 and offload (None: out of memory).
CLAIMED = {16: (1.8, 1.2), 32: (3.2, 2.0), 64: (None, 3.5)}
GROUPS = ("speed", "rows", "fed", "cards", "scaling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("images_train.json"))
    parser.add_argument("--only", default=",".join(GROUPS))
    parser.add_argument("--gpus", type=int, default=1, help="for scaling: 1, 2 and 4 up to this")
    parser.add_argument("--data", type=Path, help="prepared folder of pictures, for fed")
    parser.add_argument("--reads", nargs="+", default=["cache", "files"], help="for fed")
    parser.add_argument("--cards", default=",".join(CARDS_MIB), help="for cards")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64], help="for speed")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="32 x 32 pictures, few steps: a trial of the program")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no case after that")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        run_case(json.loads(args.case))
    else:
        run_all(args)


def run_all(args: argparse.Namespace) -> None:
    """Every case in its process; results after each."""
    import torch

    started = time.monotonic()
    head = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "claimed_gb": CLAIMED,
        "arguments": sys.argv[1:],
    }
    if args.device == "cuda":
        head |= {"gpu": torch.cuda.get_device_name(), "cores": len(os.sched_getaffinity(0))}
    rows: list[dict[str, Any]] = []
    for group in args.only.split(","):
        for case in cases_of(group, args):
            if time.monotonic() - started > args.budget_seconds:
                break
            rows.append({"group": group, **case, **outcome_of(case)})
            print(f"{time.monotonic() - started:4.0f} s {json.dumps(rows[-1])}", flush=True)
            args.out.write_text(json.dumps({**head, "rows": rows}, indent=1), encoding="utf-8")
    print(summary(rows))


def cases_of(group: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Cases of a group; what a case runs in (a full GPU) is held while it is the latest one."""
    base = {"device": args.device, "size": 32 if args.tiny else 224, "ranks": 1, "batch": 16,
            "steps": 3 if args.tiny else STEPS, "warm_up": 1 if args.tiny else WARM_UP}  # fmt: skip
    if group == "speed":
        variants = [{"kind": "plain", "precision": "fp32"}]
        variants += [{"kind": "zerofit", "precision": "fp16", "graphs": graphs, "compile": compile}
                     for graphs in (True, False) for compile in ("default", None)]  # fmt: skip
        variants += [{"kind": "zerofit", "precision": "bf16", "graphs": True, "compile": "default"}]
        variants += [{"kind": "zerofit", "precision": "fp32", "graphs": True}]
        for batch in args.batches:
            yield from (base | {"batch": batch} | variant for variant in variants)
    elif group == "rows":
        for batch in CLAIMED:
            yield base | {"batch": batch, "kind": "plain", "precision": "fp32"}
            yield base | {"batch": batch, "kind": "zerofit", "precision": "fp16"}
            offload = {"strategy": "zero2", "offload": "cpu"}
            yield base | {"batch": batch, "kind": "zerofit", "precision": "fp16", **offload}
    elif group == "fed":
        batch = 16 if args.tiny else 256
        fed = base | {"batch": batch, "kind": "zerofit", "precision": "fp16" if args.device == "cuda" else "fp32"}
        fed |= {} if args.tiny else {"steps": 240, "warm_up": 40}
        for graphs in (True, False) if args.device == "cuda" else (False,):
            how = {"compile": "default", "graphs": graphs}
            yield fed | how
            for read in args.reads if args.data else ():
                yield fed | how | {"data": str(args.data), "read": read}
    elif group == "scaling":
        many = base | {"batch": 16 if args.tiny else 256, "kind": "zerofit"}
        precision = "bf16" if args.device == "cuda" else "fp32"
        for ranks in (n for n in (1, 2, 4) if n <= args.gpus):
            strategy = "ddp" if ranks > 1 else "single"
            yield many | {"ranks": ranks, "strategy": strategy, "precision": precision, "compile": "default"}
            yield many | {"ranks": ranks, "strategy": strategy, "precision": precision}
    elif group == "cards":
        yield from card_cases(base, args)


def card_cases(base: dict[str, Any], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each card and recipe the largest micro-batch that fits; then the largest that fits tightly; then a tenth
    more, which should not."""
    from ballast import ballast
    from zerofit.config.load import load_config
    from zerofit.planning.described import Description, described_hardware
    from zerofit.planning.hardware import probe
    from zerofit.planning.recipes import recipes

    config = load_config(None, "animals90", [("model.input_size", str(base["size"]))]).config
    here = probe(Path(), None)
    found = {
        card: recipes(config, described_hardware(Description(gpu="h200", gpu_memory=f"{free}MiB"), here))
        for card, free in CARDS_MIB.items()
    }
    for said in ("fits", "tight", "too large"):
        for card in args.cards.split(","):
            with ballast(CARDS_MIB[card]) if args.device == "cuda" else nullcontext():
                for recipe in found[card]:
                    plan, most = recipe.candidate.plan, recipe.tight_micro_batch
                    if not most:
                        continue
                    sizes = {"fits": recipe.micro_batch, "tight": most, "too large": int(most * 1.1) + 1}
                    yield base | {
                        "kind": "zerofit", "card": card, "recipe": recipe.name, "said": said, "batch": sizes[said],
                        "precision": plan.precision, "strategy": plan.strategy, "offload": plan.offload,
                        "fits": recipe.micro_batch, "tight": most,
                        "predicted_driver_bytes": recipe.candidate.peak_bytes,
                        "checkpoint": plan.activation_checkpointing_every, "steps": 5, "warm_up": 3,
                        "bucket": plan.zero.reduce_bucket_elements, "classes": 90,
                    }  # fmt: skip


def outcome_of(case: dict[str, Any]) -> dict[str, Any]:
    """Run the case in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        command = [sys.executable, __file__]
        if case["ranks"] > 1:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                       str(case["ranks"]), __file__]  # fmt: skip
        command += ["--case", json.dumps(case | {"result": str(result)})]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=CASE_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return {"status": "timeout"}
        if result.exists():
            return {"status": "ok", **json.loads(result.read_text(encoding="utf-8"))}
        said = done.stdout + done.stderr
        if "out of memory" in said.lower():
            return {"status": "out_of_memory"}
        return {"status": "failed", "end": said[-800:]}


def run_case(case: dict[str, Any]) -> None:
    """One case, in its process."""
    found = plain_loop(case) if case["kind"] == "plain" else zerofit_steps(case)
    if int(os.environ.get("RANK", "0")) == 0:
        Path(case["result"]).write_text(json.dumps(found), encoding="utf-8")


def random_pictures(case: dict[str, Any], device: Any) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randn((case["batch"], 3, case["size"], case["size"]), generator=generator).to(device)
    return images, torch.randint(0, case.get("classes", 1000), (case["batch"],), generator=generator).to(device)


def plain_loop(case: dict[str, Any]) -> dict[str, Any]:
    """What people write: torchvision's model in fp32, AdamW, no compilation."""
    import torch

    from resnet_parity import torchvision_resnet18

    device = torch.device(case["device"])
    model = torchvision_resnet18(case.get("classes", 1000)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, targets = random_pictures(case, device)

    def step(_: int) -> None:
        loss = torch.nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return measured(step, case)


def zerofit_steps(case: dict[str, Any]) -> dict[str, Any]:
    """The engine of a plan, fed with random pictures on the device or from a prepared folder."""
    import torch

    from zerofit.checkpoint.model import initial_reader
    from zerofit.config.models import ResNetConfig
    from zerofit.engines.build import build
    from zerofit.engines.world import launcher_store, open_world
    from zerofit.models.resnet import SPEC
    from zerofit.planning.plan import Plan
    from zerofit.types import Batch

    feed_config = fed_config(case) if case.get("data") else None
    model = (
        feed_config.model
        if feed_config
        else ResNetConfig(num_classes=case.get("classes", 1000), input_size=case["size"])
    )
    plan = Plan.model_validate({
        "model": model, "parameters": model.parameter_count(), "strategy": case.get("strategy", "single"),
        "offload": case.get("offload", "none"), "device": case["device"], "world_size": case["ranks"],
        "micro_batch": case["batch"], "accumulation_steps": 1, "precision": case["precision"],
        "activation_checkpointing_every": case.get("checkpoint", 0), "compile": bool(case.get("compile")),
        "compile_mode": case.get("compile") or "default", "cuda_graphs": case.get("graphs", False),
        "zero": {"pin_memory": case["device"] == "cuda", "reduce_bucket_elements": case.get("bucket", 10_000_000)},
    })  # fmt: skip
    with open_world(plan, launcher_store()) as world:
        engine = build(plan, SPEC, world)
        engine.load(initial_reader(SPEC, model, 0))
        if feed_config is None:
            images, targets = random_pictures(case, world.device)
            window = [Batch({"images": images, "targets": targets}, case["batch"])]
            found = measured(lambda number: engine.train_step(window, 1e-3, number), case)
        else:
            from zerofit.data.loader import Share
            from zerofit.tasks.image_classification import TASK

            share = Share(case["batch"], 1, world.rank, world.world_size)
            feed = TASK.open(feed_config, model, share, pin_memory=world.device.type == "cuda")
            engine.inputs.transform = feed.transform
            found = measured(lambda number: engine.train_step(feed.train.window(number), 1e-3, number), case)
            feed.train.close()
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            found["driver_bytes"] = total - free
        engine.close()
    return found


def fed_config(case: dict[str, Any]) -> Any:
    """A configuration of the prepared folder."""
    from zerofit.config.load import load_config
    from zerofit.training.start import with_model_of_data

    settings = {"model.kind": "resnet", "data.kind": "images", "data.path": case["data"], "data.read": case["read"],
                "data.image_size": str(case["size"]), "global_batch": str(case["batch"])}  # fmt: skip
    if case["size"] < 256:
        settings["data.eval_resize"] = str(max(case["size"], 256 if case["size"] == 224 else case["size"]))
    settings["compile"] = "true" if case.get("compile") else "false"
    return with_model_of_data(load_config(None, None, list(settings.items()))).config


def measured(step: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Images a second over all ranks: the whole run after the warm-up, and the median of quarters; peak memory."""
    import torch

    cuda = case["device"] == "cuda"
    number, seconds = 0, []
    for _ in range(case["warm_up"]):
        step(number)
        number += 1
    quarters = 4 if case["steps"] >= 8 else 1
    for _ in range(quarters):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(case["steps"] // quarters):
            step(number)
            number += 1
        if cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - started) / (case["steps"] // quarters))
    rate = case["batch"] * case["ranks"] / statistics.median(seconds)
    found = {"images_per_second": rate, "step_seconds": seconds}
    if cuda:
        found |= {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return found


def summary(rows: list[dict[str, Any]]) -> str:
    """A line for each case that ran."""
    lines = []
    for row in rows:
        words = [row["group"], row["kind"], row.get("card", ""), row.get("said", ""), row["precision"],
                 row.get("strategy", ""), row.get("offload", ""),
                 f"compile {row['compile']}" if row.get("compile") else "",
                 "CUDA graphs" if row.get("graphs") else "", f"from {row['read']}" if row.get("data") else "",
                 f"batch {row['batch']} x {row['ranks']}"]  # fmt: skip
        rate = f"{row['images_per_second']:,.0f} images/s" if "images_per_second" in row else row["status"]
        peak = f"{row['allocated_bytes'] / 2**30:.2f} GiB" if "allocated_bytes" in row else ""
        lines.append(" ".join(word for word in [*words, rate, peak] if word))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
