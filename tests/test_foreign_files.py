"""nanoGPT's checkpoints, Hugging Face folders and plain state dicts; hostile and damaged files."""

from __future__ import annotations

import argparse
import collections
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from foreign_writers import HUGGINGFACE_CONFIG, MODEL, build_model, huggingface_weights, nanogpt_name, save_nanogpt
from test_foreign_deepspeed import assert_same
from zerofit.checkpoint.foreign import open_foreign
from zerofit.checkpoint.model import load_model
from zerofit.errors import CheckpointError

WEIGHTS = {
    (name, "parameter"): parameter.detach().flatten().numpy() for name, parameter in build_model().named_parameters()
}


# ------------------------------------------------------------------------------------------------ nanoGPT


@pytest.mark.parametrize("wrap", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_nanogpt_weights_moments_and_progress(wrap: str, tmp_path: Path) -> None:
    expected = save_nanogpt(tmp_path / "ckpt.pt", wrap=wrap)
    found = open_foreign(tmp_path / "ckpt.pt")
    assert found.model == MODEL
    assert_same(found, expected)
    assert (found.step, found.scalars["optimizer_steps"], found.state["best_loss"]) == (2, 2, 1.5)
    assert (found.what, found.state["model"]["n_head"]) == ("nanoGPT checkpoint", 7)
    json.dumps(found.state)


def test_nanogpt_without_biases(tmp_path: Path) -> None:
    config = MODEL.model_copy(update={"bias": False})
    expected = save_nanogpt(tmp_path / "ckpt.pt", config)
    found = open_foreign(tmp_path / "ckpt.pt")
    assert found.model == config
    for (name, role), values in expected.items():
        np.testing.assert_array_equal(found.read(name, role, 0, len(values)), values)  # type: ignore[arg-type]


def test_a_padded_vocabulary_is_cut_and_padded(tmp_path: Path) -> None:
    padded = MODEL.model_copy(update={"pad_vocab_to": 64})
    save_nanogpt(tmp_path / "plain.pt")
    expected = save_nanogpt(tmp_path / "ckpt.pt", padded)
    cut = open_foreign(tmp_path / "ckpt.pt", MODEL)
    assert any("51 rows of padding were cut" in note for note in cut.notes)
    for role in ("parameter", "exp_avg"):
        np.testing.assert_array_equal(cut.read("wte.weight", role, 0, 91), expected["wte.weight", role][:91])
    wider = open_foreign(tmp_path / "ckpt.pt", MODEL.model_copy(update={"pad_vocab_to": 100}))
    table = wider.read("wte.weight", "parameter", 300, 700)
    assert table is not None
    np.testing.assert_array_equal(table[:148], expected["wte.weight", "parameter"][300:])
    assert not table[148:].any()
    with pytest.raises(CheckpointError, match="another vocabulary"):
        open_foreign(tmp_path / "ckpt.pt", MODEL.model_copy(update={"vocab_size": 66}))
    with pytest.raises(CheckpointError, match="another vocabulary"):
        open_foreign(tmp_path / "plain.pt", MODEL.model_copy(update={"vocab_size": 9}))


# ------------------------------------------------------------------------------------------------ Hugging Face


def write_folder(folder: Path, how: str) -> None:
    folder.mkdir(exist_ok=True)
    weights = huggingface_weights(build_model())
    (folder / "config.json").write_text(json.dumps(HUGGINGFACE_CONFIG))
    if how == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif how == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    elif how == "old bin":
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        weights.pop("lm_head.weight")  # as newer versions leave it out
        shards: list[dict[str, torch.Tensor]] = [{}, {}, {}]
        for number, (name, tensor) in enumerate(weights.items()):
            shards[number % 3][name] = tensor
        names = [f"model-{number + 1:05d}-of-00003.safetensors" for number in range(3)]
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, folder / name)
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("how", ["safetensors", "bin", "old bin", "sharded"])
def test_huggingface_folders(how: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "gpt2", how)
    found = open_foreign(tmp_path / "gpt2")
    assert found.model == MODEL
    assert_same(found, WEIGHTS)
    assert found.read("wte.weight", "exp_avg", 0, 1) is None
    assert found.step is None
    model, _ = load_model(found)  # type: ignore[arg-type]  # the interface of a checkpoint of our own
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(tokens), build_model()(tokens))


@pytest.mark.parametrize(
    ("key", "value"), [("activation_function", "relu"), ("scale_attn_by_inverse_layer_idx", True), ("n_inner", 5)]
)
def test_a_model_that_computes_something_else_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    write_folder(tmp_path / "gpt2", "safetensors")
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps({**HUGGINGFACE_CONFIG, key: value}))
    with pytest.raises(CheckpointError, match=key):
        open_foreign(tmp_path / "gpt2")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", ""])
def test_an_index_cannot_name_files_elsewhere(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "gpt2", "sharded")
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    (tmp_path / "gpt2" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match="not inside"):
        open_foreign(tmp_path / "gpt2")


def test_transformers_own_files(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    keys = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{k: HUGGINGFACE_CONFIG[k] for k in keys})).eval()
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    mine, _ = load_model(open_foreign(tmp_path))  # type: ignore[arg-type]
    tokens = torch.tensor([[1, 5, 2, 12]])
    torch.testing.assert_close(mine(tokens), model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("named", [True, False])
def test_moments_of_transposed_matrices_are_transposed_too(named: bool, tmp_path: Path) -> None:
    weights = huggingface_weights(build_model())
    parameters = {n: torch.nn.Parameter(t) for n, t in weights.items() if not n.endswith((".attn.bias", "masked_bias"))}
    parameters.pop("lm_head.weight")
    optimizer = torch.optim.AdamW(list(parameters.items()) if named else list(parameters.values()))
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    torch.save({"model": dict(parameters), "optimizer": optimizer.state_dict(), "step": 1}, tmp_path / "ckpt.pt")
    found = open_foreign(tmp_path / "ckpt.pt", MODEL)
    for name in ("h.1.mlp.c_fc.weight", "h.0.attn.c_proj.weight", "wte.weight"):
        theirs = optimizer.state[parameters[f"transformer.{name}"]]["exp_avg_sq"]
        mine = found.read(name, "exp_avg_sq", 0, theirs.numel())
        assert mine is not None
        assert torch.equal(mine, (theirs if name == "wte.weight" else theirs.t()).flatten())


# ------------------------------------------------------------------------------------------------ plain state dicts


@pytest.mark.parametrize("nested", [None, "module", "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_state_dicts_of_torch(nested: str | None, suffix: str, tmp_path: Path) -> None:
    weights = build_model().state_dict()
    torch.save({nested: weights, "epoch": 4} if nested else weights, tmp_path / f"model{suffix}")
    found = open_foreign(tmp_path / f"model{suffix}", MODEL)
    assert_same(found, WEIGHTS)
    assert found.state.get("epoch") == (4 if nested else None)
    assert open_foreign(tmp_path).model is None  # the only file of its folder; shapes do not tell n_head


def test_views_and_half_precision(tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in build_model().state_dict().items()}
    name = "h.1.mlp.c_fc.weight"
    weights[name] = weights[name].t().contiguous().t()  # other strides, the same values
    torch.save(weights, tmp_path / "model.pt")
    rounded = {key: torch.from_numpy(values).bfloat16().float().numpy() for key, values in WEIGHTS.items()}
    assert_same(open_foreign(tmp_path / "model.pt", MODEL), rounded)


def test_safetensors_file(tmp_path: Path) -> None:
    weights = {nanogpt_name(name): tensor.clone() for name, tensor in build_model().state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    assert_same(open_foreign(tmp_path / "model.safetensors", MODEL), WEIGHTS)


def test_a_head_that_is_not_tied_is_refused(tmp_path: Path) -> None:
    weights = huggingface_weights(build_model())
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and transformer\.wte\.weight"):
        open_foreign(tmp_path / "model.pt")


def test_unknown_missing_and_misshapen_parameters_are_named(tmp_path: Path) -> None:
    weights = build_model().state_dict()
    weights["h.0.attn.rotary"] = torch.zeros(3)
    del weights["ln_f.bias"]
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"lacks ln_f\.bias and holds h\.0\.attn\.rotary"):
        open_foreign(tmp_path / "model.pt", MODEL)
    torch.save({"resnet.conv1.weight": torch.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"no architecture.*resnet\.conv1\.weight"):
        open_foreign(tmp_path / "other.pt")


# ------------------------------------------------------------------------------------------------ hostile and damaged


class Hostile:
    """Calls a function when it is unpickled by a careless reader."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "named"), [(os.system, "system"), (eval, "eval"), (os.mkdir, "mkdir"), (getattr, "getattr")]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_by_name_and_not_run(function: Any, named: str, zipped: bool, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    argument = {"system": f"mkdir {trace}", "eval": f"__import__('os').mkdir({str(trace)!r})"}.get(named, str(trace))
    content = {"model": build_model().state_dict(), "payload": Hostile(function, argument)}
    torch.save(content, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"ckpt\.pt names the Python object \S*{named}\b.*Nothing of it was run"):
        open_foreign(tmp_path / "ckpt.pt", MODEL)
    assert not trace.exists()


def test_a_hostile_rank_file_of_deepspeed_is_refused(tmp_path: Path) -> None:
    torch.save(
        {"module": {}, "x": Hostile(os.system, f"touch {tmp_path}/trace")}, tmp_path / "mp_rank_00_model_states.pt"
    )
    with pytest.raises(CheckpointError, match=r"names the Python object \S*system"):
        open_foreign(tmp_path, MODEL)
    assert not (tmp_path / "trace").exists()


def test_harmless_types_of_training_scripts_are_admitted(tmp_path: Path) -> None:
    counts: dict[str, int] = collections.defaultdict(int, {"seen": 3})
    content = {
        "model": build_model().state_dict(),
        "args": argparse.Namespace(lr=0.1, out=Path("/data/out")),
        "best_val_loss": np.float64(1.25),
        "iter_num": np.int64(9),
        "random": np.random.get_state(),
        "history": collections.deque([1, 2], maxlen=5),
        "counts": counts,
        "big": torch.zeros(1000),
    }
    torch.save(content, tmp_path / "ckpt.pt")
    found = open_foreign(tmp_path / "ckpt.pt", MODEL)
    assert (found.step, found.state["best_loss"]) == (9, 1.25)
    client = found.state["client_state"]
    assert client["args"] == {"lr": 0.1, "out": "/data/out"}
    assert (client["history"], client["counts"]) == ([1, 2], {"seen": 3})
    assert "not carried over" in client["big"]
    json.dumps(found.state)


def test_a_list_that_holds_itself_is_cut(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    torch.save({"model": build_model().state_dict(), "endless": endless}, tmp_path / "ckpt.pt")
    assert "too deeply" in json.dumps(open_foreign(tmp_path / "ckpt.pt", MODEL).state)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_file_that_was_packed_again_is_refused(method: int, tmp_path: Path) -> None:
    torch.save(build_model().state_dict(), tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as old, zipfile.ZipFile(tmp_path / "again.pt", "w", method) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(CheckpointError, match=r"again\.pt.*(packed again|cannot be read)"):
        open_foreign(tmp_path / "again.pt", MODEL)


@pytest.mark.parametrize("content", [b"", b"PK", b"garbage" * 100, b"\x80\x02}."])
def test_files_that_are_no_checkpoints(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        open_foreign(tmp_path / "model.pt", MODEL)


@pytest.mark.parametrize("cut", [-1, -500, 40, 4])
def test_a_cut_safetensors_file_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(build_model().state_dict() | {"head.weight": torch.zeros(1)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_foreign(path, MODEL)


def test_a_safetensors_header_cannot_point_beyond_the_file(tmp_path: Path) -> None:
    header = json.dumps({"wte.weight": {"dtype": "F32", "shape": [13, 7], "data_offsets": [-364, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=r"wte\.weight of shape"):
        open_foreign(tmp_path / "model.safetensors", MODEL)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No file or folder"):
        open_foreign(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no checkpoint that zerofit knows"):
        open_foreign(tmp_path)


# ------------------------------------------------------------------------------------------------ memory

READ_ALL = """
import resource, sys
from pathlib import Path
from zerofit.checkpoint.foreign.sources import intervals
from zerofit.checkpoint.foreign.torch_file import TorchFile

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
file = TorchFile(Path(sys.argv[1]))
for tensor in file.content.values():
    source = file.source(tensor)
    for start, stop in intervals(tensor.numel(), 1 << 22):
        source.read(start, stop)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_reading_a_file_takes_a_fraction_of_its_size(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({name: torch.zeros(1 << 25) for name in ("a", "b")}, path)
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) < path.stat().st_size / 2
