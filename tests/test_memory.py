"""The planner's memory: what was measured, what must hold for every plan, and the allocator's rules."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerofit.config.models import GPT2Config, MambaConfig
from zerofit.planning.allocator import MIB, CachingAllocator, OutOfMemory, simulate_allocator
from zerofit.planning.coarse import coarse_items
from zerofit.planning.memory import (
    H200,
    OTHER_GPU,
    MemoryPrediction,
    device_constants,
    fits_within,
    predict_memory,
    state_bytes,
)
from zerofit.planning.plan import Plan
from zerofit.planning.zero_memory import pinned_bytes

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
GIB = 1024**3
XL = GPT2Config(n_layer=48, n_head=25, n_embd=1600, vocab_size=50257, pad_vocab_to=64)
SMALL = GPT2Config(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, pad_vocab_to=64)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
ALL = ("single", *STRATEGIES, "fsdp2")


def plan_of(strategy: str = "single", model: GPT2Config = XL, **fields: Any) -> Plan:
    base: dict[str, Any] = {
        "model": model,
        "parameters": model.parameter_count(),
        "strategy": strategy,
        "device": "cuda",
        "world_size": 1,
        "micro_batch": 8,
        "accumulation_steps": 1,
        "precision": "bf16",
    }
    return Plan.model_validate(base | fields)


def xl_rows() -> list[Any]:
    """Every measurement of our own engines on H200s with GPT-2 XL, as (name, row)."""
    rows = []
    for path in sorted(RESULTS.glob("*h200-gpt2_xl*.json")):
        for name, row in json.loads(path.read_text(encoding="utf-8"))["cases"].items():
            case = row.get("case", {})
            # Compiled ZeRO-3 trained something else (docs/experiments.md) and is refused since.
            wrong = case.get("strategy") == "zero3" and case.get("compile", True)
            if row["status"] == "ok" and "peer" not in case and not wrong:
                rows.append(pytest.param(row, id=f"{path.stem}-{name}"))
    return rows


def plan_of_row(row: dict[str, Any]) -> Plan:
    case = row["case"]
    return plan_of(
        case["strategy"],
        world_size=row["gpus"],
        micro_batch=case.get("micro_batch", 8),
        accumulation_steps=case.get("accumulation", 1),
        precision=case.get("precision", "bf16"),
        offload=case.get("offload", "none"),
        activation_checkpointing_every=case.get("checkpoint_every", 0),
        compile=case.get("compile", True),
        zero=case.get("zero", {}),
    )


def test_there_are_measurements() -> None:
    assert len(xl_rows()) >= 15


@pytest.mark.parametrize("row", xl_rows())
def test_predictions_meet_the_h200_measurements(row: dict[str, Any]) -> None:
    """Allocated within 0.2%, reserved within 6%. Those rows hold rank 0's peak: with accumulation, the last rank's,
    which is predicted, is higher by a partition of gradients."""
    found = predict_memory(plan_of_row(row))
    assert found.basis == "traced"
    low, high = 0.998, 1.05 if row["case"].get("accumulation", 1) > 1 else 1.002
    assert low < found.allocated_bytes / row["peak_allocated_bytes"] < high
    assert 0.94 < found.reserved_bytes / row["peak_reserved_bytes"] < 1.06


def check(found: MemoryPrediction, plan: Plan) -> None:
    assert found.basis == "traced"
    assert sum(found.items.values()) == found.allocated_bytes
    assert found.phases[found.peak_phase] == found.items
    assert all(sum(items.values()) <= found.allocated_bytes for items in found.phases.values())
    assert set(found.phases) == {"init", "forward", "backward", "step"}
    assert found.allocated_bytes <= found.reserved_bytes <= found.driver_bytes
    assert sum(found.host_items.values()) == found.host_peak_bytes
    on_gpu = sum(size for name, size in state_bytes(plan).items() if not name.startswith("host_"))
    assert found.allocated_bytes > on_gpu


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_prediction_is_whole(strategy: str, device: str) -> None:
    tiny = GPT2Config(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=76)
    world_size = 1 if strategy == "single" else 2
    precision = "fp32" if device == "cpu" else "bf16"
    offload = "cpu" if strategy == "zero2" else "none"
    plan = plan_of(
        strategy, tiny, world_size=world_size, device=device, precision=precision, offload=offload,
        zero={"pin_memory": device == "cuda"},
    )  # fmt: skip
    check(predict_memory(plan), plan)
    if device == "cpu":  # one memory: nothing is counted beside the process's tensors
        assert predict_memory(plan).driver_bytes == predict_memory(plan).allocated_bytes
        assert predict_memory(plan).host_items == {}


@settings(max_examples=25, deadline=None)
@given(
    strategy=st.sampled_from(ALL[1:]),
    world_size=st.sampled_from([2, 3, 4, 8, 16]),
    micro_batch=st.integers(1, 16),
    every=st.sampled_from([0, 1, 2, 3]),
    accumulation_steps=st.sampled_from([1, 2, 5]),
    precision=st.sampled_from(["bf16", "fp16"]),
)
def test_what_holds_for_every_plan(
    strategy: str, world_size: int, micro_batch: int, every: int, accumulation_steps: int, precision: str
) -> None:
    settings = {
        "world_size": world_size,
        "micro_batch": micro_batch,
        "activation_checkpointing_every": every,
        "accumulation_steps": accumulation_steps,
        "precision": precision,
    }
    plan = plan_of(strategy, SMALL, **settings)
    found = predict_memory(plan)
    check(found, plan)

    def activations(**changed: Any) -> int:
        phases = predict_memory(plan_of(strategy, SMALL, **{**settings, **changed})).phases
        return phases["forward"].get("activations", 0)

    assert activations(micro_batch=micro_batch + 1) > activations()
    assert (
        activations(activation_checkpointing_every=1) <= activations() <= activations(activation_checkpointing_every=0)
    )


def sharded_states(strategy: str, world_size: int, model: GPT2Config) -> int:
    """Parameters, masters and moments of one rank. Gradients and buckets come and go: they are no states."""
    items = state_bytes(plan_of(strategy, model, world_size=world_size))
    return items["parameters"] + items["master"] + items["moments"]


@given(
    world_size=st.integers(2, 64),
    layers=st.integers(1, 6),
    width=st.integers(1, 40).map(lambda n: 8 * n),
    vocab=st.integers(10, 5000),
)
def test_more_sharding_and_more_ranks_never_hold_more(world_size: int, layers: int, width: int, vocab: int) -> None:
    """Up to padding: a partition of ZeRO-1 and 2 is rounded up to 2 elements a group, ZeRO-3 rounds every parameter
    up and keeps the small ones whole on every rank."""
    model = GPT2Config(n_layer=layers, n_head=1, n_embd=width, block_size=16, vocab_size=vocab)
    ddp, zero1, zero2, zero3 = (sharded_states(strategy, world_size, model) for strategy in STRATEGIES)
    flat_padding = 2 * (12 + 2 * world_size) * 2
    assert zero2 == zero1 <= ddp + flat_padding
    sizes = [n for n in (model_elements(model)) if n <= 100_000]
    assert zero3 <= zero2 + 14 * len(model.parameter_shapes()) + 2 * sum(sizes)
    # FSDP2 rounds up to whole rows: one more a parameter at most.
    row_padding = 14 * sum(math.prod(shape[1:]) for shape in model.parameter_shapes().values())
    assert sharded_states("fsdp2", world_size, model) <= ddp / world_size + row_padding
    assert sharded_states("fsdp2", world_size + 1, model) <= sharded_states("fsdp2", world_size, model)
    for strategy in STRATEGIES:
        more = sharded_states(strategy, world_size + 1, model)
        assert more <= sharded_states(strategy, world_size, model) + flat_padding


def model_elements(model: GPT2Config) -> list[int]:
    return [math.prod(shape) for shape in model.parameter_shapes().values()]


def test_fsdp2_keeps_what_it_says() -> None:
    """Beside the shards: two blocks on their way, embedding and head whole; or the whole compute copy."""
    usual = predict_memory(plan_of("fsdp2", world_size=4))
    kept = predict_memory(plan_of("fsdp2", world_size=4, fsdp={"reshard_after_forward": False}))
    p, h = XL.parameter_count(), 2
    root = h * (XL.padded_vocab_size + XL.block_size) * XL.n_embd
    assert kept.phases["forward"]["gathered"] >= h * p
    assert usual.phases["forward"]["gathered"] < root + 0.1 * h * p
    assert usual.items["parameters"] == pytest.approx(h * p / 4, rel=0.001)
    assert usual.allocated_bytes < predict_memory(plan_of("zero2", world_size=4)).allocated_bytes
    whole = plan_of("fsdp2", world_size=4, gradient_dtype="fp32")
    assert state_bytes(whole)["gradients"] == pytest.approx(p, rel=0.001)


def test_the_phases_tell_when_the_peak_is() -> None:
    """One sample with every block recomputed: the fp32 gradients of the step weigh more than the backward pass."""
    frugal = predict_memory(plan_of("zero2", micro_batch=1, accumulation_steps=4, activation_checkpointing_every=1))
    assert frugal.peak_phase == "step"
    assert frugal.items["temporaries"] >= 4 * frugal.items["parameters"] / 2 / 1.01  # fp32 beside bf16
    assert predict_memory(plan_of("zero2")).peak_phase == "backward"


def test_fitting_counts_what_the_allocator_gives_back() -> None:
    plan = plan_of("zero2", world_size=4, micro_batch=1, accumulation_steps=8, precision="fp16")
    found = predict_memory(plan)
    outside = found.driver_bytes - found.reserved_bytes
    assert fits_within(plan, found.driver_bytes)
    assert fits_within(plan, found.driver_bytes - GIB // 2)
    assert not fits_within(plan, found.allocated_bytes + outside - 1)


def test_pinned_blocks_are_powers_of_two() -> None:
    assert [pinned_bytes(size) for size in (0, 1, 2, 3, 4096, 4097)] == [0, 1, 2, 4, 4096, 8192]
    pageable = plan_of("zero2", offload="cpu", zero={"pin_memory": False})
    pinned = plan_of("zero2", offload="cpu", zero={"pin_memory": True})
    part = pageable.parameters
    assert predict_memory(pageable).host_items["host_master"] == pytest.approx(4 * part, rel=0.001)
    # 6.2 GB of fp32 masters take a block of 8 GiB.
    assert predict_memory(pinned).host_items["host_master"] == pytest.approx(8 * GIB, rel=0.01)


def test_nvme_files_are_counted(tmp_path: Path) -> None:
    plan = plan_of("zero3", world_size=4, offload="nvme", offload_parameters="nvme", nvme_path=tmp_path)
    assert predict_memory(plan).nvme_bytes == pytest.approx((16 + 2) * plan.parameters / 4, rel=0.01)
    assert predict_memory(plan_of("zero3", world_size=4)).nvme_bytes == 0


def test_constants_of_other_gpus() -> None:
    assert device_constants("h200") == H200
    assert device_constants("rtx4090") == OTHER_GPU
    plan = plan_of("ddp", SMALL, world_size=2)
    outside = predict_memory(plan, OTHER_GPU)
    assert outside.driver_bytes - outside.reserved_bytes == OTHER_GPU.context_bytes + OTHER_GPU.nccl_bytes
    assert outside.items["workspaces"] == 2 * OTHER_GPU.workspace_bytes


def test_the_coarse_formula_is_of_the_right_size() -> None:
    sharded = (plan_of(strategy, world_size=4) for strategy in ("zero2", "fsdp2"))
    for plan in (plan_of(), *sharded, plan_of(activation_checkpointing_every=1)):
        assert sum(coarse_items(plan, state_bytes(plan)).values()) == pytest.approx(
            predict_memory(plan).allocated_bytes, rel=0.3
        )


class TestAllocator:
    """Rules of `c10/cuda/CUDACachingAllocator.cpp`, by hand."""

    def test_segments(self) -> None:
        allocator = CachingAllocator()
        allocator.alloc(1, 1)
        assert (allocator.allocated_bytes, allocator.reserved_bytes) == (512, 2 * MIB)
        allocator.alloc(2, MIB)  # still in the first segment
        assert allocator.reserved_bytes == 2 * MIB
        allocator.alloc(3, MIB + 1)
        assert allocator.reserved_bytes == 22 * MIB
        allocator.alloc(4, 10 * MIB)  # from what is left of the segment of 20
        assert allocator.reserved_bytes == 22 * MIB
        allocator.alloc(5, 11 * MIB - 1)
        assert allocator.reserved_bytes == (22 + 12) * MIB

    def test_a_small_rest_of_a_large_block_is_not_split(self) -> None:
        allocator = CachingAllocator()
        allocator.alloc(1, 12 * MIB)
        allocator.free(1)
        allocator.alloc(2, 11 * MIB)
        assert allocator.allocated_bytes == 12 * MIB
        allocator.free(2)
        allocator.alloc(3, 11 * MIB - 512)
        assert allocator.allocated_bytes == 11 * MIB - 512

    def test_best_fit_and_merging(self) -> None:
        allocator = CachingAllocator()
        for key, size in ((1, 40), (2, 20), (3, 30)):
            allocator.alloc(key, size * MIB)
        for key in (1, 2, 3):
            allocator.free(key)
        allocator.alloc(4, 25 * MIB)  # the one of 30, of which 5 are left
        allocator.alloc(5, 5 * MIB)
        allocator.free(4)
        allocator.free(5)
        allocator.alloc(6, 30 * MIB)
        assert allocator.reserved_bytes == 90 * MIB

    def test_streams_share_nothing(self) -> None:
        assert simulate_allocator([(1, 20 * MIB, 0), (1, -1, 0), (2, 20 * MIB, 1)]).reserved_bytes == 40 * MIB

    def test_emptying_gives_back_whole_segments_only(self) -> None:
        sequence = [(1, 20 * MIB, 0), (2, 2 * MIB, 0), (3, 2 * MIB, 0), (1, -1, 0), (2, -1, 0), (0, -2, 0)]
        allocator = CachingAllocator()
        for key, size, stream in sequence[:3]:
            allocator.alloc(key, size, stream)
        allocator.free(1)
        allocator.free(2)
        allocator.empty_cache()
        assert allocator.reserved_bytes == 20 * MIB  # the segment of allocation 3
        assert simulate_allocator([*sequence, (4, 20 * MIB, 0)]).reserved_bytes == 40 * MIB

    def test_a_full_gpu_gives_back_before_it_fails(self) -> None:
        allocator = CachingAllocator(limit_bytes=50 * MIB)
        allocator.alloc(1, 40 * MIB)
        allocator.free(1)
        allocator.alloc(2, 50 * MIB)
        assert allocator.reserved_bytes == 50 * MIB
        with pytest.raises(OutOfMemory):
            allocator.alloc(3, 512)

    @given(st.lists(st.tuples(st.integers(1, 60_000_000), st.integers(0, 9), st.integers(0, 1)), max_size=60))
    def test_nothing_is_lost(self, wishes: list[tuple[int, int, int]]) -> None:
        """Random allocations and frees: allocated and free blocks always add up to what is reserved."""
        allocator = CachingAllocator()
        live: list[int] = []
        for key, (size, pick, stream) in enumerate(wishes):
            allocator.alloc(key, size, stream)
            live.append(key)
            if pick < len(live):
                allocator.free(live.pop(pick))
            free = sum(entry[0] for blocks in allocator._free.values() for entry in blocks)
            assert allocator.allocated_bytes + free == allocator.reserved_bytes
        for key in live:
            allocator.free(key)
        assert allocator.allocated_bytes == 0
        allocator.empty_cache()
        assert allocator.reserved_bytes == 0


def test_a_block_that_another_stream_uses_is_not_taken_again_until_that_has_passed() -> None:
    allocator = CachingAllocator(limit_bytes=96 * MIB)
    allocator.alloc(1, 32 * MIB)
    allocator.release(1)
    assert allocator.allocated_bytes == 0
    allocator.alloc(2, 32 * MIB)
    assert allocator.reserved_bytes == 64 * MIB
    allocator.free(1)
    allocator.alloc(3, 32 * MIB)
    assert allocator.reserved_bytes == 64 * MIB
    allocator.release(3)
    allocator.alloc(4, 64 * MIB)  # memory is short: the stream is waited for
    assert allocator.reserved_bytes == 96 * MIB
    allocator.free(3)  # and has passed already
    with pytest.raises(OutOfMemory):
        allocator.alloc(5, 2 * MIB)


def measured_rows() -> list[tuple[str, Plan, dict[str, Any]]]:
    """Every configuration that benchmarks/planner_memory.py measured on H200s."""
    rows = []
    for path in sorted(RESULTS.glob("*-h200-memory-*gpu.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        for name, row in document.get("rows", {}).items():
            if row["status"] == "ok":
                rows.append((name, Plan.model_validate(row["plan"]), row))
    return rows


def test_forty_eight_configurations_on_h200s() -> None:
    """The promise: allocated within 3% on average and 10% at worst, the driver within 5% and 12%, no false "fits"."""
    rows = measured_rows()
    assert len(rows) >= 48
    errors: dict[str, list[float]] = {"allocated_bytes": [], "driver_bytes": []}
    for name, plan, row in rows:
        predicted = predict_memory(plan)
        for what, found in errors.items():
            found.append(abs(getattr(predicted, what) / row[what] - 1))
        # A card of exactly the memory that was measured: with the planner's margin it must not be said to fit.
        assert predicted.driver_bytes > 0.95 * row["driver_bytes"], name
    for what, (mean, worst) in {"allocated_bytes": (0.03, 0.10), "driver_bytes": (0.05, 0.12)}.items():
        assert statistics.mean(errors[what]) < mean
        assert max(errors[what]) < worst
        assert sorted(errors[what])[int(0.95 * len(rows))] < 0.06


@pytest.mark.parametrize(("width", "blocks", "case"), [(2048, 34, "1b"), (4864, 12, "width7b"), (4864, 45, "7b")])
def test_the_reserve_under_zero2_is_that_of_the_first_rank(width: int, blocks: int, case: str) -> None:
    """Measured on 2 H200s, rank by rank: the last one's reserve is 5 to 18% less. Larger than a bucket are the wider
    model's gradients, whose copies wait for the reducing stream: without them it would be planned 7% too low."""
    found = json.loads((RESULTS / "2026-11-22-h200-memory-of-ranks.json").read_text(encoding="utf-8"))
    ranks = found["cases"][f"{case}-table-zero2-cpu"].values()
    model = MambaConfig(d_model=width, n_layers=blocks, vocab_size=50257, pad_vocab_to=8, max_seq_length=4096)
    plan = Plan(
        model=model, parameters=model.parameter_count(), strategy="zero2", offload="cpu", device="cuda", world_size=2,
        micro_batch=1, accumulation_steps=1, precision="bf16", activation_checkpointing_every=1, recomputation="light",
        zero={"pin_memory": True},
    )  # fmt: skip
    said = predict_memory(plan)
    assert said.allocated_bytes == pytest.approx(max(rank["allocated_gib"] for rank in ranks) * GIB, rel=0.01)
    assert said.reserved_bytes == pytest.approx(max(rank["reserved_gib"] for rank in ranks) * GIB, rel=0.04)
    assert not fits_within(plan, said.allocated_bytes)
