"""Traces of real models on fake tensors, and what is composed from them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zerofit.config.models import GPT2Config
from zerofit.models.gpt2 import SPEC, GPT2Spec
from zerofit.planning import memory, store
from zerofit.planning.plan import Plan
from zerofit.planning.template import Alloc, Backward, Free, Gradient, StepEvent, Template, compose
from zerofit.planning.trace import TraceError, direct_events, trace_template

ROOT = Path(__file__).parent.parent
DEPTH = 7
CONFIG = GPT2Config(n_layer=DEPTH, n_head=2, n_embd=64, block_size=32, vocab_size=97)


def templates(config: GPT2Config, **settings: Any) -> tuple[Template, Template]:
    chosen = {"precision": "bf16", "compiled": False, "device": "cuda", **settings}
    return tuple(trace_template(SPEC, config, recompute=recompute, **chosen) for recompute in (None, "full"))  # type: ignore[return-value]


def peaks(events: Iterable[StepEvent]) -> tuple[int, int, int]:
    """(saved at the end of forward, forward peak, backward peak); nothing may be left at the end."""
    live = peak = saved = forward = 0
    sizes: dict[Any, int] = {}
    for event in events:
        if isinstance(event, Alloc):
            sizes[event.key] = event.size_bytes
            live += event.size_bytes
        elif isinstance(event, Free):
            live -= sizes.pop(event.key)
        elif isinstance(event, Backward):
            saved, forward, peak = live, peak, 0
        peak = max(peak, live)
    assert not sizes
    return saved, forward, peak


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"device": "cpu"},
        {"dropout": 0.1},
        {"dropout": 0.1, "device": "cpu", "samples": (2, 5)},  # matrix products of one sample take another way
        {"precision": "fp32"},
        {"compiled": True, "every": (0, 3)},
    ],
    ids=str,
)
def test_composing_equals_tracing_the_whole_model(settings: dict[str, Any]) -> None:
    """Exactly, at sizes and depths that were not traced, with every n-th block recomputed."""
    settings = dict(settings)
    config = CONFIG.model_copy(update={"dropout": settings.pop("dropout", 0.0)})
    batches, strides = settings.pop("samples", (1, 3, 8)), settings.pop("every", (0, 1, 2, 3))
    plain, recomputed = templates(config, **settings)
    chosen = {"precision": "bf16", "compiled": False, "device": "cuda", **settings}
    for every in strides:
        for samples in batches:
            whole = direct_events(SPEC, config, every=every, samples=samples, **chosen)
            assert peaks(compose(plain, recomputed, DEPTH, every, samples)) == whole


@pytest.mark.parametrize("compiled", [False, True])
def test_every_parameter_gets_one_gradient_of_its_size(compiled: bool) -> None:
    plain, recomputed = templates(CONFIG, compiled=compiled)
    sizes: dict[Any, int] = {}
    found: dict[str, int] = {}
    for event in compose(plain, recomputed, DEPTH, 2, 3):
        if isinstance(event, Alloc):
            sizes[event.key] = event.size_bytes
        elif isinstance(event, Gradient):
            assert event.parameter not in found
            found[event.parameter] = sizes[event.key]
    assert found == {name: 2 * torch.Size(shape).numel() for name, shape in CONFIG.parameter_shapes().items()}


def test_what_a_block_saves() -> None:
    """By hand, eager, bf16, per token and channel: two norms' inputs and outputs, q k v, attention, hidden layer twice.

    And per token: statistics of two norms, one fp32 log-sum a head.
    """
    plain, _ = templates(CONFIG)

    def saved(depth: int) -> int:
        return peaks(compose(plain, None, depth, 0, 1))[0]

    tokens, width, heads = CONFIG.block_size, CONFIG.n_embd, CONFIG.n_head
    elements = 2 + 2 + 3 + 1 + 4 + 4
    assert saved(9) - saved(8) == tokens * (2 * elements * width + 2 * 2 * 2 + 4 * heads)


class _Uneven(GPT2Spec):
    """Blocks that are not alike."""

    def build(self, config: GPT2Config, **settings: Any) -> nn.Module:
        model: Any = super().build(config, **settings)
        model.h[1].mlp.c_fc, model.h[1].mlp.c_proj = nn.Linear(64, 8), nn.Linear(8, 64)
        return model  # type: ignore[no-any-return]


class _ReadsValues(GPT2Spec):
    """A model whose Python code depends on the data."""

    def build(self, config: GPT2Config, **settings: Any) -> nn.Module:
        model: Any = super().build(config, **settings)

        def look(module: nn.Module, args: Sequence[Tensor]) -> None:
            if bool((args[0] > 0).any()):
                raise AssertionError

        model.h[0].register_forward_pre_hook(look)
        return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(("spec", "reason"), [(_Uneven(), "blocks differ"), (_ReadsValues(), "DataDependent")])
def test_models_that_cannot_be_traced_say_why(
    spec: GPT2Spec, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("zerofit.models.gpt2.SPEC", spec)
    monkeypatch.setattr(store, "_LOADED", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan = plan_of(CONFIG)
    with pytest.raises(TraceError, match=reason):
        store.template(plan, recompute=False)
    found = memory._predict(plan, memory.H200)
    assert found.basis.startswith("coarse: TraceError")
    assert reason in found.basis
    assert found.allocated_bytes == sum(found.items.values()) > 0


def plan_of(model: GPT2Config, **settings: Any) -> Plan:
    base: dict[str, Any] = {
        "model": model,
        "parameters": model.parameter_count(),
        "strategy": "single",
        "device": "cuda",
        "world_size": 1,
        "micro_batch": 2,
        "accumulation_steps": 1,
        "precision": "bf16",
    }
    return Plan.model_validate(base | settings)


def preset_keys() -> list[Any]:
    spec = importlib.util.spec_from_file_location("trace_presets", ROOT / "scripts" / "trace_presets.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return list(script.shipped_keys())


def test_the_presets_are_shipped() -> None:
    names = {path.name for path in store.SHIPPED.glob("*.json")}
    expected = {f"{preset}-{key.text}.json" for preset, _, key in preset_keys()}
    assert names == expected, "a model or the tracer changed: run `python scripts/trace_presets.py`"


@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize(
    ("preset", "device", "compiled"),
    [
        ("gpt2_xl", "cuda", False),
        ("gpt2_xl", "cuda", True),
        ("shakespeare_char", "cpu", False),
        ("mamba_7b", "cuda", False),
        ("mamba_1_4b", "cuda", True),
    ],
)
def test_shipped_traces_are_what_tracing_gives(preset: str, device: str, compiled: bool, recompute: str | None) -> None:
    plan, key = next(
        (plan, key)
        for name, plan, key in preset_keys()
        if (name, key.device, key.compiled, key.recompute) == (preset, device, compiled, recompute)
    )
    shipped = json.loads((store.SHIPPED / f"{preset}-{key.text}.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(store.trace_now(plan, key).json())) == shipped


def test_a_trace_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan = plan_of(CONFIG)
    monkeypatch.setattr(store, "_LOADED", {})
    first = store.template(plan, recompute=False)
    monkeypatch.setattr(store, "_LOADED", {})
    monkeypatch.setattr(store, "trace_now", lambda *_: pytest.fail("traced again"))
    again = store.template(plan, recompute=False)
    assert json.dumps(again.json()) == json.dumps(first.json())
    (file,) = (tmp_path / "zerofit").glob("trace-*.json")
    file.write_text("{", encoding="utf-8")  # torn by a crash
    monkeypatch.setattr(store, "_LOADED", {})
    monkeypatch.setattr(store, "trace_now", lambda *_: first)
    store.template(plan, recompute=False)
    assert json.loads(file.read_text(encoding="utf-8"))["depth"] == first.depth


def test_a_changed_model_file_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = store.trace_key(plan_of(CONFIG), recompute=False)
    before = key.text
    monkeypatch.setattr(store, "_hash_code", lambda *_: "other")
    assert key.text != before


PREDICT = """
import sys, time
from zerofit.config.models import GPT2Config
from zerofit.planning.memory import predict_memory
from zerofit.planning.plan import Plan
model = GPT2Config(n_layer=48, n_head=25, n_embd=1600, vocab_size=50257, pad_vocab_to=64)
started = time.perf_counter()
for micro_batch in range(1, 21):
    plan = Plan(model=model, parameters=model.parameter_count(), strategy="zero2", device="cuda", world_size=4,
                micro_batch=micro_batch, accumulation_steps=1, precision="fp16", compile=micro_batch % 2 == 0)
    assert predict_memory(plan).basis == "traced"
print(time.perf_counter() - started, "torch" in sys.modules, "deepspeed" in sys.modules)
"""


def test_a_preset_needs_no_torch_and_no_time(tmp_path: Path) -> None:
    import os

    def run() -> list[str]:
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", PREDICT], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    first, again = run(), run()
    assert first[1:] == again[1:] == ["False", "False"]
    assert float(first[0]) < 5
    assert float(again[0]) < 0.5
