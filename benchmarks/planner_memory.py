"""Predicted against measured memory: GPT-2 in four sizes, every strategy, 1, 2 and 4 GPUs.

    python benchmarks/planner_memory.py --predict-only --out benchmarks/results/DATE-predictions.json
    python benchmarks/planner_memory.py --predictions benchmarks/results/DATE-predictions.json --out measured.json
    python benchmarks/planner_memory.py --measured measured.json

Each case runs in processes of its own. Cases that need fewer GPUs than there are run side by side, and while one
measures, the next one on its GPUs is already importing: it waits at a gate before it touches them. Synthetic tokens,
constant weights. Measured, on every rank and reported for the busiest: PyTorch's allocator at its peak, by phase and
in all; what the driver shows (NVML) less what it showed before the first case; the median step.

``--small`` runs the same code with a tiny model on CPUs (no memory is measured there).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

MODELS = {"small": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}
WARM_UP_STEPS, STEPS = 2, 4
#: After its gate opened a case may take so long; a hang ends there.
CASE_SECONDS = 100.0


def _case(text: str) -> dict[str, Any]:
    """``model strategy gpus micro_batch`` and words: acc4, ck1, compile, cpu, cpu+p, fp16, fp32, drop, g32, kept."""
    model, strategy, gpus, micro_batch, *words = text.split()
    case: dict[str, Any] = {"size": model, "strategy": strategy, "gpus": int(gpus), "micro_batch": int(micro_batch)}
    for word in words:
        case |= {
            "compile": {"compile": True},
            "cpu": {"offload": "cpu"},
            "cpu+p": {"offload": "cpu", "offload_parameters": "cpu"},
            "drop": {"dropout": 0.1},
            "g32": {"gradient_dtype": "fp32"},
            "kept": {"fsdp": {"reshard_after_forward": False}},
        }.get(word) or _valued(word)
    return case


def _valued(word: str) -> dict[str, Any]:
    if word.startswith("acc"):
        return {"accumulation_steps": int(word[3:])}
    if word.startswith("ck"):
        return {"activation_checkpointing_every": int(word[2:])}
    assert word in ("fp16", "fp32", "bf16"), word
    return {"precision": word}


class _Cases(dict[str, dict[str, Any]]):
    """Cases by their text; those that are not listed can be named as well."""

    def __missing__(self, text: str) -> dict[str, Any]:
        return _case(text)


#: In the order in which they start: what tells most comes first.
CASES = _Cases(
    (text, _case(text))
    for text in """
xl zero2 4 8
xl ddp 4 8 compile
xl zero3 4 8
xl zero2 4 1 fp16 acc4
xl zero2 4 8 acc4 cpu compile
xl zero1 4 8
xl single 1 8
xl single 1 8 compile
xl zero2 1 8 cpu
xl zero3 1 8 cpu+p
large single 1 8 compile ck1
xl single 1 16 ck1 compile
large zero2 1 8
large zero3 1 8
medium single 1 8
small single 1 16
xl single 1 4 acc4 ck2
medium zero2 1 8 acc4 cpu
large zero3 2 8
large zero2 2 8 acc4
medium ddp 2 8
xl zero2 2 4 compile
xl zero3 4 4 ck1
xl zero2 4 16 compile
xl ddp 4 4 acc4
xl zero3 4 8 cpu
medium single 1 16 compile
medium single 1 8 drop
large single 1 4 fp16 acc4 compile
small single 1 16 acc4 g32
small single 1 8 fp32
small single 1 32 ck1
medium single 1 8 ck2
large single 1 8
xl zero1 1 4 acc4
xl zero2 1 4 compile
small zero3 1 16
small zero2 1 16 fp16
large zero1 2 8
xl zero2 2 8 cpu
xl zero3 2 4 ck1
large ddp 2 4 fp16 ck2
medium ddp 2 8 acc4 compile
medium zero2 2 16 fp32
xl zero1 4 4 acc4 compile
xl zero2 4 16 ck1
xl zero3 4 2 acc4
xl zero3 4 8 cpu+p ck2
large zero2 4 16 ck2 compile
large zero3 4 8 fp16
medium ddp 4 16
xl zero2 4 4 g32
small ddp 4 32 compile
medium zero1 4 16 acc4
""".strip().splitlines()
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=4, help="GPUs of this machine that may be used")
    parser.add_argument(
        "--cases", default="", help="comma-separated, listed or not; default: all listed that fit --gpus"
    )
    parser.add_argument("--out", type=Path, default=Path("planner_memory.json"))
    parser.add_argument("--predict-only", action="store_true")
    parser.add_argument("--predictions", type=Path, help="of --predict-only; default: predict now")
    parser.add_argument("--measured", type=Path, nargs="+", help="print the errors of these files, then and now")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no case after that")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        run_case(args.case, args.small)
        return
    if args.measured:
        compare(args.measured)
        return
    names = [n for n in (args.cases.split(",") if args.cases else CASES) if CASES[n]["gpus"] <= args.gpus]
    predicted = predictions(names, args)
    if args.predict_only:
        head = {"date": date.today().isoformat(), "predicted": predicted}
        args.out.write_text(json.dumps(head, indent=1), encoding="utf-8")
        return
    Schedule(names, predicted, args).run()


def plan_of(case: dict[str, Any], small: bool) -> Any:
    """The plan of a case; `small`: the same strategy on CPUs with a tiny model."""
    from zerofit.config.models import GPT2Config
    from zerofit.planning.plan import Plan, ZeroPlan

    case = dict(case)
    layers, heads, width = (4, 2, 64) if small else MODELS[case.pop("size")]
    case.pop("size", None)
    model = GPT2Config(
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        block_size=32 if small else 1024,
        vocab_size=257 if small else 50257,
        pad_vocab_to=64,
        dropout=case.pop("dropout", 0.0),
    )
    if small:
        case |= {"micro_batch": 2}
    return Plan.model_validate(
        {
            "model": model,
            "parameters": model.parameter_count(),
            "device": "cpu" if small else "cuda",
            "world_size": case.pop("gpus"),
            "accumulation_steps": 1,
            "precision": "bf16",
            "zero": ZeroPlan(pin_memory=not small),
            **case,
        }
    )


def predictions(names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Case -> prediction, from the file or made now."""
    from zerofit.planning.memory import predict_memory

    known = json.loads(args.predictions.read_text(encoding="utf-8"))["predicted"] if args.predictions else {}
    return {name: known.get(name) or asdict(predict_memory(plan_of(CASES[name], args.small))) for name in names}


class Schedule:
    """Starts cases in order on the first GPUs that suit: one measuring and one warming up on each."""

    def __init__(self, names: list[str], predicted: dict[str, Any], args: argparse.Namespace) -> None:
        self.waiting, self.predicted, self.args = list(names), predicted, args
        self.base_bytes = used_bytes(args.gpus) if not args.small else [0] * args.gpus
        #: Cases on each GPU, the one that measures first.
        self.queues: list[list[str]] = [[] for _ in range(args.gpus)]
        self.gates: dict[str, Path] = {}
        self.changed = threading.Condition()
        self.rows: dict[str, Any] = {}
        self.started = time.monotonic()
        self.scratch = Path(tempfile.mkdtemp(prefix="planner-memory-"))

    def run(self) -> None:
        threads = []
        with self.changed:
            while self.waiting:
                if time.monotonic() - self.started > self.args.budget_seconds:
                    break
                devices = self._devices(CASES[self.waiting[0]]["gpus"])
                if devices is None:
                    self.changed.wait(timeout=5)
                    continue
                name = self.waiting.pop(0)
                gate = self.gates[name] = self.scratch / f"gate-{len(threads)}"
                threads.append(threading.Thread(target=self._case, args=(name, devices, gate), daemon=True))
                for device in devices:
                    self.queues[device].append(name)
                threads[-1].start()
                self._open_gates()
        for thread in threads:
            thread.join()
        self._write()
        summarise(self.rows)
        print(f"{len(self.rows)} cases in {time.monotonic() - self.started:.0f} s; not started: {self.waiting}")

    def _devices(self, count: int) -> list[int] | None:
        """The GPUs with the shortest queues, if none has two cases already."""
        order = sorted(range(len(self.queues)), key=lambda device: len(self.queues[device]))[:count]
        return sorted(order) if all(len(self.queues[device]) < 2 for device in order) else None

    def _open_gates(self) -> None:
        """For every case that is first on all its GPUs."""
        for name, gate in list(self.gates.items()):
            if all(queue[0] == name for queue in self.queues if name in queue):
                now = self.base_bytes if self.args.small else used_bytes(self.args.gpus)
                unfinished = gate.with_suffix(".tmp")
                unfinished.write_text(json.dumps([self.base_bytes, now]), encoding="utf-8")
                unfinished.replace(gate)
                del self.gates[name]

    def _case(self, name: str, devices: list[int], gate: Path) -> None:
        try:
            row = self._row(name, devices, gate)
        except Exception as error:  # a case that cannot even be tried must not hold up the others
            row = {"status": "failed", "seconds": 0.0, "case": CASES[name], "log": repr(error)}
        with self.changed:
            for queue in self.queues:
                if name in queue:
                    queue.remove(name)
            self.rows[name] = row
            self._open_gates()
            self._write()
            print_row(name, row, time.monotonic() - self.started)
            self.changed.notify()

    def _row(self, name: str, devices: list[int], gate: Path) -> dict[str, Any]:
        from zerofit.launch.trials import Trial, run_trial

        arguments = ["--case", name, *(["--small"] if self.args.small else [])]
        environment = {
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, devices)),
            "ZEROFIT_BENCH_GATE": str(gate),
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.args.gpus)),
        }
        outcome = run_trial(Trial(Path(__file__), arguments, len(devices), 900, environment))
        row = {"status": outcome.status, "seconds": outcome.seconds, "case": CASES[name]}
        row |= {"predicted": self.predicted[name], **(outcome.result or {})}
        if outcome.status != "ok":
            row["log"] = outcome.log_tail[-3000:]
        return row

    def _write(self) -> None:
        head = {"date": date.today().isoformat(), "gpus": self.args.gpus, "not_started": self.waiting}
        self.args.out.write_text(json.dumps({**head, "rows": self.rows}, indent=1), encoding="utf-8")


def compare(paths: list[Path]) -> None:
    """The errors of the predictions that were made before measuring, and of this version's."""
    from zerofit.planning.memory import predict_memory
    from zerofit.planning.plan import Plan

    rows: dict[str, Any] = {}
    for path in paths:
        rows |= json.loads(path.read_text(encoding="utf-8"))["rows"]
    print("as predicted before they were measured")
    summarise(rows)
    for row in rows.values():
        if row["status"] == "ok":
            row["predicted"] = asdict(predict_memory(Plan.model_validate(row["plan"])))
    print("as this version predicts them")
    summarise(rows)


def used_bytes(gpus: int) -> list[int]:
    """What the driver shows as used on each GPU of the machine."""
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(gpus)]
    used = [int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles]
    pynvml.nvmlShutdown()
    return used


def print_row(name: str, row: dict[str, Any], seconds: float) -> None:
    if row["status"] != "ok":
        print(f"{seconds:5.0f} s  {name:32} {row['status']}: {row['log'][-800:]}", flush=True)
        return
    values = []
    for what in ("allocated", "reserved", "driver"):
        predicted, measured = row["predicted"][f"{what}_bytes"], row[f"{what}_bytes"]
        values.append(f"{what} {measured / 2**30:6.2f} GiB {error(predicted, measured):+6.2%}")
    print(f"{seconds:5.0f} s  {name:32} {'  '.join(values)}  {row['step_seconds'] * 1e3:7.1f} ms", flush=True)


def error(predicted: float, measured: float) -> float:
    return predicted / measured - 1 if measured else 0.0


def summarise(rows: dict[str, Any]) -> None:
    """Mean, 95th percentile and worst error of what was measured."""
    good = [row for row in rows.values() if row["status"] == "ok"]
    for what in ("allocated", "reserved", "driver"):
        errors = sorted(abs(error(row["predicted"][f"{what}_bytes"], row[f"{what}_bytes"])) for row in good)
        if errors:
            mean, high = statistics.mean(errors), errors[min(len(errors) - 1, int(0.95 * len(errors)))]
            print(f"{what}: mean {mean:.2%}, 95th percentile {high:.2%}, worst {errors[-1]:.2%} of {len(errors)} cases")


# One rank of a case


def run_case(name: str, small: bool) -> None:
    """Import, wait for the GPUs, measure."""
    plan = plan_of(CASES[name], small)
    _import_all(plan)
    base_bytes, gate_bytes = _wait_at_gate()
    watchdog = threading.Timer(CASE_SECONDS, _give_up)
    watchdog.daemon = True
    watchdog.start()
    from zerofit.engines.world import launcher_store, open_world

    with open_world(plan, launcher_store()) as world:
        result = {**measure(plan, world, base_bytes), "used_at_gate_bytes": gate_bytes}
    from zerofit.launch.trials import write_result

    write_result(result)
    sys.stdout.flush()
    os._exit(0)  # what DeepSpeed and compile workers leave behind need not be waited for


def _import_all(plan: Any) -> None:
    """Everything heavy, without touching a GPU."""
    import torch

    if plan.strategy.startswith("zero"):
        os.environ["DS_ACCELERATOR"] = plan.device
        import_module("deepspeed")
    if plan.compile:
        import_module("torch._inductor.compile_fx")
    torch.manual_seed(0)


def _wait_at_gate() -> tuple[list[int], list[int]]:
    """What the driver showed as used on each GPU before the first case, and when the gate opened."""
    gate = os.environ.get("ZEROFIT_BENCH_GATE")
    if gate is None:
        return [], []
    while not Path(gate).exists():
        time.sleep(0.02)
    base_bytes, gate_bytes = json.loads(Path(gate).read_text(encoding="utf-8"))
    return base_bytes, gate_bytes


def _give_up() -> None:
    print(f"no end after {CASE_SECONDS:.0f} s", flush=True)
    os._exit(1)


class Phases:
    """PyTorch's peaks by phase: its counters are read and reset at every boundary."""

    def __init__(self, engine: Any, cuda: bool) -> None:
        self.cuda, self.phase = cuda, "init"
        self.allocated: dict[str, int] = {}
        self.reserved_bytes = 0
        self.enter("idle")
        engine.model.register_forward_pre_hook(lambda *_: self.enter("forward"))
        engine.model.register_forward_hook(lambda *_: self.enter("backward"))
        owner, attribute = (engine.zero, "step") if hasattr(engine, "zero") else (engine, "_apply")
        setattr(owner, attribute, self._before(getattr(owner, attribute)))

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            self.enter("step")
            return function(*args, **kwargs)

        return step

    def enter(self, phase: str) -> None:
        """Close the current phase's count."""
        if self.cuda:
            import torch

            peak = torch.cuda.max_memory_allocated()
            self.allocated[self.phase] = max(self.allocated.get(self.phase, 0), peak)
            self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        self.phase = phase


def measure(plan: Any, world: Any, base_bytes: list[int]) -> dict[str, Any]:
    """Build, train a few steps; the same dictionary on every rank."""
    import torch

    from zerofit.engines.build import build
    from zerofit.models import model_spec

    cuda = plan.device == "cuda"
    engine = build(plan, model_spec(plan.model.kind), world)
    engine.load(constant_reader())
    phases = Phases(engine, cuda)
    window, times = list(window_of(plan, world.rank)), []
    for index in range(WARM_UP_STEPS + STEPS):
        started = time.perf_counter()
        engine.train_step(window, 1e-4, index).read()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    phases.enter("end")
    seconds = statistics.median(times[WARM_UP_STEPS:])
    own = {
        "allocated_bytes": max(phases.allocated.values(), default=0),
        "reserved_bytes": phases.reserved_bytes,
        "driver_bytes": _driver_bytes(world.local_rank, base_bytes) if cuda else 0,
        "phases": phases.allocated,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    ranks = _gathered(own)
    return {
        **{key: max(rank[key] for rank in ranks) for key in own if key != "phases"},
        "ranks": ranks,
        "step_seconds": seconds,
        "step_seconds_all": times,
        "tokens_per_second": plan.global_batch * plan.model.block_size / seconds,
        "plan": plan.model_dump(mode="json", exclude={"state_bytes"}),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
    }


def _gathered(own: dict[str, Any]) -> list[dict[str, Any]]:
    import torch.distributed as dist

    if not dist.is_initialized():
        return [own]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return ranks


def _driver_bytes(local_rank: int, base_bytes: list[int]) -> int:
    """Of this rank's GPU, less what was used before the first case."""
    device = int(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")[local_rank])
    used = used_bytes(device + 1)[device]
    return used - (base_bytes[device] if base_bytes else 0)


def constant_reader() -> Any:
    """Quick initial values: small and constant; every other state starts afresh."""
    import torch

    def read(name: str, role: str, start: int, stop: int) -> Any:
        return torch.full((stop - start,), 1.0 if ".ln_" in f".{name}" else 0.01) if role == "parameter" else None

    return read


def window_of(plan: Any, rank: int) -> Iterator[Any]:
    """One window of random tokens, the same in every step."""
    import torch

    from zerofit.data.loader import collate

    generator = torch.Generator().manual_seed(rank)
    for _ in range(plan.accumulation_steps):
        size = (plan.micro_batch, plan.model.block_size + 1)
        yield collate(torch.randint(0, plan.model.vocab_size, size, generator=generator).numpy())


if __name__ == "__main__":
    main()
