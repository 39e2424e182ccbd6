"""Runs that start from other weights: transformers', nanoGPT's, another run's, and those that do not fit."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import zerofit
from zerofit.checkpoint.initial import PUBLISHED, locate_initial
from zerofit.checkpoint.retention import locate
from zerofit.checkpoint.store import open_checkpoint
from zerofit.cli.export import export
from zerofit.config.arguments import parse_arguments
from zerofit.config.load import load_config
from zerofit.errors import CheckpointError, ConfigError, RequestError
from zerofit.tasks.sampling import generate
from zerofit.training.initial_model import with_initial_model
from zerofit.training.rank import train_rank
from zerofit.training.start import prepare_run

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 61}
PROMPT = [5, 3, 60, 17]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with random weights as transformers saves it, in several files."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        **SHAPE, n_positions=24, resid_pdrop=0.1, bos_token_id=0, eos_token_id=0, initializer_range=0.2
    )
    folder = tmp_path_factory.mktemp("theirs")
    transformers.GPT2LMHeadModel(config).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def _their_model(folder: Path) -> Any:
    import transformers

    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


def _data(folder: Path, largest: int = 60) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        rng.integers(0, largest + 1, 2000).astype(np.uint16).tofile(folder / f"{split}.bin")
    return folder


def _config(tmp_path: Path, **settings: Any) -> Path:
    content = {
        "runs_dir": str(tmp_path / "runs"), "data": {"path": str(_data(tmp_path / "data"))}, "device": "cpu",
        "precision": "fp32", "global_batch": 4, "max_steps": 2, "eval_interval": 2, "eval_batches": 2,
        "optimizer": {"learning_rate": 1e-9}, **settings,
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def _train(path: Path, *arguments: str) -> Path:
    request = parse_arguments([str(path), "--num-gpus", "1", *arguments])
    prepared = prepare_run(load_config(request.source, request.preset, request.overrides), request)
    assert prepared is not None
    try:
        train_rank(prepared, None)
    finally:
        assert prepared.lock is not None
        prepared.lock.give_up(prepared.folder)
    return prepared.folder


def _greedy(model: Any, logits: Any, tokens: int = 12) -> list[int]:
    return generate(lambda ids: logits(model(ids)), PROMPT, tokens, block_size=24, temperature=0)


def test_a_model_of_transformers_computes_the_same_and_goes_back(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same logits and same greedy text here; through a run (with a vanishing learning rate), an export, and back."""
    original, ids = _their_model(theirs), torch.tensor([PROMPT])
    mine = zerofit.load_model(theirs)
    torch.testing.assert_close(mine(ids), original(ids).logits, rtol=0, atol=1e-5)
    expected = original.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    assert _greedy(mine, lambda out: out) == expected
    run = _train(_config(tmp_path, init_from=str(theirs)))
    assert f"Weights from {theirs}" in capsys.readouterr().out
    config = (run / "config.yaml").read_text()
    assert f"n_embd: 32  # init_from {theirs}" in config
    assert "dropout: 0.0  # default" in config  # theirs is 0.1, which is a matter of training
    export(run, tmp_path / "hf", "huggingface")
    back = _their_model(tmp_path / "hf")
    torch.testing.assert_close(back(ids).logits, original(ids).logits, rtol=0, atol=1e-5)
    again = back.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    assert again == expected
    first = json.loads((run / "events.jsonl").read_text().splitlines()[1])
    assert first["step"] == 1  # its own count


def test_positions_are_cut(theirs: Path, tmp_path: Path) -> None:
    run = _train(_config(tmp_path, init_from=str(theirs), model={"block_size": 8, "pad_vocab_to": 64}))
    original, ids = _their_model(theirs), torch.tensor([PROMPT])
    mine = zerofit.load_model(run)
    torch.testing.assert_close(mine(ids)[..., :61], original(ids).logits, rtol=0, atol=1e-5)
    assert open_checkpoint(locate(run, "latest")).shapes()["wpe.weight"] == (8, 32)
    assert open_checkpoint(locate(run, "latest")).shapes()["wte.weight"] == (64, 32)


def test_another_run_with_other_data_and_a_fresh_optimizer(tmp_path: Path) -> None:
    """Continual training: its weights, step 0, no moments; its positions cut; then the first run may go."""
    tiny = {**SHAPE, "block_size": 16}
    first = _train(_config(tmp_path, model=tiny, optimizer={"learning_rate": 1e-2}, max_steps=4), "--name", "first")
    other = _data(tmp_path / "other", largest=9)
    path = _config(tmp_path, init_from=str(first), data={"path": str(other)}, model={"block_size": 8})
    second = _train(path, "--name", "second", "--max-steps", "1")
    before, after = (open_checkpoint(locate(run, "latest")) for run in (first, second))
    assert (after.step, after.scalars["optimizer_steps"]) == (1, 1)
    for name in ("h.1.mlp.c_fc.weight", "wpe.weight"):
        size = after.shapes()[name][0] * after.shapes()[name][1]
        a, b = (source.read(name, "parameter", 0, size) for source in (before, after))
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    first.rename(tmp_path / "gone")
    _train(path, "--name", "second", "--resume", "--max-steps", "3")  # knows its own shape by now
    assert open_checkpoint(locate(second, "latest")).step == 3
    best = tmp_path / "gone" / "checkpoints" / "latest"  # the file that names it
    assert locate_initial(str(best)).name == "step-00000004"


def test_nanogpt_checkpoints_and_its_words(tmp_path: Path) -> None:
    tiny = {**SHAPE, "block_size": 16}
    path = _config(tmp_path, model=tiny, init_from="scratch")
    run = _train(path, "--name", "nano")
    weights = {f"transformer.{k}": v for k, v in zerofit.load_model(run).state_dict().items() if k != "head.weight"}
    arguments = {**tiny, "bias": True, "dropout": 0.0}
    torch.save({"model": weights, "model_args": arguments, "iter_num": 5, "config": {}}, tmp_path / "ckpt.pt")
    again = _train(_config(tmp_path, init_from=str(tmp_path / "ckpt.pt")), "--name", "again")
    ids = torch.tensor([PROMPT])
    torch.testing.assert_close(zerofit.load_model(again)(ids), zerofit.load_model(run)(ids), rtol=0, atol=1e-5)
    # resume is nanoGPT's word for going on in the same folder
    _train(_config(tmp_path, model=tiny, init_from="resume", max_steps=3), "--name", "nano")
    assert open_checkpoint(locate(run, "latest")).step == 3


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"n_layer": 3}, r"run\.yaml:\d+: model\.n_layer is 3, and init_from .* has n_layer 2"),
        ({"block_size": 25}, r"run\.yaml:\d+: model\.block_size is 25.*24 positions.*cut and not be added"),
        ({"bias": False}, r"model\.bias is False, and init_from .* has bias True"),
        ({"kind": "mamba"}, r"model\.kind is mamba, and init_from .* holds a gpt2"),
    ],
)
def test_weights_of_another_shape_are_refused_in_words(
    theirs: Path, tmp_path: Path, model: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        with_initial_model(load_config(_config(tmp_path, init_from=str(theirs), model=model), None))


def test_a_vocabulary_that_does_not_fit_is_refused(theirs: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"61 rows.*vocabulary of 90"):
        _train(_config(tmp_path, init_from=str(theirs), model={"vocab_size": 90}))
    path = _config(tmp_path, init_from=str(theirs), data={"path": str(_data(tmp_path / "large", largest=80))})
    with pytest.raises(RequestError, match="token 80"):
        _train(path)


def test_data_of_another_tokenizer_is_warned_of(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _config(tmp_path, init_from=str(theirs), data={"path": str(_data(tmp_path / "few", largest=9))})
    _train(path)
    assert "61 tokens and the data's 10" in " ".join(capsys.readouterr().out.split())


def test_two_starts_and_no_start_are_refused(theirs: Path, tmp_path: Path) -> None:
    path = _config(tmp_path, init_from=str(theirs))
    with pytest.raises(ConfigError, match=r"run\.yaml:\d+: init_from .* both name"):
        _train(path, "--load-checkpoint", str(theirs), "--weights-only")
    with pytest.raises(CheckpointError, match=r"nothing at that path.*gpt2-xl"):
        _train(_config(tmp_path, init_from="nowhere"))


def test_published_names_come_from_the_hub(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is not asked: a stand-in notes the repositories, and answers or fails."""
    asked: list[str] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append(repository)
        assert "model-*.safetensors" in options["allow_patterns"]
        if "xl" in repository:
            raise OSError("no route to host")
        return str(theirs)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert locate_initial("gpt2-medium") == theirs
    assert locate_initial("someone/model") == theirs
    assert asked == ["openai-community/gpt2-medium", "someone/model"]
    with pytest.raises(CheckpointError, match=r"openai-community/gpt2-xl could not be fetched.*init_from: FOLDER"):
        locate_initial("gpt2-xl")
    asked.clear()
    config = load_config(_config(tmp_path, init_from="gpt2-xl"), None)
    model = with_initial_model(config, fetch=False).config.model
    assert asked == []  # a plan needs no weights
    assert model.parameter_count() == 1_557_611_200
    assert set(PUBLISHED) == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}
