"""Every engine on a small ResNet: parity, and what becomes of batch norm's statistics.

Without synchronisation a micro-batch is normalised by itself. So runs agree when their micro-batches do, however these
are spread over ranks and windows: that is what is compared. With ``sync_batchnorm`` ranks agree with the whole batch.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from processes import run
from test_conformance import assert_close
from test_matrix import save
from zerofit.checkpoint.model import initial_reader, load_model
from zerofit.checkpoint.store import open_checkpoint
from zerofit.config.models import ResNetConfig
from zerofit.engines.build import build
from zerofit.engines.ddp import each_rank_its_own_buffers
from zerofit.models.resnet import MOMENTUM, SPEC
from zerofit.planning.memory import state_bytes
from zerofit.planning.plan import Plan
from zerofit.types import Batch, StepResult, World

#: Four pixels are left before the head, and a block starts as the identity: a small batch's statistics are tame then.
MODEL = ResNetConfig(layers=18, base_width=4, num_classes=5, input_size=64, zero_init_residual=True)
SAMPLES, MICRO, STEPS, LR = 16, 4, 3, 1e-2
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


def make_plan(strategy: str, ranks: int, **fields: Any) -> Plan:
    model = fields.pop("model", MODEL)
    base: dict[str, Any] = {
        "model": model, "parameters": model.parameter_count(), "device": "cpu", "strategy": strategy,
        "world_size": ranks, "micro_batch": MICRO, "accumulation_steps": SAMPLES // MICRO // ranks, "precision": "fp32",
        # A large eps: AdamW divides by it where a gradient is nothing but rounding.
        "optimizer": {"grad_clip": 0.5, "eps": 1e-2},
        "zero": {"pin_memory": False, "reduce_bucket_elements": 20_000, "persistence_threshold_elements": 100},
    }  # fmt: skip
    return Plan.model_validate(base | fields)


def window(plan: Plan, step: int, rank: int) -> list[Batch]:
    """Micro-batch m of all goes to rank m % ranks, as `data.loader.Share` has it."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn((SAMPLES, 3, 64, 64), generator=generator)
    targets = torch.randint(0, 5, (SAMPLES,), generator=generator)
    parts = list(zip(images.split(plan.micro_batch), targets.split(plan.micro_batch), strict=True))
    mine = parts[rank :: plan.world_size]
    return [Batch({"images": x, "targets": y}, len(y)) for x, y in mine]


@dataclass(frozen=True)
class Seen:
    """What one rank saw."""

    steps: list[StepResult]
    own: dict[str, np.ndarray]
    """The rank's own buffers before anything averages them."""
    fragments: dict[tuple[str, str, int], np.ndarray]
    evaluated: dict[str, float]
    memory: dict[str, int]
    again: list[float]


def train(world: World, plan: Plan, root: Path | None = None) -> Seen:
    engine: Any = build(plan, SPEC, world)
    engine.load(initial_reader(SPEC, plan.model, plan.seed))
    steps = [engine.train_step(window(plan, s, world.rank), LR, s).read() for s in range(STEPS)]
    own = {name: tensor.clone().numpy() for name, tensor in engine.buffers.tensors.items()}
    fragments = {(f.name, f.role, f.start): f.data.clone().numpy() for f in engine.fragments()}
    memory = dict(engine.memory())
    if root is not None:
        save(engine, world, root, STEPS)
    later = [engine.train_step(window(plan, s, world.rank), LR, s).read() for s in range(STEPS, 2 * STEPS)]
    sums = engine.eval_step(window(plan, 99, world.rank)).read()
    again: list[float] = []
    if root is not None:
        saved = open_checkpoint(root / f"step-{STEPS:08d}")
        engine.load(saved.read, saved.scalars)
        resumed = [engine.train_step(window(plan, s, world.rank), LR, s).read() for s in range(STEPS, 2 * STEPS)]
        resums = engine.eval_step(window(plan, 99, world.rank)).read()
        again = [a.loss - b.loss for a, b in zip(later, resumed, strict=True)] + [
            resums["loss"].total - sums["loss"].total
        ]
    engine.close()
    return Seen(steps + later, own, fragments, {n: s.mean for n, s in sums.items()}, memory, again)


@functools.cache
def trained(strategy: str, ranks: int = 2, precision: str = "fp32") -> list[Seen]:
    return run(ranks, train, make_plan(strategy, ranks, precision=precision))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_micro_batches_train_the_same(strategy: str) -> None:
    (reference,) = trained("single", 1)
    assert_close(trained(strategy)[0].steps, reference.steps, 1e-4, 1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_trains_with_fp32_statistics(strategy: str) -> None:
    (reference,) = trained("single", 1, "bf16")
    seen = trained(strategy, 2, "bf16")
    assert all(values.dtype in (np.float32, np.int64) for values in seen[0].own.values())
    assert_close(seen[0].steps[:STEPS], reference.steps[:STEPS], 2e-2, 0.2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_saved_statistics_are_the_ranks_average(strategy: str) -> None:
    first, second = trained(strategy)
    held = {name: data for (name, role, _), data in first.fragments.items() if role == "buffer"}
    assert {name: first.own[name].size for name in held} == {
        n: int(np.prod(s)) for n, s in MODEL.buffer_shapes().items()
    }
    assert not any(role == "buffer" for _, role, _ in second.fragments)  # once over all ranks
    name = "layer1.0.bn1.running_mean"
    assert not np.allclose(first.own[name], second.own[name])
    np.testing.assert_allclose(held[name], (first.own[name] + second.own[name]) / 2, rtol=1e-6)
    assert held["bn1.num_batches_tracked"] == STEPS * SAMPLES // MICRO // 2


def warnings_of(world: World, plan: Plan) -> tuple[list[str], bool]:
    """Warnings of what torch is going to drop; and whether DDP would copy buffers to all ranks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine: Any = build(plan, SPEC, world)
        engine.load(initial_reader(SPEC, plan.model, plan.seed))
        engine.train_step(window(plan, 0, world.rank), LR, 0).read()
    found = [str(w.message) for w in caught if issubclass(w.category, FutureWarning | DeprecationWarning)]
    copied = engine.replica.will_sync_module_buffers()
    engine.close()
    return found, copied


def test_ddp_leaves_buffers_alone_under_the_name_that_this_torch_knows() -> None:
    for found, copied in run(2, warnings_of, make_plan("ddp", 2)):
        assert found == []
        assert not copied


def test_ddps_argument_is_chosen_by_its_name() -> None:
    def older(module: Any, broadcast_buffers: bool = True) -> Any: ...

    def newer(module: Any, broadcast_buffers: Any = None, *, forward_sync_buffers: Any = None) -> Any: ...

    assert each_rank_its_own_buffers(older) == {"broadcast_buffers": False}
    assert each_rank_its_own_buffers(newer) == {"forward_sync_buffers": False}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_evaluation_uses_the_same_statistics_on_every_rank(strategy: str) -> None:
    first, second = trained(strategy)
    assert first.evaluated == second.evaluated
    assert first.evaluated == pytest.approx(trained("ddp")[0].evaluated, rel=1e-3)
    assert set(first.evaluated) == {"loss", "correct", "correct_top5"}


@pytest.mark.parametrize("strategy", ["single", *STRATEGIES])
def test_memory_is_what_the_planner_says(strategy: str) -> None:
    ranks = 1 if strategy == "single" else 2
    assert trained(strategy, ranks)[0].memory == state_bytes(make_plan(strategy, ranks))


@pytest.mark.parametrize("strategy", ["single", *STRATEGIES])
def test_goes_on_from_its_checkpoint_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    ranks = 1 if strategy == "single" else 2
    for seen in run(ranks, train, make_plan(strategy, ranks), tmp_path):
        assert seen.again == [0.0] * (STEPS + 1)
    saved = open_checkpoint(tmp_path / f"step-{STEPS:08d}")
    model, _ = load_model(saved, config=MODEL)
    stored = saved.read("bn1.running_var", "buffer", 0, 4)
    assert stored is not None
    assert torch.equal(model.get_buffer("bn1.running_var"), stored)


@pytest.mark.parametrize(("saving", "loading"), [("zero3", "ddp"), ("ddp", "zero2"), ("zero2", "single")])
def test_another_strategy_goes_on_with_the_statistics(saving: str, loading: str, tmp_path: Path) -> None:
    run(2, train, make_plan(saving, 2), tmp_path)
    ranks = 1 if loading == "single" else 2
    for same, evaluated in run(ranks, load_and_evaluate, make_plan(loading, ranks), tmp_path):
        assert same
        assert np.isfinite(evaluated)


def load_and_evaluate(world: World, plan: Plan, root: Path) -> tuple[bool, float]:
    engine: Any = build(plan, SPEC, world)
    saved = open_checkpoint(root / f"step-{STEPS:08d}")
    engine.load(saved.read, saved.scalars)
    held = [(f, saved.read(f.name, f.role, f.start, f.start + f.data.numel())) for f in engine.fragments()]
    same = all(values is not None and torch.equal(f.data, values) for f, values in held)
    loss = engine.eval_step(window(plan, 99, world.rank)).read()["loss"].mean
    engine.close()
    return same, loss


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_synchronised_statistics_are_those_of_the_whole_batch(strategy: str) -> None:
    model = MODEL.model_copy(update={"sync_batchnorm": True})
    whole = {"micro_batch": SAMPLES, "accumulation_steps": 1}
    half = {"micro_batch": SAMPLES // 2, "accumulation_steps": 1}
    (reference,) = run(1, train, make_plan("single", 1, model=model, **whole))
    seen = run(2, train, make_plan(strategy, 2, model=model, **half))
    assert_close(seen[0].steps, reference.steps, 1e-3, 1e-2)
    for name, values in reference.own.items():
        np.testing.assert_allclose(seen[1].own[name], values, rtol=1e-3, atol=1e-4, err_msg=name)


def warned(world: World, plan: Plan) -> list[str]:
    """What a short training warns of."""
    with warnings.catch_warnings(record=True) as told:
        train(world, plan)
    return [str(warning.message) for warning in told]


def test_training_warns_of_nothing_that_its_user_could_change() -> None:
    model = MODEL.model_copy(update={"sync_batchnorm": True})
    assert run(2, warned, make_plan("ddp", 2, model=model, micro_batch=SAMPLES // 2)) == [[], []]


def test_running_statistics_move_once_a_micro_batch_also_when_blocks_are_recomputed() -> None:
    batch = window(make_plan("single", 1), 0, 0)[0].inputs
    held = []
    for every in (0, 1):
        model = SPEC.build(MODEL, checkpoint_every=every)
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                tensor.copy_(SPEC.init(MODEL, name, 0))
        model(**batch)["loss"].backward()
        held.append({name: tensor.clone() for name, tensor in model.named_buffers()})
    assert all(torch.equal(held[0][name], held[1][name]) for name in held[0])
    stem = torch.nn.functional.conv2d(batch["images"], SPEC.init(MODEL, "conv1.weight", 0), stride=2, padding=3)
    expected = MOMENTUM * stem.mean((0, 2, 3))
    torch.testing.assert_close(held[0]["bn1.running_mean"], expected, rtol=1e-4, atol=1e-6)


def skip_a_step(world: World, plan: Plan) -> tuple[bool, bool, float]:
    """One good step, then one whose pictures are not finite on the last rank alone."""
    engine: Any = build(plan, SPEC, world)
    engine.load(initial_reader(SPEC, plan.model, plan.seed))
    engine.train_step(window(plan, 0, world.rank), LR, 0).read()
    before = {name: tensor.clone() for name, tensor in engine.buffers.tensors.items() if tensor.is_floating_point()}
    bad = window(plan, 1, world.rank)
    if world.rank == world.world_size - 1:
        bad[0].inputs["images"][0] = float("nan")
    skipped = engine.train_step(bad, LR, 1).read().skipped
    kept = all(torch.equal(before[name], engine.buffers.tensors[name]) for name in before)
    loss = engine.eval_step(window(plan, 2, world.rank)).read()["loss"].mean
    engine.close()
    return skipped, kept, loss


@pytest.mark.parametrize(("strategy", "precision"), [("single", "fp32"), ("ddp", "fp16"), ("zero2", "fp16"),
                                                     ("fsdp2", "bf16")])  # fmt: skip
def test_a_skipped_step_leaves_the_statistics_alone(strategy: str, precision: str) -> None:
    ranks = 1 if strategy == "single" else 2
    for skipped, kept, loss in run(ranks, skip_a_step, make_plan(strategy, ranks, precision=precision)):
        assert skipped
        assert kept
        assert np.isfinite(loss)
