"""What people run today: mamba_ssm's model and kernels under a plain DeepSpeed script. For benchmarks/mamba.py.

`make_step` takes mamba_ssm's own `MambaLMHeadModel` where the folder has an importable ``mamba_ssm``. Where it has only
the CUDA kernels of the scan (peer.so, see benchmarks/kernels.py), the block around them is written here as mamba_ssm's
``mamba_inner_fn`` works: channels first, convolution and step size computed again in the backward pass, scan output
kept; the convolution is PyTorch's. Rows say which of the two ran.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: Tokens of a chunk of mamba_ssm's kernel.
CHUNK = 2048


#: Of the library's ``struct Pointers``, in its order.
POINTERS = (
    *("u", "delta", "A", "B", "C", "D", "bias", "z", "out", "x", "out_z"),
    *("dout", "du", "ddelta", "dA", "dB", "dC", "dD", "dbias", "dz"),
)


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("batch", "dim", "length", "states")]


class _Pointers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS]


_LIBRARY: Any = None


def _launch(which: str, shape: _Shape, held: dict[str, Tensor]) -> None:
    pointers = _Pointers(**{key: x.data_ptr() for key, x in held.items()})
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    if code := getattr(_LIBRARY, which)(shape, ctypes.byref(pointers), stream):
        raise RuntimeError(f"{which}: CUDA error {code}")


class _Inner(torch.autograd.Function):
    """Convolution, step size and scan, (B, 2 D, L) -> (B, D, L); bf16 with fp32 A, D and bias."""

    @staticmethod
    def forward(
        ctx: Any, xz: Tensor, conv: Tensor, conv_bias: Tensor, x_proj: Tensor, dt: Tensor, *wide: Tensor
    ) -> Tensor:
        u, delta, b, c, z = _prepare(xz, conv, conv_bias, x_proj, dt, wide[0].shape[1])
        held, shape = _scan_inputs(u, delta, b, c, z, wide)
        _launch("peer_forward", shape, held)
        ctx.save_for_backward(xz, conv, conv_bias, x_proj, dt, *wide, held["out"], held["x"])
        return held["out_z"]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        xz, conv, conv_bias, x_proj, dt, a, skip, bias, out, states = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (xz, conv, conv_bias, x_proj, dt)]
            u, delta, b, c, z = _prepare(*leaves, a.shape[1])
        held, shape = _scan_inputs(u.detach(), delta.detach(), b.detach(), c.detach(), z.detach(), (a, skip, bias))
        held |= {"out": out, "x": states, "dout": gradients[0].contiguous()}
        held |= {f"d{k}": torch.empty_like(held[k]) for k in ("u", "delta", "z")}
        held |= {f"d{k}": torch.zeros_like(held[k], dtype=torch.float32) for k in ("A", "B", "C", "D", "bias")}
        _launch("peer_backward", shape, held)
        grads = [held["du"], held["ddelta"], held["dB"].to(b.dtype), held["dC"].to(c.dtype), held["dz"]]
        found = torch.autograd.grad([u, delta, b, c, z], leaves, grads)
        return (*found, held["dA"], held["dD"], held["dbias"])


def _prepare(xz: Tensor, conv: Tensor, conv_bias: Tensor, x_proj: Tensor, dt: Tensor, states: int) -> Any:
    x, z = xz.chunk(2, dim=1)
    length, inner = x.shape[2], x.shape[1]
    u = F.silu(F.conv1d(x, conv, conv_bias, padding=conv.shape[-1] - 1, groups=inner)[..., :length])
    projected = x_proj @ u
    low, b, c = projected.split([dt.shape[1], states, states], dim=1)
    return u, dt @ low, b, c, z


def _scan_inputs(
    u: Tensor, delta: Tensor, b: Tensor, c: Tensor, z: Tensor, wide: Any
) -> tuple[dict[str, Tensor], _Shape]:
    a, skip, bias = wide
    held = {"u": u, "delta": delta, "A": a, "B": b, "C": c, "D": skip, "bias": bias, "z": z}
    held = {name: tensor.contiguous() for name, tensor in held.items()}
    held |= {key: torch.empty_like(held["u"]) for key in ("out", "out_z")}
    batch, inner, length = u.shape
    held["x"] = torch.empty(batch, inner, -(-length // CHUNK), 2 * a.shape[1], device=u.device)
    return held, _Shape(batch, inner, length, a.shape[1])


class _Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        inner, states, rank = config.d_inner, config.d_state, config.step_rank
        self.norm = nn.RMSNorm(config.d_model, eps=1e-5)
        self.in_proj = nn.Linear(config.d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.d_conv, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, states + 1).float().log().expand(inner, -1).clone())
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.d_model, bias=False)
        with torch.no_grad():
            self.dt_proj.bias.fill_(math.log(math.expm1(0.01)))
            self.out_proj.weight /= math.sqrt(config.n_layers)

    def forward(self, x: Tensor) -> Tensor:
        xz = self.in_proj(self.norm(x).to(self.in_proj.weight.dtype)).transpose(1, 2)
        y = _Inner.apply(
            xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
            -self.A_log.float().exp(), self.D.float(), self.dt_proj.bias.float(),
        )  # fmt: skip
        return x + self.out_proj(y.transpose(1, 2))


class _Model(nn.Module):
    def __init__(self, config: Any, checkpointed: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.n_layers))
        self.norm_f = nn.RMSNorm(config.d_model, eps=1e-5)
        self.checkpointed = checkpointed
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens).float()
        for block in self.layers:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        logits = F.linear(self.norm_f(x).to(self.embedding.weight.dtype), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class _Theirs(nn.Module):
    """mamba_ssm's own model with the usual loss."""

    def __init__(self, config: Any, checkpointed: bool) -> None:
        super().__init__()
        from mamba_ssm.models.config_mamba import MambaConfig  # type: ignore[import-not-found]
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # type: ignore[import-not-found]

        self.model = MambaLMHeadModel(
            MambaConfig(d_model=config.d_model, n_layer=config.n_layers, vocab_size=config.vocab_size, rms_norm=True,
                        residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=8)
        )  # fmt: skip
        if checkpointed:
            for layer in self.model.backbone.layers:
                run = layer.forward
                layer.forward = lambda *args, run=run, **kw: checkpoint(run, *args, use_reentrant=False, **kw)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(tokens).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def make_step(config: Any, folder: Path, case: dict[str, Any], gpus: int) -> tuple[Callable[[int], float], int, int]:
    """Step function, tokens of a step, parameters; a process group is open afterwards."""
    global _LIBRARY
    import deepspeed

    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", rank))
    whole = (folder / "mamba_ssm").is_dir()
    if whole:
        sys.path.insert(0, str(folder))
    else:
        _LIBRARY = ctypes.CDLL(str(next(iter([*folder.glob("peer.so"), *folder.glob("*/peer.so")]))))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = (_Theirs if whole else _Model)(config, bool(case.get("checkpointed")))
    torch.set_default_dtype(torch.float32)
    if rank == 0:
        print(
            json.dumps({"peer": "mamba_ssm" if whole else "kernels of mamba_ssm in a block written here"}), flush=True
        )
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": case["stage"], "overlap_comm": True, "contiguous_gradients": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    generator = torch.Generator().manual_seed(rank)
    text = torch.randint(0, config.vocab_size, (1, config.max_seq_length + 1), generator=generator).cuda()

    def step(index: int) -> float:
        loss = engine(text[:, :-1], text[:, 1:])
        engine.backward(loss)
        engine.step()
        return float(loss)

    return step, gpus * config.max_seq_length, sum(p.numel() for p in model.parameters())
