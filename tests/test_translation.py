"""The table of other tools' keys: every row with the value that is in effect."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from zerofit.config.load import load_config
from zerofit.planning.plan import Plan
from zerofit.planning.translation import print_translation, translation_json

AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.8, 0.9]}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    "activation_checkpointing": {"partition_activations": True},
    "elasticity": {"enabled": True},
}


def test_auto_is_shown_with_what_the_plan_made_of_it(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(AUTO), encoding="utf-8")
    resolved = load_config(None, "gpt2", [("deepspeed_config", str(path)), ("num_workers", "4")])
    config = resolved.config
    plan = Plan.model_validate(
        {
            "model": config.model,
            "parameters": 1,
            "strategy": "zero2",
            "device": "cuda",
            "world_size": 4,
            "micro_batch": 16,
            "accumulation_steps": 1,
            "precision": "bf16",
            "zero": {"reduce_bucket_elements": 1234},
        }
    )
    rows = {row["key"]: row for row in translation_json(resolved.notes, config, plan)}
    here = {key: row["here"] for key, row in rows.items()}
    assert here["train_batch_size"] == {"global_batch": 64}
    assert here["train_micro_batch_size_per_gpu"] == {"micro_batch": 16}
    assert here["bf16.enabled"] == {"precision": "bf16"}
    assert here["zero_optimization.reduce_bucket_size"] == {"zero.reduce_bucket_elements": 1234}
    assert here["optimizer.params.lr"] == {"optimizer.learning_rate": 6e-4}
    assert here["optimizer.params.betas"] == {"optimizer.beta1": 0.8, "optimizer.beta2": 0.9}
    assert (rows["elasticity"]["outcome"], rows["num_workers"]["outcome"]) == ("removed", "ignored")
    assert "activation_checkpointing (none, full" in rows["activation_checkpointing.partition_activations"]["remark"]
    json.dumps(list(rows.values()))

    text = io.StringIO()
    print_translation(Console(file=text, width=200), resolved.notes, config, plan)
    assert all(key in text.getvalue() for key in rows)
    assert "not decided" not in text.getvalue()


def test_nothing_is_printed_where_every_name_is_ours() -> None:
    text = io.StringIO()
    resolved = load_config(None, "gpt2", [("micro_batch", "2")])
    print_translation(Console(file=text), resolved.notes, resolved.config, None)
    assert text.getvalue() == ""
