"""Exports: what is written reads back equal, by zerofit's own reader and by the formats' own libraries."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foreign_writers import MODEL, MOMENTS, Expected, batch, build_model, save_nanogpt, save_with_deepspeed
from processes import run
from zerofit.checkpoint import export as export_module
from zerofit.checkpoint import store
from zerofit.checkpoint.export import export
from zerofit.checkpoint.foreign import Foreign, open_foreign
from zerofit.checkpoint.foreign.sources import INTERVAL_ELEMENTS
from zerofit.checkpoint.model import load_model, model_config
from zerofit.checkpoint.retention import Retention
from zerofit.checkpoint.saver import Request, Saver
from zerofit.config.models import GPT2Config
from zerofit.errors import CheckpointError, RequestError
from zerofit.types import Fragment, World

PADDED = MODEL.model_copy(update={"pad_vocab_to": 64})
BARE = MODEL.model_copy(update={"bias": False})
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TARGETS = ["pt", "safetensors", "huggingface", "deepspeed"]


def save_run(root: Path, config: GPT2Config = MODEL, data_path: str = "nowhere", *, kind: str = "adamw") -> store.Saved:
    """A run folder with one checkpoint of a model that has moments, AdamW's or Lion's."""
    fragments = []
    for name, parameter in build_model(config).named_parameters():
        values = {
            "parameter": parameter.detach(),
            "exp_avg": parameter.detach() / 3,
            "exp_avg_sq": parameter.detach() ** 2,
        }
        fragments += [
            Fragment(name, role, tuple(parameter.shape), 0, value.reshape(-1))
            for role, value in values.items()
            if kind == "adamw" or role != "exp_avg_sq"
        ]
    state = {"model": config.model_dump(), "data_path": data_path, "best_loss": 1.5, "best_step": 5, "metrics": {},
             "config": {"optimizer": {"kind": kind}}}  # fmt: skip
    (root / "checkpoints").mkdir(parents=True)
    alone = World(0, 1, 0, torch.device("cpu"))
    saver = Saver(root / "checkpoints", alone, Retention(1), 0, asynchronous=True, patience_seconds=10)
    saver.begin(Request(7, {"optimizer_steps": 6.0}, state, {}, ("latest",)), fragments, lambda wait: wait())
    assert saver.finish()
    saver.close()
    return store.open_checkpoint(root / "checkpoints" / "step-00000007")


def path_for(tmp_path: Path, to: str) -> Path:
    return tmp_path / ("out.pt" if to == "pt" else "out")


def weights_of(saved: store.Saved) -> dict[str, torch.Tensor]:
    found = {
        name: saved.read(name, "parameter", 0, torch.Size(shape).numel()) for name, shape in saved.shapes().items()
    }
    return {name: values.view(saved.shapes()[name]) for name, values in found.items() if values is not None}


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("config", [MODEL, PADDED, BARE], ids=["plain", "padded", "no-bias"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("to", TARGETS)
def test_an_export_reads_back_equal(to: str, dtype: str, config: GPT2Config, tmp_path: Path) -> None:
    saved = save_run(tmp_path / "run", config)
    done = export(saved, config, path_for(tmp_path, to), to=to, dtype=dtype)
    found = open_foreign(done.path, config)
    assert found.shapes() == config.parameter_shapes()
    rounding = torch.float32 if to == "deepspeed" else DTYPES[dtype]
    for name, values in weights_of(saved).items():
        kept = values[: config.vocab_size] if to == "huggingface" and name == "wte.weight" else values
        read = found.read(name, "parameter", 0, kept.numel())
        assert read is not None
        assert torch.equal(read.view(kept.shape), kept.to(rounding).float()), name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", done.path.name])


def test_deepspeed_export_keeps_moments_steps_and_model(tmp_path: Path) -> None:
    saved = save_run(tmp_path / "run", PADDED)
    export(saved, PADDED, tmp_path / "out", to="deepspeed", dtype="bf16")
    found = open_foreign(tmp_path / "out")
    assert found.model == PADDED
    assert (found.step, found.scalars["optimizer_steps"]) == (7, 6)
    assert (found.state["best_loss"], found.state["best_step"]) == (1.5, 5)
    for name, shape in PADDED.parameter_shapes().items():
        for role in MOMENTS:
            size = torch.Size(shape).numel()
            assert torch.equal(found.read(name, role, 0, size), saved.read(name, role, 0, size))  # type: ignore[arg-type]


def test_another_optimizers_means_are_not_exported_as_adamws(tmp_path: Path) -> None:
    """Lion keeps an exp_avg too; squares of zero beside it would make AdamW's first steps enormous."""
    saved = save_run(tmp_path / "run", kind="lion")
    done = export(saved, MODEL, tmp_path / "out", to="deepspeed")
    assert "no moments of AdamW" in done.notes[0]
    found = open_foreign(tmp_path / "out")
    assert found.read("wte.weight", "parameter", 0, 8) is not None
    assert [found.read("wte.weight", role, 0, 8) for role in MOMENTS] == [None, None]


def test_safetensors_tells_the_model_and_shards_tell_all(tmp_path: Path) -> None:
    saved = save_run(tmp_path / "run")
    done = export(saved, MODEL, tmp_path / "out", to="safetensors", shard_bytes=1500)
    assert len(done.files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * MODEL.parameter_count()
    read: dict[str, torch.Tensor] = {}
    for file in set(index["weight_map"].values()):
        assert (tmp_path / "out" / file).stat().st_size < 1500 + 3000  # data, and a header
        read |= load_file(tmp_path / "out" / file)
    weights = weights_of(saved)
    assert read.keys() == weights.keys() == index["weight_map"].keys()
    assert all(torch.equal(read[name], values) for name, values in weights.items())
    export(saved, MODEL, tmp_path / "one.safetensors", to="safetensors", shard_bytes=1500)
    assert open_foreign(tmp_path / "one.safetensors").model == MODEL
    assert load_file(tmp_path / "one.safetensors").keys() == weights.keys()


def test_pt_is_an_ordinary_file_of_torch(tmp_path: Path) -> None:
    saved = save_run(tmp_path / "run")
    export(saved, MODEL, tmp_path / "out.pt", to="pt", dtype="bf16")
    weights = torch.load(tmp_path / "out.pt", weights_only=True)
    model = build_model()
    model.load_state_dict(weights)  # strict
    assert weights["head.weight"].data_ptr() == weights["wte.weight"].data_ptr()
    assert all(torch.equal(weights[name], values.bfloat16()) for name, values in weights_of(saved).items())
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None  # every checksum is right


# ------------------------------------------------------------------------------------------------ their own readers


def test_deepspeeds_own_script_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    saved = save_run(tmp_path / "run")
    export(saved, MODEL, tmp_path / "out", to="deepspeed")
    code = (
        "import sys, torch\n"
        "from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as read\n"
        "torch.save({n: t.clone() for n, t in read(sys.argv[1]).items()}, sys.argv[2])"
    )
    arguments = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "out"), str(tmp_path / "theirs.pt")]
    subprocess.run(arguments, check=True, capture_output=True, timeout=120, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    theirs, weights = torch.load(tmp_path / "theirs.pt"), weights_of(saved)
    assert theirs.keys() == {*weights, "head.weight"}
    assert all(torch.equal(theirs[name], values) for name, values in weights.items())


@pytest.mark.parametrize("config", [MODEL, PADDED], ids=["odd", "even"])
def test_deepspeeds_own_engine_resumes_from_it(config: GPT2Config, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    saved = save_run(tmp_path / "run", config)
    export(saved, config, tmp_path / "out", to="deepspeed")
    (found,) = run(1, resume_with_deepspeed, tmp_path / "out", config)
    for (name, role), values in found.items():
        wanted = saved.read(name, role, 0, len(values))
        assert wanted is not None
        assert torch.equal(torch.from_numpy(values), wanted), (name, role)
    assert {role for _, role in found} == {"parameter", *MOMENTS}


def resume_with_deepspeed(world: World, folder: Path, config: GPT2Config) -> Expected:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.load_checkpoint(str(folder))
    assert engine.global_steps == 7
    # Flat, in the model's order: DeepSpeed names moments only after a step.
    (master,) = engine.optimizer.single_partition_of_fp32_groups
    flat = {"parameter": master, **{role: engine.optimizer.optimizer.state[master][role] for role in MOMENTS}}
    found, offset = {}, 0
    for name, parameter in engine.module.named_parameters():
        end = offset + parameter.numel()
        found |= {(name, role): values.detach()[offset:end].clone().numpy() for role, values in flat.items()}
        offset = end
    engine.backward(engine(**batch(0, 0, config))["loss"])
    engine.step()  # the states that it loaded are usable
    return found


@pytest.mark.parametrize("config", [MODEL, PADDED, BARE], ids=["plain", "padded", "no-bias"])
def test_transformers_computes_the_same_logits(config: GPT2Config, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    saved = save_run(tmp_path / "run", config)
    export(saved, config, tmp_path / "out", to="huggingface", shard_bytes=2000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    mine, _ = load_model(saved)
    tokens = torch.tensor([[1, 5, 2, 12, 0]])
    torch.testing.assert_close(theirs.eval()(tokens).logits, mine(tokens), rtol=0, atol=1e-6)


def test_huggingface_files(tmp_path: Path) -> None:
    """The same without transformers: names, layouts, rows, zeros."""
    saved = save_run(tmp_path / "run", PADDED.model_copy(update={"bias": False}))
    done = export(saved, model_config(saved), tmp_path / "out", to="huggingface")
    assert any("biases were written as zeros" in note for note in done.notes)
    assert any("51 padding rows" in note for note in done.notes)
    theirs, weights = load_file(tmp_path / "out" / "model.safetensors"), weights_of(saved)
    assert torch.equal(theirs["transformer.wte.weight"], weights["wte.weight"][:13])
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        assert torch.equal(theirs[f"transformer.h.1.{name}.weight"], weights[f"h.1.{name}.weight"].t()), name
    assert "lm_head.weight" not in theirs
    assert not theirs["transformer.h.0.ln_1.bias"].any()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["n_head"], config["tie_word_embeddings"]) == (13, 7, True)
    json.loads((tmp_path / "out" / "generation_config.json").read_text())


def test_the_tokenizer_comes_from_tiktokens_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    from zerofit.checkpoint import export_formats

    content = {"vocab.json": b"{}", "merges.txt": b"#version\n"}
    names = {file: (f"cached-{file}", hashlib.sha256(text).hexdigest()) for file, text in content.items()}
    monkeypatch.setattr(export_formats, "GPT2_TOKENIZER_FILES", names)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for file, text in content.items():
        (tmp_path / f"cached-{file}").write_bytes(text)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.json").write_text('{"dtype": "uint16", "tokenizer": "gpt2"}')
    saved = save_run(tmp_path / "run", data_path=str(tmp_path / "data"))
    export(saved, MODEL, tmp_path / "out", to="huggingface")
    assert (tmp_path / "out" / "merges.txt").read_bytes() == b"#version\n"
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 6
    (tmp_path / "cached-vocab.json").write_bytes(b"damaged")
    done = export(saved, MODEL, tmp_path / "again", to="huggingface")
    assert any("cache does not hold" in note for note in done.notes)
    assert not (tmp_path / "again" / "vocab.json").exists()


class Endless:
    """A checkpoint without a file: element i of every tensor is i; remembers the longest interval it was asked for."""

    folder, step, scalars, state = Path("nowhere"), 3, {"optimizer_steps": 3.0}, {"best_loss": None}

    def __init__(self, model: GPT2Config) -> None:
        self.model, self.longest = model, 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.model.parameter_shapes()

    def read(self, name: str, role: str, start: int, stop: int) -> torch.Tensor:
        self.longest = max(self.longest, stop - start)
        return torch.arange(start, stop, dtype=torch.float32)


@pytest.mark.parametrize("to", TARGETS)
def test_memory_is_an_interval(to: str, tmp_path: Path) -> None:
    """A table of more than one interval is never asked for, written or compared in one piece."""
    wide = GPT2Config(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=INTERVAL_ELEMENTS // 4 + 1000)
    source = Endless(wide)
    export(source, wide, path_for(tmp_path, to), to=to)
    assert source.longest == INTERVAL_ELEMENTS
    found = open_foreign(path_for(tmp_path, to), wide)
    last = found.read("wte.weight", "parameter", INTERVAL_ELEMENTS - 1, INTERVAL_ELEMENTS + 2)
    assert last is not None
    assert last.tolist() == [INTERVAL_ELEMENTS - 1, INTERVAL_ELEMENTS, INTERVAL_ELEMENTS]  # 2^24 + 1 is no fp32


# ------------------------------------------------------------------------------------------------ foreign to foreign


def test_deepspeed_to_huggingface_to_pt(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    options = {"stage": 3, "client_state": {"model_args": MODEL.model_dump()}}
    expected = run(2, save_with_deepspeed, tmp_path / "ds", options)[0]
    source: Foreign = open_foreign(tmp_path / "ds")
    assert source.model is not None
    export(source, source.model, tmp_path / "hf", to="huggingface")
    export(open_foreign(tmp_path / "hf"), MODEL, tmp_path / "model.pt", to="pt")
    weights = torch.load(tmp_path / "model.pt")
    for name in MODEL.parameter_shapes():
        assert weights[name].flatten().numpy().tolist() == expected[name, "parameter"].tolist()


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("to", TARGETS)
def test_nothing_is_replaced_without_force(to: str, tmp_path: Path) -> None:
    saved, out = save_run(tmp_path / "run"), path_for(tmp_path, to)
    export(saved, MODEL, out, to=to)
    with pytest.raises(RequestError, match="--force"):
        export(saved, MODEL, out, to=to)
    export(saved, MODEL, out, to=to, force=True, dtype="bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", out.name])


@pytest.mark.parametrize("to", ["safetensors", "huggingface", "deepspeed"])
def test_force_never_replaces_what_is_no_export(to: str, tmp_path: Path) -> None:
    saved = save_run(tmp_path / "run")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(RequestError, match=r"thesis\.tex"):
        export(saved, MODEL, tmp_path / "home", to=to, force=True)
    with pytest.raises(RequestError, match="itself"):
        export(saved, MODEL, tmp_path / "run", to=to, force=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_a_full_disk_is_seen_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, usage = save_run(tmp_path / "run"), shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RequestError, match=r"0\.00 GiB free"):
        export(saved, MODEL, tmp_path / "out.pt", to="pt")


def test_fp16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    model = build_model()
    with torch.no_grad():
        model.get_parameter("ln_f.weight")[3] = 1e6
    torch.save(model.state_dict(), tmp_path / "model.pt")
    source = open_foreign(tmp_path / "model.pt", MODEL)
    for to in TARGETS:
        with pytest.raises(CheckpointError, match=r"ln_f\.weight holds 1e\+06.*--dtype bf16"):
            export(source, MODEL, tmp_path / "out", to=to, dtype="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt"]


def test_values_that_read_back_differently_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = export_module.FORMATS["pt"].write

    def damage(job: Any, path: Path) -> list[str]:
        notes = write(job, path)
        content = torch.load(path)
        content["h.1.mlp.c_fc.weight"][5, 3] += 1e-3
        torch.save(content, path)
        return notes

    monkeypatch.setitem(export_module.FORMATS, "pt", export_module.Format(damage, is_file=True))
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.weight"):
        export(save_run(tmp_path / "run"), MODEL, tmp_path / "out.pt", to="pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


# ------------------------------------------------------------------------------------------------ command line


def zerofit(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zerofit.cli.main", "export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command_line(tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    done = zerofit(tmp_path / "run", tmp_path / "hf", "--to", "huggingface", "--max-shard-size", "2KB", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["step"], told["parameters"], told["to"]) == (7, 1505, "huggingface")
    assert "config.json" in told["files"]
    plain = zerofit(tmp_path / "hf", tmp_path / "model.pt", "--to", "pt", "--dtype", "bf16")
    assert plain.returncode == 0, plain.stderr
    assert "read back and compared" in plain.stdout.splitlines()[-1]


def test_a_source_that_does_not_tell_its_model_needs_a_config(tmp_path: Path) -> None:
    torch.save(build_model().state_dict(), tmp_path / "model.pt")
    refused = zerofit(tmp_path / "model.pt", tmp_path / "hf", "--to", "huggingface")
    assert (refused.returncode, "--preset" in refused.stderr) == (2, True)
    fields = {key: getattr(MODEL, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
    (tmp_path / "model.json").write_text(json.dumps({"model": fields, "data": {"path": "none"}}))
    done = zerofit(tmp_path / "model.pt", tmp_path / "hf", "--to", "huggingface", "--config", tmp_path / "model.json")
    assert done.returncode == 0, done.stderr
    assert open_foreign(tmp_path / "hf").model == MODEL


def test_nanogpt_to_deepspeed_keeps_the_moments(tmp_path: Path) -> None:
    expected = save_nanogpt(tmp_path / "ckpt.pt")
    source = open_foreign(tmp_path / "ckpt.pt")
    export(source, MODEL, tmp_path / "ds", to="deepspeed")
    found = open_foreign(tmp_path / "ds", MODEL)
    for (name, role), values in expected.items():
        read = found.read(name, role, 0, len(values))
        assert read is not None
        assert (read.numpy() == values).all()
