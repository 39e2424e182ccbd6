"""Mamba's weights in other programs' layouts: transformers' own model gives the same logits, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zerofit.checkpoint.export import export
from zerofit.checkpoint.foreign import open_foreign
from zerofit.checkpoint.foreign.names import without_buffers
from zerofit.checkpoint.model import load_model
from zerofit.config.models import MambaConfig
from zerofit.errors import CheckpointError, RequestError
from zerofit.models.base import named_unique_parameters
from zerofit.models.mamba import SPEC

CONFIG = MambaConfig(n_layers=2, d_model=32, d_state=8, d_conv=3, vocab_size=61, pad_vocab_to=8, max_seq_length=24)
TOKENS = torch.randint(0, 61, (2, 19), generator=torch.Generator().manual_seed(3))


def build() -> Any:
    model = SPEC.build(CONFIG)
    with torch.no_grad():
        for name, parameter in named_unique_parameters(model).items():
            parameter.copy_(SPEC.init(CONFIG, name, seed=5))
    return model.eval()


def state_spaces_folder(folder: Path, **config: Any) -> Path:
    """As ``MambaLMHeadModel.save_pretrained`` of mamba_ssm writes it."""
    folder.mkdir()
    weights: dict[str, Tensor] = {f"backbone.{n}": p.detach() for n, p in build().named_parameters() if "head" not in n}
    torch.save({**weights, "lm_head.weight": weights["backbone.embedding.weight"]}, folder / "pytorch_model.bin")
    told = {
        "d_model": 32,
        "n_layer": 2,
        "vocab_size": 61,
        "ssm_cfg": {"d_state": 8, "d_conv": 3},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    (folder / "config.json").write_text(json.dumps({**told, **config}), encoding="utf-8")
    return folder


def logits_of(source: Any) -> Tensor:
    model, _ = load_model(source, config=source.model)
    found: Tensor = model(TOKENS)
    return found.detach()


def test_state_spaces_both_ways(tmp_path: Path) -> None:
    expected = build()(TOKENS)
    source = open_foreign(state_spaces_folder(tmp_path / "in"))
    assert source.model == CONFIG.model_copy(update={"max_seq_length": 2048})
    assert torch.equal(logits_of(source), expected)
    done = export(source, source.model, tmp_path / "out", to="state-spaces")
    assert done.files == ("config.json", "pytorch_model.bin")
    written = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    there = torch.load(tmp_path / "in" / "pytorch_model.bin", weights_only=True)
    assert written.keys() == there.keys()
    assert all(torch.equal(written[name], there[name]) for name in there)
    assert torch.equal(logits_of(open_foreign(tmp_path / "out")), expected)


def test_the_layout_is_told_by_its_name(tmp_path: Path) -> None:
    source = open_foreign(state_spaces_folder(tmp_path / "in"))
    assert source.what == "state-spaces folder"
    assert source.model is not None
    export(source, source.model, tmp_path / "hf", to="huggingface")
    assert open_foreign(tmp_path / "hf").what == "Hugging Face folder"


def test_huggingface_loads_what_is_exported(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = open_foreign(state_spaces_folder(tmp_path / "in"))
    assert source.model is not None
    export(source, source.model, tmp_path / "hf", to="huggingface")
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(theirs(TOKENS).logits, build()(TOKENS), atol=1e-4, rtol=1e-4)


def test_what_huggingface_saves_is_loaded(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=61, hidden_size=32, state_size=8, num_hidden_layers=2, expand=2, conv_kernel=4
    )
    theirs = transformers.MambaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    source = open_foreign(tmp_path / "hf")
    assert source.model is not None
    torch.testing.assert_close(logits_of(source), theirs(TOKENS).logits.detach(), atol=1e-4, rtol=1e-4)


def test_the_shapes_alone_tell_the_model(tmp_path: Path) -> None:
    folder = state_spaces_folder(tmp_path / "in")
    (folder / "config.json").unlink()
    model = open_foreign(folder).model
    assert isinstance(model, MambaConfig)
    assert (model.n_layers, model.d_model, model.d_state, model.d_conv, model.step_rank) == (2, 32, 8, 3, 2)


@pytest.mark.parametrize(
    ("config", "word"), [({"rms_norm": False}, "rms_norm"), ({"ssm_cfg": {"layer": "Mamba2"}}, "layer 'Mamba2'")]
)
def test_other_models_under_these_names_are_refused(config: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=word):
        open_foreign(state_spaces_folder(tmp_path / "in", **config))


def test_another_type_with_mambas_names_and_shapes_is_refused(tmp_path: Path) -> None:
    """FalconMamba: the same parameters, and RMSNorms without weights between them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconMambaConfig(
        vocab_size=61, hidden_size=32, state_size=8, num_hidden_layers=1, tie_word_embeddings=True
    )
    transformers.FalconMambaForCausalLM(config).save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="model_type 'falcon_mamba'"):
        open_foreign(tmp_path / "hf")


def test_only_mamba_has_state_spaces_layout(tmp_path: Path) -> None:
    from test_export import MODEL, save_run

    with pytest.raises(RequestError, match="state-spaces is that of mamba_ssm"):
        export(save_run(tmp_path / "run"), MODEL, tmp_path / "out", to="state-spaces")


def test_buffers_are_those_of_the_model_that_is_there() -> None:
    gpt2 = ["wte.weight", "wpe.weight", "ln_f.weight", "h.0.attn.c_attn.weight", "h.0.attn.bias"]
    assert without_buffers(gpt2) == gpt2[:-1]
    mamba = ["embedding.weight", "norm_f.weight", "layers.0.mixer.A_log", "layers.0.mixer.in_proj.weight"]
    assert without_buffers([*mamba, "h.0.attn.bias"]) == [*mamba, "h.0.attn.bias"]


@pytest.fixture
def verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a verb beside the folder ``mamba`` of another program and prepared characters in ``data``."""
    from zerofit.cli.main import load_verb

    state_spaces_folder(tmp_path / "mamba", vocab_size=28, pad_vocab_size_multiple=61)
    (tmp_path / "play.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 2000, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def call(verb: str, *arguments: str) -> str:
        capsys.readouterr()
        load_verb(verb).main([*arguments], standalone_mode=False)
        return capsys.readouterr().out

    call("data", "prepare", "play.txt", "--tokenizer", "char", "--out", "data")
    call("data", "prepare", "play.txt", "--tokenizer", "bytes", "--out", "other")
    return call


def test_another_programs_weights_write_and_are_evaluated_as_they_are(verbs: Any) -> None:
    arguments = ["mamba", "--data", "data", "--prompt", "the", "--tokens", "12", "--temperature", "0"]
    assert len(json.loads(verbs("generate", *arguments, "--json"))["texts"][0]) == 15
    assert verbs("generate", *arguments) == verbs("generate", *arguments, "--no-cache")
    found = json.loads(verbs("eval", "mamba", "--data", "data", "--batches", "1", "--json"))
    assert 2.5 < found["val_loss"] < 4.5  # untrained: about log(28)
    assert "step" not in found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "mamba"), "does not tell its data.*--data"),
        (("eval", "mamba"), "does not tell its data.*--data"),
        (("generate", "mamba", "--data", "data", "--weights", "ema"), "only weights are read"),
        (("generate", "mamba", "--data", "other", "--prompt", "the"), "the model has 28 tokens.*another tokenizer"),
        (("generate", "mamba", "--data", "data", "--checkpoint", "5"), "no run with several to choose from"),
        (("generate", "play"), "play holds no checkpoints"),
    ],
)
def test_what_cannot_be_done_with_another_programs_weights(arguments: tuple[str, ...], said: str, verbs: Any) -> None:
    with pytest.raises(RequestError, match=said):
        verbs(*arguments)
