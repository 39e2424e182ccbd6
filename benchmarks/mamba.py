"""Mamba on one machine: the 7B beside mamba_ssm's way, small cards, scaling, and a table of strategies.

    python benchmarks/mamba.py --gpus 4 --out mamba-4gpu.json --peer FOLDER
    python benchmarks/mamba.py --gpus 4 --cases 7b-zero2,peer-zero2 --out mamba.json --peer FOLDER
    python benchmarks/mamba.py --gpus 4 --predict-only                         # what the planner says of each case
    python benchmarks/mamba.py --small --gpus 2 --out /tmp/mamba.json          # a dry run without GPUs

Each case runs in processes of its own with a time limit, and the results are written after each; running out of memory
is a result. Random tokens; the median of the steps after the warm-up; peaks of PyTorch's allocator on the busiest rank
(the start included, which is also told apart), and what the driver shows, beside what the planner says. Cases whose
name starts with ``24gb`` run while another process holds all but 24,150 MiB of every GPU: that emulates the memory of
such cards, not their speed. ``--peer`` names a folder from which ``mamba_ssm`` can be imported, or one with its scan's
kernels as peer.so (see benchmarks/kernels.py); without it the peer's cases are left out. ``--small`` runs the same
cases as tiny models, on CPUs the peer's too (with PyTorch's scan), and where there are GPUs under the same ballast.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

MIB = 1024**2
#: What a card of 24 GB shows as free.
CARD_MIB = 24_150
#: d_model, n_layers; the last one, as wide as the 7B, is for allocator_trace.py.
SIZES = {"1b": (2048, 34), "1_4b": (2048, 48), "3b": (2816, 54), "7b": (4864, 45), "width7b": (4864, 12)}
LENGTH = 4096
#: For ``--small``.
SMALL = (64, 4)
STEPS, WARM_UP = 10, 3
ZERO2, ZERO3 = {"strategy": "zero2"}, {"strategy": "zero3"}
LOW_BIT = {"optimizer": {"state": "8bit", "master": "bf16"}}
BF16_STATES = {"optimizer": {"state": "bf16", "master": "bf16"}}
CARD = {"card": True, "residual_in_fp32": False}
COMPILED = {"compile": True, "recompute": "none"}
ON_CPU = {"offload": "cpu", "tight": True, "warm_up": 1, "steps": 3}


def _scaled(gpus: int, **more: Any) -> dict[str, Any]:
    strategy = "ddp" if gpus > 1 else "single"
    return {"size": "1_4b", "gpus": gpus, "strategy": strategy, "micro_batch": 4, "length": 2048,
            "recompute": "light", **more}  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    # 7B, micro-batch 1, T = 4096; the peer in the same run.
    "peer-zero2": {"peer": True, "stage": 2},
    "7b-zero2": ZERO2,
    "7b-zero2-light": {**ZERO2, "recompute": "light"},
    "7b-zero2-selective": {**ZERO2, "recompute": "selective"},
    "7b-zero2-full": {**ZERO2, "recompute": "full"},
    "7b-zero2-bf16-residual": {**ZERO2, "recompute": "light", "residual_in_fp32": False},
    "7b-zero1-light": {"strategy": "zero1", "recompute": "light"},
    "peer-zero2-checkpointed": {"peer": True, "stage": 2, "checkpointed": True},
    "7b-fsdp2": {"strategy": "fsdp2"},
    "7b-fsdp2-8-ctas": {"strategy": "fsdp2", "ctas": 8},
    "7b-fsdp2-gathered": {"strategy": "fsdp2", "fsdp": {"reshard_after_forward": False}},
    "7b-fsdp2-gathered-8-ctas": {"strategy": "fsdp2", "fsdp": {"reshard_after_forward": False}, "ctas": 8},
    "7b-fsdp2-compiled-8-ctas": {"strategy": "fsdp2", "compile": True, "ctas": 8},
    "7b-fsdp2-gathered-compiled-8-ctas": {
        "strategy": "fsdp2", "fsdp": {"reshard_after_forward": False}, "compile": True, "ctas": 8,
    },
    "7b-zero2-compiled": {**ZERO2, "compile": True},
    "7b-fsdp2-light": {"strategy": "fsdp2", "recompute": "light"},
    "7b-fsdp2-selective": {"strategy": "fsdp2", "recompute": "selective"},
    "7b-fsdp2-full": {"strategy": "fsdp2", "recompute": "full"},
    "7b-zero3-selective": {**ZERO3, "recompute": "selective"},
    "7b-zero2-fp16": {**ZERO2, "recompute": "light", "precision": "fp16", "steps": 20},
    # Cards of 24 GB, the residual stream in bf16 as the preset mamba_7b has it.
    "24gb-fsdp2-low-bit-light": {"strategy": "fsdp2", "recompute": "light", **CARD, **LOW_BIT},
    "24gb-fsdp2-low-bit-selective": {"strategy": "fsdp2", "recompute": "selective", **CARD, **LOW_BIT},
    "24gb-fsdp2-low-bit-full": {"strategy": "fsdp2", "recompute": "full", **CARD, **LOW_BIT},
    "24gb-fsdp2-bf16-states-full": {"strategy": "fsdp2", "recompute": "full", **CARD, **BF16_STATES},
    "24gb-zero3-low-bit-full": {**ZERO3, "recompute": "full", "tight": True, **CARD, **LOW_BIT},
    "24gb-zero2-cpu": {**ZERO2, "recompute": "full", **ON_CPU, **CARD},
    "24gb-zero3-cpu": {**ZERO3, "recompute": "selective", **ON_CPU, **CARD},
    # Scale at 1.4B, 4 samples of 2048 tokens a GPU and step; four times as many, in four micro-batches
    # or in twice as large ones; and other buckets.
    **{f"scale-{n}": _scaled(n) for n in (1, 2, 4)},
    **{f"scale-accumulated-{n}": _scaled(n, accumulation=4) for n in (1, 2, 4)},
    **{f"scale-compiled-{n}": _scaled(n, **COMPILED) for n in (1, 2, 4)},
    **{f"scale-compiled-accumulated-{n}": _scaled(n, **COMPILED, accumulation=4) for n in (1, 2, 4)},
    **{f"scale-compiled-8-samples-{n}": _scaled(n, **COMPILED | {"micro_batch": 8}) for n in (1, 2, 4)},
    **{f"scale-compiled-fsdp2-{n}": _scaled(n, **COMPILED | {"strategy": "fsdp2"}) for n in (2, 4)},
    **{f"scale-compiled-2-{n}-ctas": _scaled(2, **COMPILED, ctas=n) for n in (4, 8)},
    **{f"scale-4-buckets-{mb}": _scaled(4, bucket_mb=mb) for mb in (100, 400)},
    # The table.
    **{
        f"{size}-table-{name}": {"size": size, "recompute": "light", **strategy}
        for size in ("1b", "3b", "7b", "width7b")
        for name, strategy in {
            "ddp": {"strategy": "ddp"}, "zero1": {"strategy": "zero1"}, "zero2": ZERO2, "zero3": ZERO3,
            "fsdp2": {"strategy": "fsdp2"}, "zero2-cpu": {**ZERO2, "offload": "cpu", "steps": 4},
            "zero3-cpu": {**ZERO3, "offload": "cpu", "steps": 4},
        }.items()
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--cases", default="", help="comma-separated names; default: all that suit --gpus")
    parser.add_argument("--out", type=Path, default=Path("mamba.json"))
    parser.add_argument("--peer", default="")
    parser.add_argument("--limit-seconds", type=float, default=240)
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no case after that")
    parser.add_argument("--profile", action="store_true", help="tell, of two more steps, what the GPU does when")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--predict-only", action="store_true", help="print what the planner says of each case")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    parser.add_argument("--hold-mib", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.hold_mib:
        hold(args.hold_mib)
    elif args.case:
        run_case(args)
    else:
        run_all(args)


def run_all(args: argparse.Namespace) -> None:
    """Run the cases one after another, print a row as each ends, and write all figures as JSON."""
    names = args.cases.split(",") if args.cases else [n for n, c in CASES.items() if _suits(c, args)]
    if unknown := sorted(set(names) - set(CASES)):
        sys.exit(f"no such cases: {', '.join(unknown)}; there are {', '.join(CASES)}")
    results: dict[str, Any] = {"date": date.today().isoformat(), "gpus": args.gpus, "small": args.small, "cases": {}}
    started = time.monotonic()
    weight = _Ballast(stub=args.small and not _has_gpus())
    print(f"{'case':30} {'ms/step':>9} {'tokens/s':>9} {'alloc':>7} {'said':>7} {'reserved':>8} {'said':>7} GiB")
    try:
        for name in names:
            if time.monotonic() - started > args.budget_seconds:
                break
            row = tried(name, args, weight)
            results["cases"][name] = row
            _print_row(name, row)
            args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    finally:
        weight.release()


def tried(name: str, args: argparse.Namespace, weight: _Ballast) -> dict[str, Any]:
    """One case: what the planner says, and what came of it in a process group of its own."""
    from zerofit.launch.trials import Trial, run_trial

    case = CASES[name]
    row: dict[str, Any] = {"case": case}
    # The planner traces while the case runs: GPUs need not wait for it.
    with ThreadPoolExecutor(1) as pool:
        saying = pool.submit(predicted, case, args)
        if args.predict_only:
            return row | _answer(saying)
        gpus = case.get("gpus", args.gpus)
        arguments = ["--case", name, "--gpus", str(args.gpus), "--peer", args.peer]
        arguments += [flag for flag in ("--small", "--profile") if getattr(args, flag[2:])]
        try:
            weight.hold(gpus) if case.get("card") else weight.release()
        except RuntimeError as error:
            return row | {"status": "no ballast", "log": str(error)}
        outcome = run_trial(Trial(Path(__file__), arguments, gpus, args.limit_seconds))
        row |= _answer(saying) | {"status": outcome.status, "seconds": outcome.seconds, **(outcome.result or {})}
    if outcome.status != "ok":
        return row | {"log": outcome.log_tail[-3000:]}
    # A kernel that fell back to a slower way said so.
    said = [line for line in outcome.log_tail.splitlines() if "Warning" in line or line.startswith('{"peer"')]
    return row | ({"said": said} if said else {})


def _answer(saying: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"predicted": saying.result()}
    except Exception as error:  # a strategy or a setting that this version does not have
        return {"status": "not planned", "not_planned": f"{type(error).__name__}: {error}"[:600]}


def _suits(case: dict[str, Any], args: argparse.Namespace) -> bool:
    if "peer" in case and (_has_gpus() if args.small else not args.peer):
        return False  # its kernel takes whole chunks of 2048 tokens
    if case.get("size") == "width7b":
        return False
    return case.get("gpus", args.gpus) <= args.gpus and (args.gpus > 1 or "gpus" in case)


def _print_row(name: str, row: dict[str, Any]) -> None:
    said = row.get("predicted") or {}
    gib = [said.get(key, 0) / 2**30 for key in ("allocated_bytes", "reserved_bytes")]
    if row.get("status", "ok") != "ok" or "step_seconds" not in row:
        words, log = row.get("status", "predicted"), row.get("log", row.get("not_planned", ""))
        print(
            f"{name:30} {words:>19} {'':>7} {gib[0]:7.1f} {'':>8} {gib[1]:7.1f}  {log[-200:]!r}",
            flush=True,
        )
        return
    print(
        f"{name:30} {row['step_seconds'] * 1e3:9.1f} {row['tokens_per_second']:9,.0f} "
        f"{row['allocated_bytes'] / 2**30:7.1f} {gib[0]:7.1f} {row['reserved_bytes'] / 2**30:8.1f} {gib[1]:7.1f}  loss "
        f"{row['losses'][0]:.3f} -> {row['losses'][-1]:.3f}",
        flush=True,
    )


def shape(case: dict[str, Any], small: bool) -> Any:
    from zerofit.config.models import MambaConfig

    width, layers = SMALL if small else SIZES[case.get("size", "7b")]
    return MambaConfig(
        d_model=width, n_layers=layers, vocab_size=257 if small else 50257, pad_vocab_to=8,
        max_seq_length=64 if small else case.get("length", LENGTH),
        residual_in_fp32=case.get("residual_in_fp32", True),
    )  # fmt: skip


def plan_of(case: dict[str, Any], args: argparse.Namespace) -> Any:
    """The case as a plan.

    Raises:
        ValueError: this version has no such strategy or setting.
    """
    import torch

    from zerofit.planning.candidates import TIGHT
    from zerofit.planning.plan import Plan

    model, recompute = shape(case, args.small), case.get("recompute", "none")
    cuda = torch.cuda.is_available()
    world = case.get("gpus", args.gpus)
    return Plan.model_validate(
        {
            "model": model,
            "parameters": model.parameter_count(),
            "strategy": case["strategy"],
            "offload": case.get("offload", "none"),
            "device": "cuda" if cuda or not args.small else "cpu",
            "world_size": world,
            "micro_batch": case.get("micro_batch", 1),
            "accumulation_steps": case.get("accumulation", 1),
            "precision": case.get("precision", "bf16"),
            "compile": case.get("compile", False),
            "activation_checkpointing_every": int(recompute != "none"),
            "recomputation": "full" if recompute == "none" else recompute,
            "optimizer": case.get("optimizer", {}),
            "fsdp": case.get("fsdp", {}),
            "zero": {"pin_memory": cuda, **(TIGHT if case.get("tight") else {})},
        }
    )


def predicted(case: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What the planner says of the case: bytes of one GPU. Nothing of the peer's."""
    from zerofit.planning.memory import H200, predict_memory

    if "peer" in case:
        return {}
    free = CARD_MIB * MIB if case.get("card") else None
    found = predict_memory(plan_of(case, args), H200, free_bytes=free)
    return {
        "allocated_bytes": found.allocated_bytes, "reserved_bytes": found.reserved_bytes,
        "driver_bytes": found.driver_bytes, "items": found.items, "phase": found.peak_phase, "basis": found.basis,
    }  # fmt: skip


def run_case(args: argparse.Namespace) -> None:
    """One rank of one case."""
    import torch

    from zerofit.launch.trials import write_result

    case = CASES[args.case]
    cuda, began = torch.cuda.is_available(), time.perf_counter()
    if not cuda and not args.small:
        sys.exit("no GPU here: --small tries the cases on a CPU")
    step, tokens, parameters = (run_peer if "peer" in case else run_ours)(case, args)
    started_bytes = torch.cuda.max_memory_allocated() if cuda else 0
    started_seconds = time.perf_counter() - began
    losses, times = [], []
    if cuda:
        torch.cuda.reset_peak_memory_stats()  # what was reserved stays, and so counts
    synchronize: Callable[[], None] = torch.cuda.synchronize if cuda else (lambda: None)
    warm_up = case.get("warm_up", WARM_UP)
    for index in range(warm_up + case.get("steps", STEPS)):
        synchronize()
        started = time.perf_counter()
        losses.append(float(step(index)))
        synchronize()
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times[warm_up:])
    timeline = {}
    if args.profile and cuda:
        from timeline import profiled

        timeline = profiled(lambda: step(0))
    free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
    allocated, reserved = busiest(
        max(started_bytes, torch.cuda.max_memory_allocated()), torch.cuda.max_memory_reserved()
    )
    write_result(
        {
            "step_seconds": seconds,
            "step_seconds_all": times,
            "tokens_per_second": tokens / seconds,
            "mfu_6p": tokens / seconds * 6 * parameters / (989e12 * case.get("gpus", args.gpus)),
            "parameters": parameters,
            "start_seconds": started_seconds,
            "start_allocated_bytes": started_bytes,
            "allocated_bytes": allocated,
            "reserved_bytes": reserved,
            # Of this process: what the ballast holds is not in it.
            "driver_bytes": (CARD_MIB * MIB if case.get("card") else total) - free,
            "losses": losses,
            **timeline,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "torch": torch.__version__,
        }
    )
    sys.stdout.flush()
    os._exit(0)  # what libraries leave behind need not be waited for


def busiest(*figures: int) -> list[int]:
    """The largest of the ranks' figures, each. Under ZeRO-2 the rank that owns the last layers holds most."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or not torch.cuda.is_available():
        return list(figures)
    largest = torch.tensor(figures, device="cuda")
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return [int(figure) for figure in largest]


def run_ours(case: dict[str, Any], args: argparse.Namespace) -> tuple[Callable[[int], float], int, int]:
    """A step of zerofit's engine: step function, tokens of a step, parameters."""
    from zerofit.engines.build import build
    from zerofit.engines.world import launcher_store, open_world
    from zerofit.launch.memory_trial import random_window
    from zerofit.models import model_spec

    if "ctas" in case:
        os.environ["NCCL_MAX_CTAS"] = str(case["ctas"])  # multiprocessors that a collective may take
    if "bucket_mb" in case:
        set_bucket(case["bucket_mb"])
    plan = plan_of(case, args)
    opened = open_world(plan, launcher_store())
    world = opened.__enter__()
    spec = model_spec("mamba")
    engine = build(plan, spec, world)
    engine.load(quick_reader(spec, plan.model))
    window = random_window(plan, world)

    def step(index: int, opened: Any = opened) -> float:  # holding `opened` keeps the group open
        return engine.train_step(window, 1e-4, index).read().loss

    return step, plan.global_batch * plan.model.sequence_length, plan.parameters


def set_bucket(megabytes: int) -> None:
    """Let DDP reduce gradients in pieces of another size than its 25 MB."""
    from zerofit.engines import ddp

    class Bucketed(ddp.DistributedDataParallel):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, bucket_cap_mb=megabytes)

    ddp.DistributedDataParallel = Bucketed  # type: ignore[misc]


def quick_reader(spec: Any, model: Any) -> Any:
    """Initial weights in seconds instead of minutes: matrices repeat a random piece of the right size of values."""
    import torch

    piece = torch.rand(1 << 20, generator=torch.Generator().manual_seed(1)) * 2 - 1
    shapes = model.parameter_shapes()

    def read(name: str, role: str, start: int, stop: int) -> Any:
        if role != "parameter":
            return None
        if torch.Size(shapes[name]).numel() <= piece.numel():
            return spec.init(model, name, 1).reshape(-1)[start:stop]
        bound = 0.035 if name == "embedding.weight" else shapes[name][1] ** -0.5
        if name.endswith("out_proj.weight"):
            bound /= model.n_layers**0.5
        first = start % piece.numel()
        return (bound * piece).repeat((first + stop - start) // piece.numel() + 1)[first : first + stop - start]

    return read


def run_peer(case: dict[str, Any], args: argparse.Namespace) -> tuple[Callable[[int], float], int, int]:
    """mamba_ssm's kernels under plain DeepSpeed; see peers/mamba_deepspeed.py."""
    sys.path.insert(0, str(Path(__file__).with_name("peers")))
    from mamba_deepspeed import make_step

    return make_step(shape(case, args.small), Path(args.peer), case, args.gpus)


class _Ballast:
    """Processes that hold all but `CARD_MIB` of each of the first GPUs; kept from one case to the next."""

    def __init__(self, stub: bool) -> None:
        self._stub = stub
        self._holders: list[subprocess.Popen[str]] = []

    def hold(self, gpus: int) -> None:
        """Raises RuntimeError when a GPU's memory is not held."""
        if self._stub or len(self._holders) == gpus:
            return
        self.release()
        self._holders = [
            subprocess.Popen(
                [sys.executable, __file__, "--hold-mib", str(CARD_MIB)],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": _visible(index)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for index in range(gpus)
        ]  # fmt: skip
        for index, holder in enumerate(self._holders):
            assert holder.stdout is not None
            said = holder.stdout.readline().strip()
            print(f"  GPU {index}: {said}", flush=True)
            if not said:
                self.release()
                raise RuntimeError(f"the process that should hold the memory of GPU {index} ended at once")

    def release(self) -> None:
        for holder in self._holders:
            assert holder.stdin is not None
            holder.stdin.close()
        for holder in self._holders:
            holder.wait(timeout=60)
        self._holders = []


def _has_gpus() -> bool:
    import torch

    return bool(torch.cuda.device_count())  # makes no context


def _visible(index: int) -> str:
    """The index-th GPU of those that this process may use."""
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(64)))).split(",")[index]


def hold(free_mib: int) -> None:
    """Allocate all but `free_mib`, say so, and keep it until standard input closes."""
    import torch

    held = []
    while (surplus := torch.cuda.mem_get_info()[0] - free_mib * MIB) >= 2 * MIB:
        held.append(torch.empty(surplus // (2 * MIB) * 2 * MIB, dtype=torch.uint8, device="cuda"))
    print(f"{torch.cuda.mem_get_info()[0] / MIB:.0f} MiB left free", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
