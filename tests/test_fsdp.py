"""What is FSDP2's own: rows that do not divide, ranks without rows, streaming, what stays gathered, buffers.

Parity with the other strategies is in `test_conformance`, checkpoints in `test_matrix`, memory in
`test_memory_engines`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from processes import run
from zerofit.checkpoint.model import initial_reader
from zerofit.config.models import GPT2Config
from zerofit.engines.build import build
from zerofit.engines.fsdp import _meta_model
from zerofit.models.gpt2 import SPEC
from zerofit.planning.memory import state_bytes
from zerofit.planning.plan import Plan
from zerofit.types import Batch, World

#: Over four ranks: 9 rows of the table in 3, 3, 3, 0; 5 positions in 2, 2, 1, 0; widths in equal parts.
ODD = GPT2Config(n_layer=2, n_head=2, n_embd=8, block_size=5, vocab_size=9)
SAMPLES = 8


def make_plan(ranks: int, model: GPT2Config = ODD, **fields: Any) -> Plan:
    base = {
        "model": model,
        "parameters": model.parameter_count(),
        "strategy": "fsdp2" if ranks > 1 else "single",
        "device": "cpu",
        "world_size": ranks,
        "micro_batch": SAMPLES // ranks,
        "accumulation_steps": 1,
        "precision": "fp32",
    }
    return Plan.model_validate(base | fields)


def batch(plan: Plan, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    size = (SAMPLES, plan.model.block_size + 1)
    text = torch.randint(0, ODD.vocab_size or 0, size, generator=generator).split(plan.micro_batch)[rank]
    return Batch({"tokens": text[:, :-1], "targets": text[:, 1:]}, text[:, 1:].numel())


def train(world: World, plan: Plan) -> dict[str, Any]:
    asked: list[tuple[str, int, int]] = []
    initial = initial_reader(SPEC, plan.model, plan.seed)

    def read(name: str, role: str, start: int, stop: int) -> Tensor | None:
        asked.append((name, start, stop))
        return initial(name, role, start, stop)

    engine: Any = build(plan, SPEC, world)
    engine.load(read)
    losses = [engine.train_step([batch(plan, world.rank)], 1e-2, step).read().loss for step in range(4)]
    pieces = [(f.name, f.role, f.start, f.data.clone().numpy()) for f in engine.fragments()]
    loss = engine.eval_step([batch(plan, world.rank)]).read()["loss"].mean
    held = dict(engine.memory())
    # Values that were gathered for the evaluation must not outlive a load.
    engine.load(initial)
    again = engine.eval_step([batch(plan, world.rank)]).read()["loss"].mean
    return {"losses": losses, "pieces": pieces, "asked": asked, "eval": (loss, again), "memory": held}


def states(ranks: list[dict[str, Any]]) -> dict[tuple[str, str], np.ndarray]:
    parts: dict[tuple[str, str], list[tuple[int, np.ndarray]]] = {}
    for rank in ranks:
        for name, role, start, data in rank["pieces"]:
            parts.setdefault((name, role), []).append((start, data))
    whole = {}
    for key, pieces in parts.items():
        pieces.sort(key=lambda piece: piece[0])
        ends = np.cumsum([0, *(len(data) for _, data in pieces)])
        assert [start for start, _ in pieces] == ends[:-1].tolist()
        whole[key] = np.concatenate([data for _, data in pieces])
    return whole


@pytest.mark.parametrize(
    ("precision", "gradient_dtype", "tolerance"), [("fp32", "compute", 1e-5), ("bf16", "fp32", 2e-3)]
)
def test_rows_that_do_not_divide(precision: str, gradient_dtype: str, tolerance: float) -> None:
    settings = {"precision": precision, "gradient_dtype": gradient_dtype}
    plan = make_plan(4, **settings)
    ranks, (reference,) = run(4, train, plan), run(1, train, make_plan(1, **settings))
    assert ranks[0]["losses"] == pytest.approx(reference["losses"], rel=tolerance)
    assert ranks[0]["losses"][-1] < ranks[0]["losses"][0]
    sharded, whole = states(ranks), states([reference])
    assert sharded.keys() == whole.keys()
    for key, values in whole.items():
        # In bf16 AdamW makes whole steps of the noise where the gradient is none (the keys' biases).
        if precision == "fp32" or key[1] != "parameter":
            np.testing.assert_allclose(sharded[key], values, rtol=0, atol=1e-4 if precision == "fp32" else 2e-3)
    assert not any(name in ("wte.weight", "wpe.weight") for name, *_ in ranks[3]["pieces"])
    assert max((rank["memory"] for rank in ranks), key=lambda m: sum(m.values())) == state_bytes(plan)


def test_a_rank_reads_its_own_rows_and_evaluates_what_it_loaded() -> None:
    ranks, (reference,) = run(4, train, make_plan(4)), run(1, train, make_plan(1))
    shares = {name: -(-shape[0] // 4) * int(np.prod(shape[1:])) for name, shape in ODD.parameter_shapes().items()}
    for rank in ranks:
        assert all(stop - start <= shares[name] for name, start, stop in rank["asked"])
        assert rank["eval"] == pytest.approx(reference["eval"], rel=1e-5)
    trained, fresh = ranks[0]["eval"]
    assert trained < fresh


def test_more_ranks_than_rows_are_refused_in_words() -> None:
    tiny = GPT2Config(n_layer=1, n_head=1, n_embd=1, block_size=1, vocab_size=1)
    with pytest.raises(AssertionError, match="holds no row of any parameter"):
        run(5, start, make_plan(5, tiny, micro_batch=1))


def start(world: World, plan: Plan) -> None:
    build(plan, SPEC, world)


class _WithBuffer:
    """A recipe whose model computes a table when it is made."""

    def build(self, config: Any, *, checkpoint_every: int = 0, recomputation: str = "full") -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Module())
        model[1].register_buffer("table", torch.arange(4) * 0.5, persistent=False)
        return model


def test_buffers_keep_what_the_constructor_computed() -> None:
    model = _meta_model(make_plan(2), _WithBuffer(), torch.device("cpu"))  # type: ignore[arg-type]
    assert model[0].weight.is_meta  # type: ignore[index, union-attr]
    assert dict(model.named_buffers())["1.table"].tolist() == [0.0, 0.5, 1.0, 1.5]
