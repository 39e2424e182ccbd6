"""The peer of benchmarks/mamba.py computes what zerofit's model computes, and the script runs from start to JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from zerofit.config.models import MambaConfig
from zerofit.models.mamba import SPEC

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    import mamba_deepspeed

    return mamba_deepspeed


@pytest.mark.parametrize("checkpointed", [False, True])
def test_peer_has_the_same_loss_and_gradients(peer: Any, checkpointed: bool) -> None:
    config = MambaConfig(vocab_size=61, max_seq_length=70, d_model=24, n_layers=2, d_state=16)
    ours, theirs = SPEC.build(config), peer._Model(config, checkpointed)
    values = {name: SPEC.init(config, name, 3) for name in config.parameter_shapes()}
    for name, parameter in ours.named_parameters():
        parameter.data.copy_(values[name])
    for name, parameter in theirs.named_parameters():
        parameter.data.copy_(values[_ours(name)])
    text = torch.randint(0, 61, (1, 71), generator=torch.Generator().manual_seed(0))
    loss = ours(tokens=text[:, :-1], targets=text[:, 1:])["loss"] / 70
    loss.backward()
    other = theirs(text[:, :-1], text[:, 1:])
    other.backward()
    assert abs(loss.item() - other.item()) < 1e-5
    for name, parameter in theirs.named_parameters():
        true = ours.get_parameter(_ours(name)).grad
        assert true is not None
        assert float((parameter.grad - true).norm() / true.norm()) < 1e-4, name


def _ours(name: str) -> str:
    """zerofit's name of the peer's parameter."""
    parts = name.split(".")
    if parts[0] == "layers" and parts[2] != "norm":
        parts.insert(2, "mixer")
    if parts[-1] in ("norm", "norm_f"):
        parts.append("weight")
    return ".".join(parts)


@pytest.mark.parametrize(("channels", "length"), [(5, 37), (3, 3), (4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peers_convolution(peer: Any, channels: int, length: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles for the GPU here")
    import channel_first_conv

    channel_first_conv.SPAN = 16  # several spans at small lengths
    random = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(*shape, generator=random).to(dtype).requires_grad_()
        for shape in ((channels, length), (channels, 4), (channels,), (channels, length))
    )
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    true = F.silu(F.conv1d(F.pad(wide[0][None], (3, 0)), wide[1][:, None], wide[2], groups=channels))[0]
    true.backward(grad.detach().double())
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    x, weight, bias, grad = (t.detach() for t in (x, weight, bias, grad))
    assert _distance(channel_first_conv.conv_forward(x, weight, bias), true.detach()) < rounding
    dx = torch.empty_like(x)
    found = [dx, *channel_first_conv.conv_backward(grad, x, weight, bias, dx)]
    for one, leaf in zip(found, wide, strict=True):
        assert leaf.grad is not None
        assert _distance(one, leaf.grad) < rounding


def _distance(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


def test_script_runs_through(tmp_path: Path) -> None:
    """A case of ours, one under the ballast's stub, and the peer's, in process groups of their own."""
    names = ["peer-zero2", "7b-zero2-light", "24gb-fsdp2-low-bit-full"]
    out = tmp_path / "mamba.json"
    command = [sys.executable, str(BENCHMARKS / "mamba.py"), "--small", "--gpus", "2", "--cases", ",".join(names)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    subprocess.run([*command, "--out", str(out)], check=True, timeout=300, env=environment)
    found = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert [found[name]["status"] for name in names] == ["ok"] * 3, found
    for name in names:
        assert found[name]["losses"][-1] < found[name]["losses"][0]
        assert found[name]["tokens_per_second"] > 0
