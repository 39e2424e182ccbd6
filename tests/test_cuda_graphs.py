"""What a person asks of CUDA graphs, what the plan makes of it, and how a window's micro-steps use the recordings.

That replaying is bit for bit the eager run is shown on GPUs: tests/test_gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zerofit.config.schema import Config
from zerofit.engines import cuda_graphs
from zerofit.errors import TrainingFailed
from zerofit.planning.choose import choose
from zerofit.planning.described import Description, described_hardware
from zerofit.planning.hardware import probe
from zerofit.planning.memory import predict_memory
from zerofit.planning.plan import Plan

SMALL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 96}


def _plan(memory: str = "24GiB", gpus: int = 1, **wishes: Any) -> Plan:
    config = Config.model_validate(
        {"data": {"path": "x"}, "model": SMALL, "global_batch": 64, "compile": True, **wishes}
    )
    return choose(
        config, described_hardware(Description(gpus=str(gpus), gpu="h200", gpu_memory=memory), probe(Path(), None))
    ).plan


def test_auto_records_what_waits_for_the_host_and_nothing_else() -> None:
    assert _plan().cuda_graphs
    assert not _plan(cuda_graphs=False).cuda_graphs
    assert not _plan(gpus=2).cuda_graphs
    large = {"n_layer": 48, "n_head": 25, "n_embd": 1600, "block_size": 1024, "vocab_size": 50257}
    assert not _plan(memory="141GiB", model=large, global_batch=32, micro_batch=8).cuda_graphs
    assert not _plan(memory="2600MiB", micro_batch=64, activation_checkpointing="none").cuda_graphs


def test_a_recorded_plan_is_faster_and_needs_the_recording_s_memory() -> None:
    recorded = _plan()
    eager = recorded.model_copy(update={"cuda_graphs": False})
    of_recorded, of_eager = predict_memory(recorded), predict_memory(eager)
    assert of_recorded.reserved_bytes > 1.2 * of_eager.reserved_bytes
    assert of_recorded.allocated_bytes == pytest.approx(of_eager.allocated_bytes, rel=0.1)
    assert recorded.prediction is not None
    assert recorded.state_bytes["gradients"] == 2 * recorded.parameters


@pytest.mark.parametrize(
    "wish", [{"strategy": "zero2"}, {"num_gpus": 2}, {"activation_checkpointing": "full"}, {"device": "cpu"}]
)
def test_what_cannot_be_recorded_is_refused_in_words(wish: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"cuda_graphs true with .*cuda_graphs auto"):
        Config.model_validate({"data": {"path": "x"}, "model": SMALL, "cuda_graphs": True, **wish})


def test_true_is_said_to_be_off_where_the_plan_cannot_record() -> None:
    config = Config.model_validate({"data": {"path": "x"}, "model": SMALL, "global_batch": 64, "cuda_graphs": True})
    choice = choose(
        config, described_hardware(Description(gpus="2", gpu="h200", gpu_memory="24GiB"), probe(Path(), None))
    )
    assert not choice.plan.cuda_graphs
    assert any("cuda_graphs is off" in warning for warning in choice.warnings)


class _Passes:
    """Forward and backward of a product, and a stand-in for recording it: replaying runs it again."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.ones(3))
        self.eager = self.recorded = 0
        self.recording = False

    def __call__(self, inputs: dict[str, Tensor], factor: Tensor) -> Tensor:
        if self.recording:
            self.recorded += 1
        else:
            self.eager += 1
        loss = (inputs["x"] @ self.weight).sum()
        (loss * factor).backward()
        return loss.detach()

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A recording on the CPU: what it did to the gradient is done again by a replay."""
        passes = self

        class Graph:
            begins: Tensor | None

            def pool(self) -> object:
                return None

            def replay(self) -> None:
                gradient = passes.weight.grad if self.added else None
                passes.weight.grad = None
                self.out.copy_(passes._again(self.inputs, self.factor))
                assert passes.weight.grad is not None
                self.gradient.copy_(passes.weight.grad if gradient is None else self.gradient + passes.weight.grad)
                passes.weight.grad = self.gradient

        @contextmanager
        def recording(graph: Any, **_: Any) -> Iterator[None]:
            graph.added, held = passes.weight.grad is not None, passes.weight.grad
            if held is not None:
                held = held.clone()
            passes.recording = True
            yield
            passes.recording = False
            if held is not None:
                assert passes.weight.grad is not None
                passes.weight.grad.copy_(held)  # recording runs nothing
            graph.gradient = passes.weight.grad

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", recording)
        original = cuda_graphs._Recording.__init__

        def remember(self: Any, *args: Any) -> None:
            original(self, *args)
            self.graph.inputs, self.graph.factor, self.graph.out = self.inputs, self.factor, self.loss

        monkeypatch.setattr(cuda_graphs._Recording, "__init__", remember)

    def _again(self, inputs: dict[str, Tensor], factor: Tensor) -> Tensor:
        self.recorded += 1
        loss = (inputs["x"] @ self.weight).sum()
        (loss * factor).backward()
        return loss.detach()


def test_windows_of_any_length_and_odd_shapes_have_the_eager_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, reference = _Passes(), _Passes()
    passes.stand_in(monkeypatch)
    recorded = cuda_graphs.RecordedPasses(passes, {"weight": passes.weight})
    generator = torch.Generator().manual_seed(0)
    sizes = [[4], [4, 4], [4], [4, 4, 4], [4], [4, 2, 4], [2, 4], [4, 4]]
    for window in sizes:
        for index, size in enumerate(window):
            x, factor = {"x": torch.randn(size, 3, generator=generator)}, torch.tensor(0.5 + index)
            assert torch.equal(recorded(x, factor, index), reference(x, factor))
        assert passes.weight.grad is not None
        torch.testing.assert_close(passes.weight.grad, reference.weight.grad)
        passes.weight.grad = reference.weight.grad = None
    assert passes.eager == 1 + 2 + 1 + 1 + 2  # three steps, the odd micro-batch, the window that begins with one
    assert recorded.gradient_bytes() == 12


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (None, "waits for the device"),
        (RuntimeError("a synchronisation"), r"\(a synchronisation\).*waits for the device"),
        (torch.OutOfMemoryError("tried to allocate 2 GiB"), r"tried to allocate 2 GiB.*the GPU is full"),
    ],
    ids=str,
)
def test_what_cannot_be_recorded_ends_in_words(
    monkeypatch: pytest.MonkeyPatch, first: RuntimeError | None, said: str
) -> None:
    """Those of the error that came first: the end of a broken recording raises another."""

    @contextmanager
    def recording(graph: Any, **_: Any) -> Iterator[None]:
        try:
            yield
            if first is not None:
                raise first
        finally:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    passes = _Passes()
    recorded = cuda_graphs.RecordedPasses(passes, {"weight": passes.weight})
    for step in range(cuda_graphs.EAGER_STEPS):
        recorded({"x": torch.ones(1, 3)}, torch.ones(()), 0)
        passes.weight.grad = None
        assert passes.eager == step + 1
    with pytest.raises(TrainingFailed, match=rf"{said}.*cuda_graphs false"):
        recorded({"x": torch.ones(1, 3)}, torch.ones(()), 0)
