"""Writes checkpoints as other programs do, and tells what must come back. Shared by the tests of reading and export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from zerofit.config.models import GPT2Config
from zerofit.models.gpt2 import SPEC
from zerofit.types import World

#: 1,505 parameters, which neither two nor three ranks divide: partitions need padding.
MODEL = GPT2Config(n_layer=2, n_head=7, n_embd=7, block_size=6, vocab_size=13)
MOMENTS = ("exp_avg", "exp_avg_sq")
#: (name, role) -> values, flattened.
Expected = dict[tuple[str, str], np.ndarray]


def build_model(config: GPT2Config = MODEL) -> nn.Module:
    model = SPEC.build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases and norms too are random: a mistake among zeros and ones would not show.
            parameter.copy_(SPEC.init(config, name, 3) + 0.01 * torch.randn(parameter.shape, generator=_seed(name)))
    return model


def _seed(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, name)))


def batch(rank: int, step: int, config: GPT2Config = MODEL) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    assert config.vocab_size is not None
    tokens = torch.randint(config.vocab_size, (2, config.block_size + 1), generator=generator)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def groups_of(model: nn.Module, how: str) -> list[dict[str, Any]]:
    """``one`` group, or nanoGPT's ``decay``: matrices first, then vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if how == "one":
        return [{"params": trained}]
    matrices, vectors = ([p for p in trained if (p.dim() >= 2) is wanted] for wanted in (True, False))
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def save_with_deepspeed(world: World, root: Path, options: Mapping[str, Any]) -> Expected:
    """Train two steps with DeepSpeed's own engine and let it save. Returns the engine's fp32 states.

    Options: stage, precision, groups (`groups_of`), frozen (name prefix), client_state, tag, zero and extra
    (DeepSpeed's JSON), parameters_only (return what the modules hold, which in fp32 are the masters).
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    stage, precision = options["stage"], options.get("precision", "fp32")
    model = build_model()
    for name, parameter in model.named_parameters():
        if options.get("frozen") and name.startswith(options["frozen"]):
            parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(groups_of(model, options.get("groups", "one")), lr=1e-2)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20, **options.get("zero", {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **({precision: {"enabled": True}} if precision != "fp32" else {}),
        **options.get("extra", {}),
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(2):
        engine.backward(engine(**batch(world.rank, step))["loss"])
        engine.step()
    if options.get("parameters_only"):
        expected = {(name, "parameter"): _numbers(p) for name, p in engine.module.named_parameters()}
    else:
        expected = _unsharded_states(engine, optimizer) if stage == 0 else _full_states(engine)
    engine.save_checkpoint(str(root), tag=options.get("tag"), client_state=dict(options.get("client_state", {})))
    return expected


def _full_states(engine: Any) -> Expected:
    """Collective: masters and moments as DeepSpeed itself puts them together."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    expected: Expected = {}
    for name, parameter in engine.module.named_parameters():
        found: dict[str, Any] = {}
        if parameter.requires_grad:
            found = {role: safe_get_full_optimizer_state(parameter, role) for role in MOMENTS}
            found["parameter"] = safe_get_full_fp32_param(parameter)
        elif hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                found["parameter"] = parameter.detach().clone()
        else:
            found["parameter"] = parameter
        expected |= {(name, role): _numbers(values) for role, values in found.items()}
    return expected


def _unsharded_states(engine: Any, optimizer: torch.optim.Optimizer) -> Expected:
    """Stage 0: DeepSpeed's half precision optimizer puts fp32 masters in the place of the parameters."""
    masters = getattr(engine.optimizer, "fp32_groups", [[p for g in optimizer.param_groups for p in g["params"]]])
    expected: Expected = {}
    for (name, _), master in zip(engine.module.named_parameters(), masters[0], strict=True):
        expected[name, "parameter"] = _numbers(master)
        expected |= {(name, role): _numbers(optimizer.state[master][role]) for role in MOMENTS}
    return expected


def _numbers(values: torch.Tensor) -> np.ndarray:
    return values.detach().float().flatten().clone().numpy()


def save_nanogpt(path: Path, config: GPT2Config = MODEL, wrap: str = "") -> Expected:
    """Two steps of torch's AdamW, and a file with the keys and the names of nanoGPT's ``train.py``."""
    model = build_model(config)
    optimizer = torch.optim.AdamW(groups_of(model, "decay"), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        model(**batch(0, step, config))["loss"].backward()
        optimizer.step()
    weights = {wrap + nanogpt_name(name): tensor for name, tensor in model.state_dict().items()}
    for layer in range(config.n_layer):  # the causal masks of its versions for older PyTorch
        weights[f"{wrap}transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 6, 6).tril()
    args = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")}
    checkpoint = {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "model_args": {**args, "vocab_size": config.padded_vocab_size, "dropout": 0.0},
        "iter_num": 2,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "learning_rate": 1e-2},
    }
    torch.save(checkpoint, path)
    expected = {(name, "parameter"): _numbers(p) for name, p in model.named_parameters()}
    for role in MOMENTS:
        expected |= {(name, role): _numbers(optimizer.state[p][role]) for name, p in model.named_parameters()}
    return expected


def nanogpt_name(name: str) -> str:
    """nanoGPT's and Hugging Face's name of a parameter."""
    return "lm_head.weight" if name == "head.weight" else f"transformer.{name}"


def huggingface_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """State dict with the names and layouts of transformers' GPT2LMHeadModel, its causal masks included."""
    weights = {}
    for name, tensor in model.state_dict().items():
        is_matrix = name.startswith("h.") and name.endswith(".weight") and ".ln_" not in name
        weights[nanogpt_name(name)] = tensor.t().contiguous() if is_matrix else tensor.clone()
    for layer in range(MODEL.n_layer):
        weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 6, 6).tril()
        weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return weights


HUGGINGFACE_CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": MODEL.vocab_size,
    "n_positions": MODEL.block_size,
    "n_embd": MODEL.n_embd,
    "n_layer": MODEL.n_layer,
    "n_head": MODEL.n_head,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.0,
}
