"""GPT-2 XL under every strategy, beside nanoGPT's model under DDP and plain DeepSpeed, in one run.

    python benchmarks/gpt2_xl.py --gpus 4 --out benchmarks/results/gpt2_xl.json --peer /path/to/nanoGPT/model.py

Each case runs in processes of its own with a time limit; running out of memory is a result. Synthetic tokens; the
median of the steps after the warm-up; peaks from PyTorch's allocator, of rank 0. The peer is imported from the path
given and is left out without one. ``--small`` shrinks the model for a dry run on CPUs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "single": {"gpus": 1, "strategy": "single"},
    "single-checkpointed": {"gpus": 1, "strategy": "single", "checkpoint_every": 1},
    "single-fp16": {"gpus": 1, "strategy": "single", "precision": "fp16"},
    "zero2-cpu-1gpu": {"gpus": 1, "strategy": "zero2", "offload": "cpu", "steps": 6},
    "zero2-cpu-1gpu-ds": {"gpus": 1, "strategy": "zero2", "offload": "cpu", "cpu_kernel": "deepspeed", "steps": 6},
    "zero2-1gpu": {"gpus": 1, "strategy": "zero2"},
    "zero3-1gpu": {"gpus": 1, "strategy": "zero3", "compile": False},  # compiled, its gradients are wrong
    "ddp": {"strategy": "ddp"},
    "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "zero2"},
    "zero2-bucket200m": {"strategy": "zero2", "zero": {"reduce_bucket_elements": 200_000_000}},
    "zero2-bucket500m": {"strategy": "zero2", "zero": {"reduce_bucket_elements": 500_000_000}},
    "zero3": {"strategy": "zero3", "compile": False},
    "fsdp2": {"strategy": "fsdp2"},
    "fsdp2-kept": {"strategy": "fsdp2", "fsdp": {"reshard_after_forward": False}},
    "fsdp2-eager": {"strategy": "fsdp2", "compile": False},
    "fsdp2-micro24": {"strategy": "fsdp2", "micro_batch": 24},
    "fsdp2-fp16-acc8": {
        "strategy": "fsdp2", "precision": "fp16", "micro_batch": 1, "accumulation": 8, "compile": False, "steps": 8,
    },
    "zero2-eager": {"strategy": "zero2", "compile": False},
    "zero2-cpu": {"strategy": "zero2", "offload": "cpu", "steps": 6},
    "zero2-fp16-acc8": {
        "strategy": "zero2", "precision": "fp16", "micro_batch": 1, "accumulation": 8, "compile": False, "steps": 8,
    },
    "peer-ddp": {"peer": "ddp"},
    "peer-fsdp2": {"peer": "fsdp2"},
    "peer-zero2": {"peer": "deepspeed", "stage": 2},
    "peer-zero3": {"peer": "deepspeed", "stage": 3},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--cases", default="", help="comma-separated names; default: all that suit --gpus")
    parser.add_argument("--out", type=Path, default=Path("gpt2_xl.json"))
    parser.add_argument("--peer", default=os.environ.get("NANOGPT_MODEL", ""))
    parser.add_argument("--limit-seconds", type=float, default=150)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--case", default="")
    args = parser.parse_args()
    if args.case:
        run_case(args)
    else:
        run_all(args)


def run_all(args: argparse.Namespace) -> None:
    """Run the cases one after another, print a table as they end, and write all figures as JSON."""
    from zerofit.launch.trials import Trial, run_trial

    names = args.cases.split(",") if args.cases else [n for n, c in CASES.items() if _suits(c, args)]
    results: dict[str, Any] = {"date": date.today().isoformat(), "gpus": args.gpus, "cases": {}}
    print(f"{'case':22} {'ms/step':>9} {'tokens/s':>10} {'MFU':>6} {'alloc GiB':>9} {'reserved':>9}  note", flush=True)
    for name in names:
        gpus = CASES[name].get("gpus", args.gpus)
        arguments = ["--case", name, "--gpus", str(gpus), "--peer", args.peer, *(["--small"] if args.small else [])]
        outcome = run_trial(Trial(Path(__file__), arguments, gpus, args.limit_seconds))
        row = {"status": outcome.status, "seconds": outcome.seconds, "gpus": gpus, **(outcome.result or {})}
        if outcome.status != "ok":
            row["log"] = outcome.log_tail
        results["cases"][name] = row
        _print_row(name, row)
        args.out.write_text(json.dumps(results, indent=1))


def _suits(case: dict[str, Any], args: argparse.Namespace) -> bool:
    return ("peer" not in case or bool(args.peer)) and (case.get("gpus", 0) == 1) == (args.gpus == 1)


def _print_row(name: str, row: dict[str, Any]) -> None:
    if row["status"] != "ok":
        print(f"{name:22} {row['status']} after {row['seconds']:.0f} s: {row['log'][-1200:]}", flush=True)
        return
    print(
        f"{name:22} {row['step_seconds'] * 1e3:9.1f} {row['tokens_per_second']:10,.0f} {row['mfu']:6.1%} "
        f"{row['peak_allocated_bytes'] / 2**30:9.1f} {row['peak_reserved_bytes'] / 2**30:9.1f}  loss "
        f"{row['losses'][0]:.3f} -> {row['losses'][-1]:.3f}",
        flush=True,
    )


def run_case(args: argparse.Namespace) -> None:
    """One rank of one case."""
    import torch

    from zerofit.launch.trials import write_result

    case = CASES[args.case]
    step, tokens, flops, parameters = (run_peer if "peer" in case else run_ours)(case, args)
    steps, losses, times = case.get("steps", 16), [], []
    synchronize: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    for index in range(4 + steps):
        synchronize()
        started = time.perf_counter()
        losses.append(step(index))
        synchronize()
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times[4:])
    cuda = torch.cuda.is_available()
    write_result(
        {
            "step_seconds": seconds,
            "step_seconds_all": times,
            "tokens_per_second": tokens / seconds,
            "mfu": tokens / seconds * flops / (989e12 * args.gpus),
            "parameters": parameters,
            "peak_allocated_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else 0,
            "losses": [float(loss) for loss in losses],
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "torch": torch.__version__,
            "case": case,
        }
    )


def shape(small: bool) -> Any:
    """GPT-2 XL with the vocabulary padded to 50304, or a small stand-in."""
    from zerofit.config.models import GPT2Config

    if small:
        return GPT2Config(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=257, pad_vocab_to=64)
    return GPT2Config(n_layer=48, n_head=25, n_embd=1600, block_size=1024, vocab_size=50257, pad_vocab_to=64)


def window_of(model: Any, micro_batch: int, accumulation: int, seed: int) -> Any:
    """One window of random tokens, the same in every step: its loss must fall."""
    import torch

    from zerofit.data.loader import collate

    generator = torch.Generator().manual_seed(seed)
    size = (micro_batch, model.block_size + 1)
    return [collate(torch.randint(0, model.vocab_size, size, generator=generator).numpy()) for _ in range(accumulation)]


def run_ours(case: dict[str, Any], args: argparse.Namespace) -> tuple[Callable[[int], float], int, int, int]:
    """A step of zerofit's own engine: returns step function, tokens of a step, FLOPs a token, parameters."""
    import torch

    from zerofit.checkpoint.model import initial_reader
    from zerofit.engines.build import build
    from zerofit.engines.world import launcher_store, open_world
    from zerofit.models import model_spec
    from zerofit.planning.plan import OptimizerPlan, Plan, ZeroPlan

    model, cuda = shape(args.small), torch.cuda.is_available()
    plan = Plan(
        model=model,
        parameters=model.parameter_count(),
        strategy=case["strategy"],
        offload=case.get("offload", "none"),
        device="cuda" if cuda else "cpu",
        world_size=args.gpus,
        micro_batch=case.get("micro_batch", 8),
        accumulation_steps=case.get("accumulation", 1),
        precision=case.get("precision", "bf16"),
        activation_checkpointing_every=case.get("checkpoint_every", 0),
        compile=case.get("compile", True),
        optimizer=OptimizerPlan(cpu_kernel=case.get("cpu_kernel", "torch")),
        zero=ZeroPlan(pin_memory=cuda, **case.get("zero", {})),
        fsdp=case.get("fsdp", {}),
    )
    opened = open_world(plan, launcher_store())
    world = opened.__enter__()
    engine = build(plan, model_spec("gpt2"), world)
    engine.load(initial_reader(model_spec("gpt2"), model, seed=1))
    window = window_of(model, plan.micro_batch, plan.accumulation_steps, world.rank)

    def step(index: int, opened: Any = opened) -> float:  # holding `opened` keeps the group open
        return engine.train_step(window, 1e-4, index).read().loss

    tokens = plan.global_batch * model.block_size
    return step, tokens, model_spec("gpt2").flops_per_item(model), plan.parameters


def run_peer(case: dict[str, Any], args: argparse.Namespace) -> tuple[Callable[[int], float], int, int, int]:
    """The same work with nanoGPT's model, compiled, the way its users write it by hand."""
    import torch

    spec = importlib.util.spec_from_file_location("peer_model", args.peer)
    assert spec is not None
    assert spec.loader is not None
    peer = importlib.util.module_from_spec(spec)
    sys.modules["peer_model"] = peer
    spec.loader.exec_module(peer)
    ours = shape(args.small)
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", rank))
    config = peer.GPTConfig(
        block_size=ours.block_size, vocab_size=ours.padded_vocab_size, n_layer=ours.n_layer, n_head=ours.n_head,
        n_embd=ours.n_embd, dropout=0.0, bias=True,
    )  # fmt: skip
    micro_batch = case.get("micro_batch", 8)
    (batch,) = window_of(ours, micro_batch, 1, rank)
    x, y = (batch.inputs[name].cuda() for name in ("tokens", "targets"))
    make = {"ddp": _peer_ddp, "fsdp2": _peer_fsdp2, "deepspeed": _peer_deepspeed}[case["peer"]]
    step = make(peer.GPT(config), case, rank, x, y)
    from zerofit.models import model_spec

    tokens = micro_batch * args.gpus * ours.block_size
    return step, tokens, model_spec("gpt2").flops_per_item(ours), ours.parameter_count()


def _peer_ddp(model: Any, case: dict[str, Any], rank: int, x: Any, y: Any) -> Callable[[int], float]:
    """nanoGPT's own way: fp32 parameters, autocast, torch.compile of the whole model, fused AdamW."""
    import torch

    model = model.cuda()
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cuda")
    replica = torch.nn.parallel.DistributedDataParallel(torch.compile(model), device_ids=[rank])

    def step(index: int) -> float:
        with torch.autocast("cuda", torch.bfloat16):
            _, loss = replica(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(replica.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def _peer_fsdp2(model: Any, case: dict[str, Any], rank: int, x: Any, y: Any) -> Callable[[int], float]:
    """Plain FSDP2 as PyTorch's tutorials write it: fp32 shards, bf16 copies, compiled blocks, fused AdamW."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = model.to(x.device)
    for block in model.transformer.h:
        block.compile()
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(index: int) -> float:
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def _peer_deepspeed(model: Any, case: dict[str, Any], rank: int, x: Any, y: Any) -> Callable[[int], float]:
    """A plain DeepSpeed script: bf16, FusedAdam (compiled at start), overlap, the usual buckets, compiled model."""
    import deepspeed
    import torch

    os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    config = {
        "train_micro_batch_size_per_gpu": len(x),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": case["stage"], "overlap_comm": True, "contiguous_gradients": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    engine.compile()

    def step(index: int) -> float:
        _, loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        return float(loss)

    return step


if __name__ == "__main__":
    main()
