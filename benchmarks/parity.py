"""The same ten steps under one strategy: losses and gradient norms, to set beside those of another.

    python benchmarks/parity.py --strategy zero2 --precision bf16 [--gpus 2] [--offload cpu] [--compile]
    python benchmarks/parity.py --strategy fsdp2 --precision bf16 --gpus 4 --plan '{"gradient_dtype": "fp32"}'

A GPT-2 of 8 layers and width 512 on random tokens with unevenly masked targets, a global batch of 8 samples whatever
the number of ranks, clipping active. On GPUs with NCCL where there are any, else on CPU processes with gloo.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

STEPS, GLOBAL_BATCH = 10, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="single")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--offload", default="none")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--plan", type=json.loads, default={}, help="more settings of the plan, as JSON")
    parser.add_argument("--inside", action="store_true", help="be a rank; without it the ranks are started")
    args = parser.parse_args()
    if args.inside:
        run_rank(args)
    else:
        print(run_ranks(**{k: v for k, v in vars(args).items() if k != "inside"}))


def run_ranks(
    strategy: str, precision: str, offload: str = "none", gpus: int = 1, compile: bool = False, plan: Any = None
) -> Any:
    """Losses and gradient norms of each step, ``[[loss, norm], ...]``, from processes of their own.

    Args:
        plan: more settings of the plan, by name.
    """
    from zerofit.launch.trials import Trial, run_trial

    arguments = [
        "--inside",
        "--strategy",
        strategy,
        "--precision",
        precision,
        "--offload",
        offload,
        "--gpus",
        str(gpus),
        "--plan",
        json.dumps(plan or {}),
    ]
    outcome = run_trial(Trial(Path(__file__), [*arguments, *(["--compile"] if compile else [])], gpus, 200))
    if outcome.result is None:
        raise RuntimeError(f"{strategy} {precision}: {outcome.status}\n{outcome.log_tail}")
    return outcome.result["steps"]


def run_rank(args: argparse.Namespace) -> None:
    """Train and report."""
    import torch

    from zerofit.checkpoint.model import initial_reader
    from zerofit.config.models import GPT2Config
    from zerofit.engines.build import build
    from zerofit.engines.world import launcher_store, open_world
    from zerofit.launch.trials import write_result
    from zerofit.models import model_spec
    from zerofit.planning.plan import Plan, ZeroPlan

    cuda = torch.cuda.is_available()
    model = GPT2Config(n_layer=8, n_head=8, n_embd=512, vocab_size=5000, block_size=128, pad_vocab_to=64)
    plan = Plan(
        **{
            "model": model,
            "parameters": model.parameter_count(),
            "strategy": args.strategy,
            "offload": args.offload,
            "device": "cuda" if cuda else "cpu",
            "world_size": args.gpus,
            "micro_batch": 2,
            "accumulation_steps": GLOBAL_BATCH // (2 * args.gpus),
            "precision": args.precision,
            "compile": args.compile,
            "zero": ZeroPlan(pin_memory=cuda),
            **args.plan,
        }
    )
    spec = model_spec("gpt2")
    with open_world(plan, launcher_store()) as world:
        engine = build(plan, spec, world)
        engine.load(initial_reader(spec, model, seed=1))
        steps = []
        for step in range(STEPS):
            result = engine.train_step(window(model, step, world.rank, args.gpus), 1e-4, step).read()
            steps.append([result.loss, result.grad_norm])
        engine.close()
    write_result({"steps": steps})


def window(model: Any, step: int, rank: int, ranks: int) -> Any:
    """This rank's part of the step's global batch; sample i keeps its first 1 - i/10 targets."""
    import torch

    from zerofit.data.loader import IGNORE, collate
    from zerofit.types import Batch

    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, model.vocab_size, (GLOBAL_BATCH, model.block_size + 1), generator=generator)
    batches = []
    for first in range(2 * rank, GLOBAL_BATCH, 2 * ranks):
        inputs = dict(collate(tokens[first : first + 2].numpy()).inputs)
        for row in range(2):
            inputs["targets"][row, round(model.block_size * (1 - (first + row) / 10)) :] = IGNORE
        batches.append(Batch(inputs, int((inputs["targets"] != IGNORE).sum())))
    return batches


if __name__ == "__main__":
    main()
