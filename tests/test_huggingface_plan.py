"""Plans for models of transformers: traced like our own, never trained by accident."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from test_trace import peaks
from zerofit.config.load import load_config
from zerofit.config.models import HuggingFaceConfig
from zerofit.errors import ConfigError
from zerofit.planning.huggingface import completed
from zerofit.planning.template import compose
from zerofit.planning.trace import direct_events, trace_template
from zerofit.training.start import prepare_run

transformers = pytest.importorskip("transformers")
SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 101,
}  # fmt: skip


def written(folder: Path, kind: str, **changes: Any) -> Path:
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **changes})
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_a_composed_trace_is_the_whole_models(tmp_path: Path, kind: str) -> None:
    from zerofit.models.huggingface import SPEC

    model = completed(HuggingFaceConfig(path=str(written(tmp_path, kind)), max_seq_length=32))
    chosen: dict[str, Any] = {"precision": "bf16", "compiled": False, "device": "cuda"}
    plain, recomputed = (trace_template(SPEC, model, recompute=recompute, **chosen) for recompute in (None, "full"))
    for every in (0, 1):
        composed = peaks(compose(plain, recomputed, 6, every, 3))
        assert composed == direct_events(SPEC, model, every=every, samples=3, **chosen)


def test_the_count_is_transformers_own(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama", tie_word_embeddings=True)
    model = completed(HuggingFaceConfig(path=str(folder)))
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    assert model.parameter_count() == sum(p.numel() for p in theirs.parameters())
    assert model.vocab_size == 101
    assert model.with_depth(2).depth == 2


def test_a_plan_needs_no_data_and_a_second_one_no_torch(tmp_path: Path) -> None:
    arguments = ["--model.kind", "huggingface", "--model.path", str(written(tmp_path, "llama")), "--global_batch", "8",
                 "--gpus", "2", "--gpu", "rtx4090", "--json"]  # fmt: skip
    program = (
        "import sys; from zerofit.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: print('TORCH' if 'torch' in sys.modules else 'PLAIN', file=sys.stderr)"
    )
    for expected in ("TORCH", "PLAIN"):
        done = subprocess.run([sys.executable, "-c", program, "plan", *arguments], capture_output=True, text=True)
        assert done.stderr.strip().endswith(expected), done.stderr
        found = json.loads(done.stdout)
        assert found["model"]["kind"] == "huggingface"
        assert found["chosen"]["memory_basis"] == "traced"


def test_what_cannot_be_planned_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder with a config"):
        completed(HuggingFaceConfig(path=str(tmp_path / "nowhere")))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="names no model_type"):
        completed(HuggingFaceConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ConfigError, match="no causal language model"):
        completed(HuggingFaceConfig(path=str(tmp_path)))


def test_training_is_refused_in_words(tmp_path: Path) -> None:
    from zerofit.config.arguments import Request

    overrides = [("model.kind", "huggingface"), ("model.path", str(written(tmp_path, "llama"))), ("data.path", "x")]
    with pytest.raises(ConfigError, match="can be planned"):
        prepare_run(load_config(None, None, overrides), Request())
