"""Trace the presets' models anew and write them where the package ships them. Run after a change of a model or of the
tracer; a test says when.

    python scripts/trace_presets.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files

import yaml
from pydantic import TypeAdapter

from zerofit.config.images import ImageDataConfig
from zerofit.config.load import load_config
from zerofit.config.models import ModelConfig, ResNetConfig
from zerofit.planning import store
from zerofit.planning.candidates import checkpointings
from zerofit.planning.plan import Plan
from zerofit.planning.store import TraceKey, trace_key

IMAGE_PRESETS = ("animals90",)
PRESETS = (
    *("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl", "shakespeare_char"),
    *("mamba_130m", "mamba_370m", "mamba_790m", "mamba_1_4b", "mamba_2_8b"),
    *("mamba_1b", "mamba_3b", "mamba_7b", "mamba_shakespeare_char"),
)
#: Vocabulary of the presets that take their own from the text.
SHAKESPEARE_CHARACTERS = 76


def main() -> None:
    store.SHIPPED.mkdir(exist_ok=True)
    for old in store.SHIPPED.glob("*.json"):
        old.unlink()
    for preset, plan, key in shipped_keys():
        path = store.SHIPPED / f"{preset}-{key.text}.json"
        path.write_text(json.dumps(store.trace_now(plan, key).json(), separators=(",", ":")) + "\n", encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size:,} bytes")


def image_keys() -> Iterator[tuple[str, Plan, TraceKey]]:
    """Of the image presets on GPUs in half precision: eager, with none and every n-th block recomputed; compiled, and
    compiled under FSDP2."""
    for preset in IMAGE_PRESETS:
        config = load_config(None, preset).config
        assert isinstance(config.model, ResNetConfig)
        assert isinstance(config.data, ImageDataConfig)
        model = config.model.model_copy(update={"input_size": config.data.image_size})
        plan = Plan(
            model=model,
            parameters=model.parameter_count(),
            strategy="single",
            device="cuda",
            world_size=1,
            micro_batch=1,
            accumulation_steps=1,
            precision="bf16",
        )
        for every in sorted({way.every for way in checkpointings(config)}):
            changed = plan.model_copy(update={"activation_checkpointing_every": every})
            yield preset, changed, trace_key(changed, recompute=every > 0)
        compiled = plan.model_copy(update={"compile": True})
        yield preset, compiled, trace_key(compiled, recompute=False)
        cut = compiled.model_copy(update={"strategy": "fsdp2", "world_size": 2})
        yield preset, cut, trace_key(cut, recompute=False)


def shipped_keys() -> Iterator[tuple[str, Plan, TraceKey]]:
    """(preset, plan, key) of every trace that is shipped: the presets' models, on GPUs in half precision, eager and
    compiled; those that are meant for CPUs, there in fp32. Each with every way of recomputation that it has; compiled
    blocks are recomputed whole."""
    yield from image_keys()
    for preset in PRESETS:
        text = files("zerofit.config.presets").joinpath(f"{preset}.yaml").read_text(encoding="utf-8")
        shape = {"vocab_size": SHAKESPEARE_CHARACTERS, **yaml.safe_load(text)["model"]}
        model: ModelConfig = TypeAdapter[ModelConfig](ModelConfig).validate_python(shape)
        variants = [("cuda", "bf16", False), ("cuda", "bf16", True)]
        variants += [("cpu", "fp32", False)] if "vocab_size" not in yaml.safe_load(text)["model"] else []
        for device, precision, compiled in variants:
            plan = Plan.model_validate(
                {
                    "model": model,
                    "parameters": model.parameter_count(),
                    "strategy": "single",
                    "device": device,
                    "world_size": 1,
                    "micro_batch": 1,
                    "accumulation_steps": 1,
                    "precision": precision,
                    "compile": compiled,
                }
            )
            yield preset, plan, trace_key(plan, recompute=False)
            for way in ("full",) if compiled else model.recomputations:
                changed = plan.model_copy(update={"recomputation": way})
                yield preset, changed, trace_key(changed, recompute=True)


if __name__ == "__main__":
    main()
