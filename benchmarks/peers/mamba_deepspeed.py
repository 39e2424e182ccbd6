"""What people run today: mamba_ssm's model and kernels under a plain DeepSpeed script. For benchmarks/mamba.py.

`make_step` takes mamba_ssm's own `MambaLMHeadModel` where the folder has an importable ``mamba_ssm``. Where it has only
the CUDA kernels of the scan (peer.so, see benchmarks/kernels.py), the block around them is written here as mamba_ssm's
``mamba_inner_fn`` with ``checkpoint_lvl=1`` works: channels first; convolution, step size and gated output computed
again in the backward pass; the scan's output, its chunk states and x_proj's result kept. Convolution and residual +
norm are Triton kernels, as causal_conv1d's and mamba_ssm's are fused ones. Rows say which of the two ran.

On a CPU (``--small``) PyTorch's scan stands in for the library, so that the same script can be tried and tested.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zerofit.kernels import causal_conv, selective_scan_torch
from zerofit.kernels.rms_norm import add_rms_norm
from zerofit.kernels.triton_use import agrees, use_triton

#: Tokens of a chunk of mamba_ssm's kernel.
CHUNK = 2048
NORM_EPS = 1e-5
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


def _launch(which: str, held: dict[str, Tensor]) -> None:
    """Run the library's kernel on contiguous tensors of one sample; PyTorch's scan on a CPU."""
    if not held["u"].is_cuda:
        _cpu_scan(which, held)
        return
    assert all(tensor.is_contiguous() for tensor in held.values())
    (dim, length), states = held["u"].shape, held["A"].shape[1]
    pointers = _Pointers(**{key: tensor.data_ptr() for key, tensor in held.items()})
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    if code := getattr(_LIBRARY, which)(_Shape(1, dim, length, states), ctypes.byref(pointers), stream):
        raise RuntimeError(f"{which}: CUDA error {code}")


def _cpu_scan(which: str, held: dict[str, Tensor]) -> None:
    u, delta, b, c, z = (held[key].t()[None] for key in ("u", "delta", "B", "C", "z"))
    given = (u, delta, held["A"], b, c, held["D"], z, held["bias"])
    out, states, _ = selective_scan_torch.forward(*given)
    if which == "peer_forward":
        held["out_z"].copy_(out[0].t())
        held["out"].copy_(selective_scan_torch.forward(*given[:6], None, held["bias"])[0][0].t())
        return
    found = selective_scan_torch.backward(held["dout"].t()[None], *given, states)
    for key, gradient in zip(("u", "delta", "A", "B", "C", "D", "bias", "z"), found, strict=True):
        assert gradient is not None
        held[f"d{key}"].copy_(gradient[0].t() if gradient.dim() == 3 else gradient)


def _fused(x: Tensor) -> bool:
    """Whether the Triton convolution is used: on a GPU, once it was compared with PyTorch there."""
    if not use_triton(x):
        return False
    if x.device not in _AGREED:
        random = torch.Generator(x.device).manual_seed(0)
        a, w, b, g = (
            torch.randn(*shape, generator=random, device=x.device).to(x.dtype)
            for shape in ((40, 1500), (40, 4), (40,), (40, 1500))
        )
        _AGREED[x.device] = agrees(
            "the peer's convolution",
            lambda: [_conv_triton(a, w, b), *_conv_triton_backward(g, a, w, b, torch.empty_like(a))],
            lambda: [_conv_torch(a, w, b), *_conv_torch_backward(g, a, w, b, torch.empty_like(a))],
            "the peer's rows are several times too slow in the convolution",
        )
    return _AGREED[x.device]


_AGREED: dict[torch.device, bool] = {}


def _conv_triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from channel_first_conv import conv_forward  # type: ignore[import-not-found]

    out: Tensor = conv_forward(x, weight, bias)
    return out


def _conv_triton_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, dx: Tensor) -> tuple[Tensor, ...]:
    from channel_first_conv import conv_backward

    return dx, *conv_backward(grad, x, weight, bias, dx)


def _conv_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv.torch_forward(x.t()[None], weight, bias)[0].t().contiguous()


def _conv_torch_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, dx: Tensor) -> tuple[Tensor, ...]:
    found, *others = causal_conv.torch_backward(grad.t()[None], x.t()[None], weight, bias)
    dx.copy_(found[0].t())
    return dx, *others


def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (_conv_triton if _fused(x) else _conv_torch)(x, weight, bias)


class _Inner(torch.autograd.Function):
    """From in_proj's result to the block's output, (2 D, L) -> (L, C); bf16 with fp32 A, D and bias of the step."""

    @staticmethod
    def forward(
        ctx: Any, xz: Tensor, conv: Tensor, conv_bias: Tensor, x_proj: Tensor, dt: Tensor, out_proj: Tensor,
        *wide: Tensor,
    ) -> Tensor:  # fmt: skip
        x, _ = xz.chunk(2)
        u = _conv(x, conv, conv_bias)
        projected = x_proj @ u
        held = _scan_inputs(xz, u, projected, dt, wide)
        held |= {key: torch.empty_like(u) for key in ("out", "out_z")}
        chunks = -(-u.shape[1] // CHUNK)
        held["x"] = torch.empty(u.shape[0], chunks, 2 * wide[0].shape[1], device=u.device, dtype=torch.float32)
        _launch("peer_forward", held)
        ctx.save_for_backward(
            xz, conv, conv_bias, x_proj, dt, out_proj, projected, held["out"], held["x"], *wide
        )  # fmt: skip
        return held["out_z"].t() @ out_proj.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        xz, conv, conv_bias, x_proj, dt, out_proj, projected, out, states, *wide = ctx.saved_tensors
        x, z = xz.chunk(2)
        u = _conv(x, conv, conv_bias)
        held = _scan_inputs(xz, u, projected, dt, wide)
        of_xz = torch.empty_like(xz)
        of_x, of_z = of_xz.chunk(2)
        held |= {"out": out, "x": states, "dout": out_proj.t() @ gradient.t(), "dz": of_z}
        held |= {key: torch.empty_like(u) for key in ("du", "ddelta")}
        held |= {f"d{k}": torch.zeros_like(held[k], dtype=torch.float32) for k in ("A", "B", "C", "D", "bias")}
        _launch("peer_backward", held)
        of_out_proj = gradient.t() @ F.silu(z).mul_(out).t()
        rank = dt.shape[1]
        of_projected = torch.cat([dt.t() @ held["ddelta"], held["dB"].to(u.dtype), held["dC"].to(u.dtype)])
        of_dt = held["ddelta"] @ projected[:rank].t()
        of_x_proj = of_projected @ u.t()
        of_u = held["du"].addmm_(x_proj.t(), of_projected)
        backward = _conv_triton_backward if _fused(x) else _conv_torch_backward
        _, of_conv, of_bias = backward(of_u, x, conv, conv_bias, of_x)
        return (
            of_xz, of_conv.to(conv.dtype), of_bias.to(conv.dtype), of_x_proj, of_dt, of_out_proj,
            held["dA"], held["dD"], held["dbias"],
        )  # fmt: skip


def _scan_inputs(xz: Tensor, u: Tensor, projected: Tensor, dt: Tensor, wide: Any) -> dict[str, Tensor]:
    a, skip, bias = wide
    low, b, c = projected.split([dt.shape[1], a.shape[1], a.shape[1]])
    return {"u": u, "delta": dt @ low, "A": a, "B": b, "C": c, "D": skip, "bias": bias, "z": xz.chunk(2)[1]}


class _Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        inner, states, rank = config.d_inner, config.d_state, config.step_rank
        self.norm = nn.Parameter(torch.ones(config.d_model))
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

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(L, C) in bf16 and the residual stream (L, C) in fp32 -> both, after the block."""
        normed, residual = add_rms_norm(hidden, residual, self.norm, NORM_EPS)
        out = _Inner.apply(
            self.in_proj.weight @ normed.t(), self.conv1d.weight.squeeze(1), self.conv1d.bias, self.x_proj.weight,
            self.dt_proj.weight, self.out_proj.weight,
            -self.A_log.float().exp(), self.D.float(), self.dt_proj.bias.float(),
        )  # fmt: skip
        return out, residual


class _Model(nn.Module):
    def __init__(self, config: Any, checkpointed: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.n_layers))
        self.norm_f = nn.Parameter(torch.ones(config.d_model))
        self.checkpointed = checkpointed
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets: (1, L)."""
        hidden = self.embedding(tokens[0])
        residual = torch.zeros_like(hidden, dtype=torch.float32)
        for block in self.layers:
            if self.checkpointed:
                hidden, residual = checkpoint(block, hidden, residual, use_reentrant=False)
            else:
                hidden, residual = block(hidden, residual)
        normed, _ = add_rms_norm(hidden, residual, self.norm_f, NORM_EPS)
        return F.cross_entropy(F.linear(normed, self.embedding.weight).float(), targets[0])


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
    cuda, rank = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(rank)
        # Lists such as "9.0;10.0a" end DeepSpeed's op builder with a ValueError.
        os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    import deepspeed

    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    torch.distributed.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    whole = cuda and (folder / "mamba_ssm").is_dir()
    if whole:
        sys.path.insert(0, str(folder))
    elif cuda:
        _LIBRARY = ctypes.CDLL(str(next(iter([*folder.glob("peer.so"), *folder.glob("*/peer.so")]))))
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = (_Theirs if whole else _Model)(config, bool(case.get("checkpointed")))
    torch.set_default_dtype(torch.float32)
    optimizer, settings = _optimizer(deepspeed, model, cuda)
    settings |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": case["stage"], "overlap_comm": True, "contiguous_gradients": True},
        "steps_per_print": 10**9,
    }
    if not cuda:  # the default buckets are a gigabyte each
        settings["zero_optimization"]["reduce_bucket_size"] = 1_000_000
    parameters = sum(p.numel() for p in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), optimizer=optimizer, config=settings
    )
    if rank == 0:
        kernels = "mamba_ssm" if whole else "kernels of mamba_ssm in a block written here" if cuda else "PyTorch"
        print(json.dumps({"peer": kernels, "optimizer": type(engine.optimizer.optimizer).__name__}), flush=True)
    generator = torch.Generator().manual_seed(rank)
    text = torch.randint(0, config.vocab_size, (1, config.max_seq_length + 1), generator=generator).to(device)

    def step(index: int) -> float:
        loss = engine(text[:, :-1], text[:, 1:])
        engine.backward(loss)
        engine.step()
        return float(loss)

    return step, gpus * config.max_seq_length, parameters


def _optimizer(deepspeed: Any, model: nn.Module, cuda: bool) -> tuple[Any, dict[str, Any]]:
    """DeepSpeed's FusedAdam through the settings, as people use it; where it does not compile, torch's fused AdamW."""
    arguments = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if cuda:
        try:
            deepspeed.ops.op_builder.FusedAdamBuilder().load(verbose=False)
            return None, {"optimizer": {"type": "AdamW", "params": {**arguments, "betas": [0.9, 0.95]}}}
        except Exception as reason:
            warnings.warn(f"FusedAdam does not compile here ({reason}); torch's fused AdamW instead", stacklevel=2)
    else:
        vars(deepspeed.ops)["__compatible_ops__"] = {}  # else it compiles a collective of its own first
    return torch.optim.AdamW(model.parameters(), fused=True, **arguments), {"zero_allow_untested_optimizer": True}
