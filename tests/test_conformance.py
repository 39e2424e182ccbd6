"""One suite for every engine: two gloo ranks against one process with the whole batch.

The reference is the `single` engine in fp32, itself compared with a loop in plain PyTorch. Batches are unevenly masked
(the last samples entirely), so that ranks and micro-batches have different weights, and clipping is active.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from processes import run
from zerofit.checkpoint.model import initial_reader
from zerofit.config.models import GPT2Config
from zerofit.config.schema import LossScaleConfig
from zerofit.engines.build import build
from zerofit.engines.deepspeed import import_deepspeed
from zerofit.engines.loss_scale import LossScaler
from zerofit.errors import MissingDependency
from zerofit.models import model_spec
from zerofit.models.gpt2 import SPEC
from zerofit.planning.memory import state_bytes
from zerofit.planning.plan import Plan
from zerofit.types import SAVE, STOP, Batch, Reader, StepResult, World

MODEL = GPT2Config(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=65)
SHAPES = MODEL.parameter_shapes()
#: Partitions of this one's matrices are large enough to be swapped (1 MiB).
SWAPPED_MODEL = GPT2Config(n_layer=1, n_head=2, n_embd=512, block_size=16, vocab_size=65)
SAMPLES, ACCUMULATION, LR, CLIP = 12, 3, 1e-3, 0.5
#: Steps before states are saved, and after.
STEPS, LATER = 10, 3
VARIANTS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp2": {"strategy": "fsdp2"},
    "fsdp2-kept": {"strategy": "fsdp2", "fsdp": {"reshard_after_forward": False}},
    "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "zero2"},
    "zero3": {"strategy": "zero3"},
    "zero1-cpu": {"strategy": "zero1", "offload": "cpu"},
    "zero2-cpu": {"strategy": "zero2", "offload": "cpu"},
    "zero3-cpu": {"strategy": "zero3", "offload": "cpu"},
    "zero3-cpu-parameters": {"strategy": "zero3", "offload": "cpu", "offload_parameters": "cpu"},
}
#: Precision, gradient type -> relative tolerance of loss and of gradient norm. fp32 is the project's promise. Half
#: precision adds its rounding (2^-9 bf16, 2^-12 fp16) in another order on every engine; ten times what was seen.
TOLERANCES = {
    ("fp32", "compute"): (1e-5, 1e-5),
    ("bf16", "compute"): (5e-4, 2e-2),
    ("bf16", "fp32"): (5e-4, 2e-2),
    ("fp16", "compute"): (1e-4, 5e-3),
    ("fp16", "fp32"): (1e-4, 5e-3),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_precision = pytest.mark.parametrize(("precision", "gradient_dtype"), TOLERANCES)


def make_plan(variant: str = "single", **fields: Any) -> Plan:
    base: dict[str, Any] = {
        "model": MODEL,
        "parameters": MODEL.parameter_count(),
        "device": "cpu",
        "world_size": 2,
        "micro_batch": SAMPLES // (2 * ACCUMULATION),
        "accumulation_steps": ACCUMULATION,
        "precision": "fp32",
        "optimizer": {"grad_clip": CLIP},
        # The scale doubles within the test.
        "loss_scale": {"initial_power": 10, "window": 3},
        # Several buckets, several sub-groups, and both kinds of small parameters: persistent and not.
        "zero": {
            "pin_memory": False,
            "reduce_bucket_elements": 10_000,
            "persistence_threshold_elements": 32,
            "sub_group_elements": 5_000,
        },
    }
    single = {"strategy": "single", "world_size": 1, "micro_batch": SAMPLES, "accumulation_steps": 1}
    return Plan.model_validate(base | VARIANTS.get(variant, single) | fields)


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of all samples; later samples are masked more, the last two entirely."""
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(0, MODEL.padded_vocab_size, (SAMPLES, MODEL.block_size + 1), generator=generator)
    tokens, targets = text[:, :-1].clone(), text[:, 1:].clone()
    keep = [*torch.linspace(1, 0, SAMPLES - 1).tolist(), 0]
    masked = torch.rand(targets.shape, generator=generator) >= torch.tensor(keep)[:, None]
    return tokens, targets.masked_fill(masked, -100)


def window(plan: Plan, step: int, rank: int) -> list[Batch]:
    """The rank's share of `global_batch`: consecutive samples."""
    share = slice(rank * SAMPLES // plan.world_size, (rank + 1) * SAMPLES // plan.world_size)
    parts = zip(*(part[share].split(plan.micro_batch) for part in global_batch(step)), strict=True)
    return [Batch({"tokens": x, "targets": y}, int((y != -100).sum())) for x, y in parts]


#: (name, role) -> whole flattened tensor.
States = dict[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class Piece:
    """A fragment, as it crosses the pipe."""

    name: str
    role: str
    shape: tuple[int, ...]
    start: int
    data: np.ndarray


@dataclass(frozen=True)
class Trained:
    """What one rank saw: steps, then its states, then more steps."""

    steps: list[StepResult]
    pieces: list[Piece]
    scalars: dict[str, float]
    memory: dict[str, int]
    later: list[StepResult] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


def pieces_of(engine: Any) -> list[Piece]:
    return [Piece(f.name, f.role, f.shape, f.start, f.data.clone().numpy()) for f in engine.fragments()]


def whole(pieces: Iterable[Piece]) -> States:
    """Fragments put together; fails unless they cover each element of each tensor exactly once."""
    by_tensor: dict[tuple[str, str], list[Piece]] = {}
    for piece in pieces:
        assert piece.data.dtype == np.float32
        assert len(piece.data) > 0
        by_tensor.setdefault((piece.name, piece.role), []).append(piece)
    states: States = {}
    for key, parts in by_tensor.items():
        parts.sort(key=lambda piece: piece.start)
        ends = np.cumsum([0, *(len(piece.data) for piece in parts)])
        assert [piece.start for piece in parts] == ends[:-1].tolist()
        assert {piece.shape for piece in parts} == {SHAPES[key[0]]}
        assert ends[-1] == np.prod(SHAPES[key[0]])
        states[key] = np.concatenate([piece.data for piece in parts])
    return states


def reader_of(states: States) -> Reader:
    def read(name: str, role: str, start: int, stop: int) -> Tensor | None:
        values = states.get((name, role))
        return None if values is None else torch.from_numpy(values[start:stop].copy())

    return read


def train(world: World, plan: Plan, steps: int = STEPS, later: int = 0) -> Trained:
    """Train from the initial weights."""
    engine = start(world, plan)
    first = take_steps(engine, world, plan, range(steps))
    pieces, scalars, memory = pieces_of(engine), dict(engine.scalars()), dict(engine.memory())
    after = take_steps(engine, world, plan, range(steps, steps + later))
    engine.close()
    return Trained(first, pieces, scalars, memory, after)


def start(world: World, plan: Plan) -> Any:
    """An engine with the initial weights."""
    spec = model_spec(plan.model.kind)
    engine = build(plan, spec, world)
    engine.load(initial_reader(spec, plan.model, plan.seed))
    return engine


def take_steps(engine: Any, world: World, plan: Plan, steps: Iterable[int]) -> list[StepResult]:
    return [engine.train_step(window(plan, step, world.rank), LR, step).read() for step in steps]


@functools.cache
def trained(variant: str, precision: str = "fp32", gradient_dtype: str = "compute") -> list[Trained]:
    """All ranks' view of the common training run."""
    plan = make_plan(variant, precision=precision, gradient_dtype=gradient_dtype)
    ranks: list[Trained] = run(plan.world_size, train, plan, STEPS, LATER)
    return ranks


def states_of(ranks: Iterable[Trained]) -> States:
    return whole(piece for rank in ranks for piece in rank.pieces)


def assert_same_states(left: States, right: States) -> None:
    assert left.keys() == right.keys()
    for key, values in left.items():
        np.testing.assert_array_equal(values, right[key], err_msg=str(key))


def assert_close(steps: Sequence[StepResult], expected: Sequence[StepResult], loss: float, norm: float) -> None:
    assert len(steps) == len(expected)
    for mine, theirs in zip(steps, expected, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=loss)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=norm)
        assert (mine.weight, mine.skipped, mine.loss_scale) == (theirs.weight, theirs.skipped, theirs.loss_scale)


def plain_loop(world: World, steps: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of a loop that uses nothing of the engines: the mean over the valid tokens, AdamW."""
    model = SPEC.build(MODEL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(SPEC.init(MODEL, name, 1337))
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    seen = []
    for step in range(steps):
        tokens, targets = global_batch(step)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((loss.item(), norm.item()))
    return seen


def test_single_is_a_plain_pytorch_loop() -> None:
    (plain,) = run(1, plain_loop, STEPS)
    for result, (loss, norm) in zip(trained("single")[0].steps, plain, strict=True):
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(norm, rel=1e-5)
        assert result.grad_norm > CLIP  # so that clipping is part of what is compared


@each_precision
@each_variant
def test_parity_with_one_process(variant: str, precision: str, gradient_dtype: str) -> None:
    ranks = trained(variant, precision, gradient_dtype)
    (reference,) = trained("single", precision, gradient_dtype)
    assert_close(ranks[0].steps, reference.steps, *TOLERANCES[precision, gradient_dtype])
    assert ranks[0].steps == ranks[1].steps


@each_precision
def test_half_precision_stays_close_to_fp32(precision: str, gradient_dtype: str) -> None:
    loss, norm = TOLERANCES[precision, gradient_dtype]
    (half,), (full,) = trained("single", precision, gradient_dtype), trained("single")
    for mine, theirs in zip(half.steps, full.steps, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=loss)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=norm)


@each_variant
def test_the_loss_scale_grows(variant: str) -> None:
    """So that parity includes steps at which it doubles."""
    scales = [step.loss_scale for step in trained(variant, "fp16")[0].steps]
    assert scales[0] == 2**10
    assert scales[-1] == 2**12


@each_precision
@each_variant
def test_memory_is_what_the_plan_says(variant: str, precision: str, gradient_dtype: str) -> None:
    ranks = trained(variant, precision, gradient_dtype)
    busiest = max((rank.memory for rank in ranks), key=lambda items: sum(items.values()))
    assert busiest == state_bytes(make_plan(variant, precision=precision, gradient_dtype=gradient_dtype))


@each_variant
def test_fragments_cover_each_element_once(variant: str) -> None:
    states = states_of(trained(variant))
    assert states.keys() == {(name, role) for name in SHAPES for role in ("parameter", "exp_avg", "exp_avg_sq")}
    reference = states_of(trained("single"))
    for key, values in reference.items():
        np.testing.assert_allclose(states[key], values, rtol=0, atol=1e-4 if key[1] == "parameter" else 1e-5)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "ddp"])
def test_the_optimizer_is_sharded(variant: str) -> None:
    """The ranks' masters and moments together are DDP's, in about equal parts (no padding at this shape)."""
    ranks, ddp = trained(variant, "bf16"), trained("ddp", "bf16")[0].memory
    for item in ("master", "moments"):
        held = [rank.memory[f"host_{item}" if "cpu" in variant else item] for rank in ranks]
        assert sum(held) == ddp[item]
        assert max(held) < 1.01 * min(held)  # FSDP2 cuts rows, of which one matrix has an odd number


def test_zero3_shards_the_compute_copy() -> None:
    whole_copy = trained("ddp", "bf16")[0].memory["parameters"]
    persistent = 2 * sum(int(np.prod(s)) for s in SHAPES.values() if np.prod(s) <= 32)
    assert trained("zero3", "bf16")[0].memory["parameters"] == whole_copy // 2 + persistent
    assert trained("zero3-cpu-parameters", "bf16")[0].memory["parameters"] == persistent
    assert trained("zero3-cpu-parameters", "bf16")[0].memory["host_parameters"] == whole_copy // 2


def resume(world: World, plan: Plan, states: States, scalars: dict[str, float]) -> Trained:
    """What a fresh engine holds right after loading, its compute copy, and its next steps."""
    engine = build(plan, SPEC, world)
    engine.load(reader_of(states), scalars)
    loaded, copies = pieces_of(engine), compute_copy(engine)
    later = take_steps(engine, world, plan, range(STEPS, STEPS + LATER))
    return Trained([], loaded, dict(engine.scalars()), {}, later, {"compute_copy": copies})


def compute_copy(engine: Any) -> dict[str, np.ndarray]:
    parameters = dict(engine.model.named_parameters())
    if engine.plan.strategy == "fsdp2":  # whole, on every rank: collective
        return {name: p.full_tensor().detach().float().clone().numpy() for name, p in parameters.items()}
    if engine.plan.strategy != "zero3":
        return {name: p.detach().float().clone().numpy() for name, p in parameters.items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().float().clone().numpy() for name, p in parameters.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("variant", ["single", *VARIANTS])
def test_load_after_save_changes_nothing(variant: str, precision: str) -> None:
    plan, before = make_plan(variant, precision=precision), trained(variant, precision)
    saved = states_of(before)
    again: list[Trained] = run(plan.world_size, resume, plan, saved, before[0].scalars)
    assert_same_states(states_of(again), saved)
    assert again[0].later == before[0].later
    half = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for name, values in again[0].extra["compute_copy"].items():
        rounded = torch.from_numpy(saved[name, "parameter"]).to(half).float().numpy()
        np.testing.assert_array_equal(values.reshape(-1), rounded, err_msg=name)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [("zero3", "single"), ("single", "zero2-cpu"), ("zero2", "zero3"), ("zero3", "fsdp2"), ("fsdp2", "single")],
)
def test_any_strategy_resumes_any_other(writer: str, reader: str) -> None:
    before, plan = trained(writer), make_plan(reader)
    after: list[Trained] = run(plan.world_size, resume, plan, states_of(before), before[0].scalars)
    assert_close(after[0].later, trained("single")[0].later, 1e-5, 1e-5)


@pytest.mark.parametrize("variant", ["ddp", "fsdp2", "zero2", "zero3"])
def test_loading_parameters_alone_starts_the_optimizer_afresh(variant: str) -> None:
    """Moments 0 and step 0, also in an engine that has trained."""
    plan = make_plan(variant)
    again = run(plan.world_size, train_load_train, plan)
    assert again[0][0] == again[0][1]


def train_load_train(world: World, plan: Plan) -> list[list[StepResult]]:
    engine = build(plan, SPEC, world)
    runs = []
    for _ in range(2):
        engine.load(initial_reader(SPEC, plan.model, plan.seed))
        assert engine.scalars()["optimizer_steps"] == 0
        runs.append(take_steps(engine, world, plan, range(3)))
    assert engine.scalars()["optimizer_steps"] == 3
    return runs


@pytest.mark.parametrize("variant", ["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero2-cpu", "zero3-cpu"])
def test_overflow_skips_the_step_and_halves_the_scale(variant: str) -> None:
    # 2^32 overflows fp16 gradients; the first overflow only uses up the hysteresis.
    loss_scale = {"initial_power": 32, "hysteresis": 2}
    plan = make_plan(variant, precision="fp16", loss_scale=loss_scale)
    ranks: list[Trained] = run(2, train, plan, 3)
    steps = ranks[0].steps
    assert [step.loss_scale for step in steps] == [2.0**32, 2.0**32, 2.0**31]
    assert all(step.skipped and not np.isfinite(step.grad_norm) for step in steps)
    assert ranks[0].scalars["optimizer_steps"] == 0
    assert ranks[0].scalars["loss_scale"] == 2.0**30
    states = states_of(ranks)
    for name in SHAPES:
        np.testing.assert_array_equal(states[name, "parameter"], SPEC.init(MODEL, name, plan.seed).flatten().numpy())
        assert not states[name, "exp_avg"].any()


@pytest.mark.parametrize("variant", ["single", *VARIANTS])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_is_skipped(variant: str, precision: str) -> None:
    plan = make_plan(variant, precision=precision)
    ranks: list[Trained] = run(plan.world_size, train_poisoned, plan)
    assert [step.skipped for step in ranks[0].steps] == [True]
    assert not states_of(ranks)["h.0.attn.c_attn.weight", "exp_avg"].any()


def train_poisoned(world: World, plan: Plan) -> Trained:
    initial = initial_reader(SPEC, plan.model, plan.seed)

    def read(name: str, role: str, start: int, stop: int) -> Tensor | None:
        values = initial(name, role, start, stop)
        return values * float("inf") if values is not None and name == "h.1.mlp.c_proj.weight" else values

    engine = build(plan, SPEC, world)
    engine.load(read)
    return Trained(take_steps(engine, world, plan, [0]), pieces_of(engine), {}, {})


@each_variant
def test_a_window_without_weight_changes_nothing_but_decay(variant: str) -> None:
    plan = make_plan(variant)
    (result, norms), _ = run(2, step_on_padding, plan)
    assert (result.loss, result.weight, result.grad_norm, result.skipped) == (0.0, 0, 0.0, False)
    assert norms[0] == pytest.approx(norms[1] * (1 - LR * 0.1))


def step_on_padding(world: World, plan: Plan) -> tuple[StepResult, list[float]]:
    engine = start(world, plan)
    tokens = torch.zeros(plan.micro_batch, MODEL.block_size, dtype=torch.int64)
    batch = Batch({"tokens": tokens, "targets": torch.full_like(tokens, -100)}, 0)

    def norm() -> float:
        return (
            sum(
                float(f.data.square().sum())
                for f in engine.fragments()
                if (f.name, f.role) == ("wte.weight", "parameter")
            )
            ** 0.5
        )

    before = norm()
    result = engine.train_step([batch] * plan.accumulation_steps, LR, 0).read()
    return result, [norm(), before]


@pytest.mark.parametrize("variant", ["ddp", "zero1", "zero3"])
def test_wishes_of_one_rank_are_agreed_by_all(variant: str) -> None:
    assert run(2, wish, make_plan(variant)) == [STOP | SAVE] * 2


def wish(world: World, plan: Plan) -> int:
    engine = start(world, plan)
    wishes = STOP if world.rank else SAVE
    return engine.train_step(window(plan, 0, world.rank), LR, 0, wishes).read().wishes


@pytest.mark.parametrize("variant", ["single", *VARIANTS])
def test_evaluation_and_prediction_leave_training_alone(variant: str) -> None:
    plan = make_plan(variant)
    ranks = run(plan.world_size, train_and_evaluate, plan)
    steps, loss, weight, logits = ranks[0]
    assert steps == trained(variant)[0].steps[:4]
    _, expected_loss, expected_weight, expected_logits = evaluated_in_one_process()
    assert (loss, weight) == (pytest.approx(expected_loss, rel=1e-5), expected_weight)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-4)


@functools.cache
def evaluated_in_one_process() -> tuple[list[StepResult], float, int, np.ndarray]:
    (reference,) = run(1, train_and_evaluate, make_plan())
    return reference


def train_and_evaluate(world: World, plan: Plan) -> tuple[list[StepResult], float, int, np.ndarray]:
    engine = start(world, plan)
    steps: list[StepResult] = []
    for step in range(4):
        steps += take_steps(engine, world, plan, [step])
        loss = engine.eval_step(window(plan, 99, world.rank)).read()["loss"]
        logits = engine.predict(Batch({"tokens": global_batch(99)[0][:1, :5]}, 0))
    return steps, loss.mean, loss.weight, logits.numpy()


@pytest.mark.parametrize("variant", ["single", *VARIANTS])
def test_checkpointing_recomputes_the_blocks(variant: str) -> None:
    plan = make_plan(variant, activation_checkpointing_every=2)
    (counts, steps), *_ = run(plan.world_size, count_forwards, plan)
    micro_steps = 2 * plan.accumulation_steps
    assert counts == [2 * micro_steps, micro_steps]  # every second block, from the first on
    assert_close(steps, trained(variant)[0].steps[:2], 1e-6, 1e-6)


def count_forwards(world: World, plan: Plan) -> tuple[list[int], list[StepResult]]:
    engine = start(world, plan)
    counts = [0, 0]
    for index, block in enumerate(SPEC.blocks(engine.model)):

        def count(*_: Any, index: int = index) -> None:
            counts[index] += 1

        block.mlp.c_fc.register_forward_hook(count)
    results = take_steps(engine, world, plan, range(2))
    return counts, results


@pytest.mark.parametrize("variant", ["single", "ddp", "zero2"])
def test_compile_wraps_every_unit(variant: str) -> None:
    plan = make_plan(variant, compile=True)
    assert run(plan.world_size, compiled_units, plan)[0] == [True] * 3


def compiled_units(world: World, plan: Plan) -> list[bool]:
    engine: Any = build(plan, SPEC, world)
    return [unit._compiled_call_impl is not None for unit in SPEC.compiled_units(engine.model)]


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing_every": 1}, {"gradient_dtype": "fp32"}], ids=str)
def test_fsdp2_gathers_around_what_is_compiled(settings: dict[str, Any]) -> None:
    """Compiled, with the graphs run as they were traced: the same gradients, one graph a unit, no break in any."""
    plan = make_plan("fsdp2", compile=True, precision="bf16" if "gradient_dtype" in settings else "fp32", **settings)
    ranks: list[Trained] = run(2, train_on_graphs, plan)
    eager: list[Trained] = run(2, train, plan.model_copy(update={"compile": False}), 3)
    assert_close(ranks[0].steps, eager[0].steps, 1e-5 if not plan.mixed else 5e-4, 1e-5 if not plan.mixed else 2e-2)
    compiled, plain = states_of(ranks), states_of(eager)
    for name in SHAPES:
        np.testing.assert_allclose(
            compiled[name, "exp_avg"], plain[name, "exp_avg"], atol=1e-6 if not plan.mixed else 1e-3
        )
    graphs, breaks, after_other_shapes = ranks[0].extra["seen"]
    assert 0 < graphs <= 4  # the two blocks share one; a second one without gradients
    assert (breaks, after_other_shapes) == (0, graphs)


def train_on_graphs(world: World, plan: Plan) -> Trained:
    from torch._dynamo.utils import counters

    vars(torch)["compile"] = functools.partial(torch.compile, backend="aot_eager")
    engine = start(world, plan)
    steps = take_steps(engine, world, plan, range(3))
    pieces, graphs = pieces_of(engine), counters["stats"]["unique_graphs"]
    tokens = torch.zeros(1, MODEL.block_size // 2, dtype=torch.int64)
    engine.eval_step([Batch({"tokens": tokens, "targets": tokens}, tokens.numel())], compiled=False)
    assert engine.predict(Batch({"tokens": tokens}, tokens.numel())).shape == (1, tokens.shape[1], MODEL.vocab_size)
    seen = (graphs, sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"])
    return Trained(steps, pieces, {}, {}, extra={"seen": seen})


@pytest.mark.long
@pytest.mark.parametrize("variant", ["single", "ddp", "fsdp2", "zero1", "zero2"])
def test_compiled_units_train_the_same(variant: str) -> None:
    plan = make_plan(variant, compile=True)
    ranks: list[Trained] = run(plan.world_size, train, plan, 3, timeout_seconds=500)
    assert_close(ranks[0].steps, trained(variant)[0].steps[:3], 1e-5, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("variant", ["zero2-cpu", "zero3-cpu"])
def test_deepspeeds_cpu_kernel_trains_the_same(variant: str) -> None:
    plan = make_plan(variant, optimizer={"grad_clip": CLIP, "cpu_kernel": "deepspeed"})
    ranks: list[Trained] = run(2, train, plan, timeout_seconds=500)
    assert_close(ranks[0].steps, trained("single")[0].steps, 1e-5, 1e-5)
    again: list[Trained] = run(2, resume, plan, states_of(ranks), ranks[0].scalars)
    assert_same_states(states_of(again), states_of(ranks))


@pytest.mark.long
@pytest.mark.skipif(not Path("/usr/include/libaio.h").exists(), reason="async_io needs libaio's header (libaio-dev)")
@pytest.mark.parametrize("parameters", ["none", "cpu", "nvme"])
def test_nvme_offload_trains_the_same(parameters: str, tmp_path: Path) -> None:
    fields = {"model": SWAPPED_MODEL, "parameters": SWAPPED_MODEL.parameter_count()}
    offload = {"strategy": "zero3", "offload": "nvme", "offload_parameters": parameters, "nvme_path": tmp_path}
    sub_groups = {"zero": {"pin_memory": False, "reduce_bucket_elements": 10_000, "persistence_threshold_elements": 32}}
    plan = make_plan("zero3", **fields, **offload, **sub_groups)
    ranks = run(2, train_and_reload_swapped, plan, timeout_seconds=500)
    (reference,) = run(1, train, make_plan(**fields), 3)
    assert_close(ranks[0].steps, reference.steps, 1e-5, 1e-5)
    assert ranks[0].memory == state_bytes(plan)
    assert ranks[0].memory["host_master"] < 4 * SWAPPED_MODEL.parameter_count() // 10  # the rest is on the drive
    assert ranks[0].extra["same"]
    assert ranks[0].extra["swapped_files"] > 0
    assert not list(tmp_path.iterdir())


def train_and_reload_swapped(world: World, plan: Plan) -> Trained:
    engine = start(world, plan)
    results = take_steps(engine, world, plan, range(3))
    memory, pieces = dict(engine.memory()), pieces_of(engine)
    own = {(p.name, p.role, p.start): p.data for p in pieces}
    engine.load(lambda name, role, start, stop: torch.from_numpy(own[name, role, start]), engine.scalars())
    same = all(np.array_equal(own[p.name, p.role, p.start], p.data) for p in pieces_of(engine))
    files = sum(1 for _ in Path(engine.swap_folder).rglob("*.swp"))
    engine.close()
    return Trained(results, [], {}, memory, extra={"same": same, "swapped_files": files})


def test_without_deepspeed_the_message_names_the_remedy() -> None:
    (message,) = run(1, build_without_deepspeed, make_plan("zero2", world_size=1))
    assert "pip install 'zerofit[deepspeed]'" in message
    assert "single and ddp" in message


def build_without_deepspeed(world: World, plan: Plan) -> str:
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    with pytest.raises(MissingDependency) as refused:
        build(plan, SPEC, world)
    return str(refused.value)


def test_the_loss_scale_follows_deepspeeds_law() -> None:
    (laws,) = run(1, both_laws)
    assert laws[0] == laws[1]


def both_laws(world: World) -> list[list[float]]:
    import_deepspeed(make_plan("zero1", world_size=1), world).init_distributed()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    config = LossScaleConfig(initial_power=4, window=3, hysteresis=2, min_scale=2)
    mine = LossScaler(config, True, world.device)
    theirs = DynamicLossScaler(
        init_scale=2.0**4,
        scale_window=3,
        min_scale=2,
        delayed_shift=2,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
    )
    laws: list[list[float]] = [[], []]
    overflows = torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.2
    for overflow in overflows:
        laws[0].append(mine.scale.item())
        laws[1].append(theirs.loss_scale)
        mine.update(overflow)
        theirs.update_scale(bool(overflow))
    assert len(set(laws[1])) > 3
    return laws


def test_no_peak_is_lost_while_the_engine_is_built() -> None:
    (forgotten,) = run(1, peaks_forgotten)
    assert forgotten == [0, 1]


def peaks_forgotten(world: World) -> list[int]:
    """How often DeepSpeed's emptying of the cache has PyTorch forget its peaks: while an engine is built, and later."""
    plan = make_plan("zero2", world_size=1)
    import_deepspeed(plan, world)
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.utils import empty_cache

    forgotten: list[int] = []
    torch.cuda.reset_peak_memory_stats = lambda *_: forgotten.append(1)  # type: ignore[assignment]
    # As on a GPU.
    type(get_accelerator()).reset_peak_memory_stats = lambda *_: torch.cuda.reset_peak_memory_stats()
    engine = build(plan, SPEC, world)
    built = len(forgotten)
    empty_cache()
    engine.close()
    return [built, len(forgotten)]
