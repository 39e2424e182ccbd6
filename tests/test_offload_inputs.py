"""Inputs of checkpointed blocks in host memory: the same gradients, and the memory that the planner says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from test_trace import peaks
from zerofit.config.load import load_config
from zerofit.config.models import GPT2Config, MambaConfig, ResNetConfig
from zerofit.engines.common import keep_inputs_on_host
from zerofit.errors import ConfigError
from zerofit.models import model_spec
from zerofit.models.base import named_unique_parameters
from zerofit.planning.memory import H200, predict_memory
from zerofit.planning.plan import Plan
from zerofit.planning.template import compose
from zerofit.planning.trace import direct_events, trace_template

MODELS: dict[str, Any] = {
    "gpt2": GPT2Config(n_layer=6, n_head=2, n_embd=32, block_size=16, vocab_size=11),
    "mamba": MambaConfig(n_layers=6, d_model=32, d_state=8, vocab_size=11, max_seq_length=16),
}


def built(model: Any, way: str, offloaded: bool) -> Any:
    spec = model_spec(model.kind)
    net = spec.build(model, checkpoint_every=1, recomputation=way)  # type: ignore[arg-type]
    if offloaded:
        keep_inputs_on_host(spec, net)
    with torch.no_grad():
        for name, parameter in named_unique_parameters(net).items():
            parameter.copy_(spec.init(model, name, 1))
    return net


@pytest.mark.parametrize(("kind", "way"), [("gpt2", "full"), ("mamba", "full"), ("mamba", "selective")])
def test_gradients_are_the_same(kind: str, way: str) -> None:
    model = MODELS[kind]
    tokens = torch.randint(0, 11, (2, 16), generator=torch.Generator().manual_seed(0))
    plain, other = built(model, way, offloaded=False), built(model, way, offloaded=True)
    offload = vars(model_spec(kind).blocks(other)[0])["input_offload"]
    for _ in range(2):
        for net in (plain, other):
            loss = net(tokens, tokens)["loss"]
            if net is other:
                assert len(offload._kept) == 6
            loss.backward()
        assert not offload._kept
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_a_classifiers_inputs_go_to_the_host_too() -> None:
    model = ResNetConfig(layers=18, base_width=4, num_classes=3, input_size=32)
    random = torch.Generator().manual_seed(0)
    images, targets = torch.randn(4, 3, 32, 32, generator=random), torch.tensor([0, 1, 2, 0])
    plain, other = built(model, "full", offloaded=False), built(model, "full", offloaded=True)
    blocks = model_spec("resnet").blocks(other)
    for net in (plain, other):
        loss = net(images, targets)["loss"]
        if net is other:
            assert len(vars(blocks[0])["input_offload"]._kept) == len(blocks) == 8
        loss.backward()
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    for one, two in zip(plain.buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("layers", "pixels"), [(18, 45), (50, 64)])
def test_a_classifiers_shape_tells_its_blocks_inputs(layers: int, pixels: int) -> None:
    model = ResNetConfig(layers=layers, base_width=4, num_classes=3, input_size=pixels)  # type: ignore[arg-type]
    net, seen = built(model, "full", offloaded=False), list[int]()
    for block in model_spec("resnet").blocks(net):
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    net.eval()
    with torch.no_grad():
        net(torch.zeros(1, 3, pixels, pixels))
    assert seen == model.block_inputs_per_sample()


def test_a_classifiers_plan_holds_its_inputs_on_the_host() -> None:
    model = ResNetConfig(layers=18, num_classes=3, input_size=224)
    plan = Plan(
        model=model, parameters=model.parameter_count(), strategy="single", device="cuda", world_size=1,
        micro_batch=64, accumulation_steps=1, precision="fp16", activation_checkpointing_every=1,
    )  # fmt: skip
    offloaded = plan.model_copy(update={"activation_offload": "cpu"})
    here, there = (predict_memory(p, H200) for p in (plan, offloaded))
    # The peak is in the first block's backward pass, where no other block's input is needed any more.
    assert sum(there.phases["forward"].values()) < sum(here.phases["forward"].values())
    assert "activations" not in here.host_items
    # Half precision, 64 pictures, each page-locked block rounded up to a power of two.
    kept = [1 << (2 * 64 * n - 1).bit_length() for n in model.block_inputs_per_sample()]
    assert there.host_items["activations"] == sum(kept)


def test_timms_blocks_keep_theirs(tmp_path: Path) -> None:
    model, data = {"kind": "timm", "name": "resnet18"}, {"kind": "images", "path": "none"}
    file = tmp_path / "timm.json"
    file.write_text(json.dumps({"model": model, "data": data, "activation_offload": "cpu", "max_steps": 1}))
    with pytest.raises(ConfigError, match="which one is the input is not known"):
        load_config(file, None)


@pytest.mark.parametrize("kind", MODELS)
def test_traces_compose_and_hold_no_inputs(kind: str) -> None:
    model, spec = MODELS[kind], model_spec(kind)
    chosen: dict[str, Any] = {"precision": "bf16", "compiled": False, "device": "cuda"}
    plain = trace_template(spec, model, recompute=None, **chosen)
    saved = {}
    for offloaded in (False, True):
        other = trace_template(spec, model, recompute="full", offloaded=offloaded, **chosen)
        whole = direct_events(spec, model, every=1, samples=3, offloaded=offloaded, **chosen)
        assert peaks(compose(plain, other, 6, 1, 3)) == whole
        saved[offloaded] = whole[0]
    size = 3 * 16 * 32 * (4 if kind == "mamba" else 2)
    assert saved[False] - saved[True] == 6 * size


def test_it_wants_blocks_that_are_recomputed() -> None:
    with pytest.raises(ConfigError, match="activation_offload cpu with activation_checkpointing none"):
        load_config(None, "gpt2", [("activation_offload", "cpu"), ("activation_checkpointing", "none")])
