"""Familiar names, nanoGPT's files, older YAML, and their migration."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from zerofit.config.arguments import parse_arguments
from zerofit.config.derived import Merged, derive
from zerofit.config.dialects import aliases
from zerofit.config.dialects.notes import Note
from zerofit.config.documents import Entry
from zerofit.config.keys import keys
from zerofit.config.load import ResolvedConfig, load_config
from zerofit.config.migrate import migrate
from zerofit.errors import ConfigError
from zerofit.planning.batch import possible_splits
from zerofit.planning.translation import print_translation

ZERO_2 = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}


def typed(line: str, preset: str | None = "gpt2") -> ResolvedConfig:
    request = parse_arguments(line.split())
    return load_config(request.source, request.preset or preset, request.overrides)


def value_of(resolved: ResolvedConfig, name: str) -> Any:
    found: Any = resolved.config
    for part in name.split("."):
        found = getattr(found, part)
    return found


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


#: What is typed -> what it sets. Each alias with a meaning stands here once.
FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "train_dir": ("--train_dir corpus", {"data.path": Path("corpus")}),
    "val_dir": ("--val_dir x --seed 3", {"seed": 3}),
    "data_dir": ("--data-dir corpus", {"data.path": Path("corpus")}),
    "dataset": ("--dataset owt", {"data.path": Path("data/owt")}),
    "max_iters": ("--max_iters=7", {"max_steps": 7}),
    "max_train_steps": ("--max_train_steps 7", {"max_steps": 7}),
    "seq_length": ("--seq_length 512", {"model.block_size": 512}),
    "eval_iters": ("--eval_iters 40 --batch_size 4", {"eval_batches": 3}),  # 160 samples, 64 a global batch
    "eval_steps": ("--eval_steps 7", {"eval_interval": 7}),
    "batch_size": ("--batch_size 4", {"micro_batch": 4, "global_batch": 64}),
    "train_batch_size_per_gpu": ("--train_batch_size_per_gpu 4", {"micro_batch": 4}),
    "per_device_train_batch_size": ("--per_device_train_batch_size 4", {"micro_batch": 4}),
    "per_gpu_train_batch_size": ("--per_gpu_train_batch_size 4", {"micro_batch": 4}),
    "gradient_accumulation_steps": (
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 8",
        {"micro_batch": 4, "accumulation_steps": 8, "global_batch": None},
    ),
    "lr": ("--lr 1e-3", {"optimizer.learning_rate": 1e-3}),
    "gradient_clipping": ("--gradient_clipping 0.5", {"optimizer.grad_clip": 0.5}),
    "max_grad_norm": ("--max_grad_norm 0.5", {"optimizer.grad_clip": 0.5}),
    "adam_beta1": ("--adam_beta1 0.8", {"optimizer.beta1": 0.8}),
    "adam_beta2": ("--adam_beta2 0.8", {"optimizer.beta2": 0.8}),
    "adam_epsilon": ("--adam_epsilon 1e-7", {"optimizer.eps": 1e-7}),
    "optim": ("--optim adamw_torch_fused", {"optimizer.kind": "adamw"}),
    "warmup_iters": ("--warmup_iters 9", {"schedule.warmup_steps": 9}),
    "num_warmup_steps": ("--num_warmup_steps 9", {"schedule.warmup_steps": 9}),
    "lr_decay_iters": ("--lr_decay_iters 99", {"schedule.decay_steps": 99}),
    "min_lr": ("--min_lr 1e-5", {"schedule.min_learning_rate": 1e-5}),
    "decay_lr": ("--decay_lr False", {"schedule.kind": "constant"}),
    "lr_scheduler_type": ("--lr_scheduler_type constant_with_warmup", {"schedule.kind": "constant"}),
    "nproc_per_node": ("--nproc_per_node=4", {"num_gpus": 4}),
    "world_size": ("--world_size 4", {"num_gpus": 4}),
    "zero_stage": ("--zero_stage 2", {"strategy": "zero2"}),
    "offload_optimizer": ("--offload_optimizer --seed 1", {"offload": "cpu", "seed": 1}),
    "cpu_offload": ("--cpu_offload false", {"offload": "none"}),
    "offload_param": ("--offload_param cpu --offload cpu --strategy zero3", {"offload_parameters": "cpu"}),
    "dtype": ("--dtype bfloat16", {"precision": "bf16"}),
    "mixed_precision": ("--mixed_precision fp16", {"precision": "fp16"}),
    "gradient_checkpointing": ("--gradient_checkpointing", {"activation_checkpointing": "full"}),
    "torch_compile": ("--torch_compile", {"compile": True}),
    "ddp_timeout": ("--ddp_timeout 60", {"collective_timeout_seconds": 60}),
    "out_dir": ("--out_dir some/where", {"runs_dir": Path("some"), "name": "where"}),
    "output_dir": ("--output_dir 2024", {"runs_dir": Path(), "name": "2024"}),
    "run_name": ("--run_name mine", {"name": "mine"}),
    "logging_steps": ("--logging_steps 7", {"log_interval": 7}),
    "save_steps": ("--save_steps 7", {"save_interval": 7}),
    "save_strategy": ("--save_strategy epoch", {"save_interval": "epoch"}),
    "eval_strategy": ("--eval_strategy no", {"eval_interval": "never"}),
    "evaluation_strategy": ("--evaluation_strategy steps", {"eval_interval": 100}),
    "save_total_limit": ("--save_total_limit 3", {"keep_checkpoints": 3}),
    "always_save_checkpoint": (
        "--always_save_checkpoint False",
        {"save_interval": "never", "save_on_improvement": True},
    ),
}


@pytest.mark.parametrize("name", FLAGS)
def test_familiar_flags(name: str) -> None:
    line, expected = FLAGS[name]
    resolved = typed(line)
    assert {key: value_of(resolved, key) for key in expected} == expected
    assert name in {note.key for note in resolved.notes}


def test_every_alias_is_tested_or_says_why_there_is_nothing() -> None:
    elsewhere = {"deepspeed", "deepspeed_config", "fp16", "bf16", "epochs", "num_epochs", "num_train_epochs",
                 "model_name_or_path", "warmup_ratio"}  # fmt: skip
    silent = {name for name, alias in aliases.aliases().items() if alias.becomes.startswith("nothing: ")}
    assert set(aliases.aliases()) - silent - elsewhere == set(FLAGS) & set(aliases.aliases())


@pytest.mark.parametrize("name", sorted(n for n, a in aliases.aliases().items() if a.becomes.startswith("nothing: ")))
def test_features_that_are_not_here_say_so(name: str) -> None:
    if name == "eval_only":
        with pytest.raises(ConfigError, match="zerofit eval RUN"):
            typed("--eval_only True")
        return
    note = typed(f"--{name} true").notes[0]
    assert (note.outcome, note.targets) == ("ignored", ())
    assert note.remark


def test_the_flags_of_old_scripts_together() -> None:
    resolved = typed(
        "--train_dir t --batch_size 2 --learning_rate 1e-4 --num_workers 4 --num_gpus 2 --fp16 --offload_optimizer "
        "--gradient_accumulation_steps 3 --port 29500 --offload_param none --gradient_clipping 1"
    )
    config = resolved.config
    assert (config.micro_batch, config.accumulation_steps, config.num_gpus, config.precision) == (2, 3, 2, "fp16")
    assert (config.offload, config.optimizer.learning_rate) == ("cpu", 1e-4)


@pytest.mark.parametrize(
    ("line", "precision"),
    [("--fp16 True", "fp16"), ("--fp16 False", "auto"), ("--bf16=true", "bf16"), ("--fp32", "fp32")],
)
def test_precision_flags_take_what_hugging_face_writes(line: str, precision: str) -> None:
    assert typed(line).config.precision == precision


@pytest.mark.skipif("duration" not in keys(), reason="runs are counted in steps only")
def test_epochs_and_shares_of_the_run() -> None:
    for name in ("epochs", "num_epochs", "num_train_epochs"):
        assert value_of(typed(f"--{name} 3"), "duration") == "3ep"
    assert value_of(typed("--warmup_ratio 0.1"), "schedule.warmup_fraction") == 0.1
    assert value_of(typed("--warmup_ratio 0"), "schedule.warmup_steps") == 0


def test_ways_to_go_on() -> None:
    assert typed("--init_from resume").config.init_from == "resume"
    assert parse_arguments(["--resume_from_checkpoint", "best"]).resume == "best"
    assert parse_arguments(["--resume_from_checkpoint=runs/a"]).resume == "runs/a"


def test_accumulation_alone_has_two_meanings() -> None:
    with pytest.raises(ConfigError, match=r"(?s)two meanings: in nanoGPT .* each rank.* accumulation_steps 8"):
        typed("--gradient_accumulation_steps 8")
    assert typed("--gradient_accumulation_steps 8 --batch_size 2 --num_gpus 1").config.accumulation_steps == 8
    assert typed("--gradient_accumulation_steps 8 --batch_size 2 --max_iters 5").config.global_batch == 16
    assert typed("--gradient_accumulation_steps 8 --batch_size 2 --save_steps 5").config.accumulation_steps == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("per_device_train_batch_size: 2\ngradient_accumulation_steps: 8\n", (2, 8, None)),
        ("batch_size: 2\nmax_iters: 9\ngradient_accumulation_steps: 8\n", (2, None, 16)),
        ("save_total_limit: 2\nbatch_size: 2\ngradient_accumulation_steps: 8\nfp16: true\n", (2, 8, None)),
    ],
)
def test_a_file_is_read_in_its_dialect(text: str, expected: tuple[Any, ...], tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "a.yaml", "preset: gpt2\n" + text), None).config
    assert (config.micro_batch, config.accumulation_steps, config.global_batch) == expected


def test_minus_one_step_is_hugging_face_s_way_to_say_nothing(tmp_path: Path) -> None:
    resolved = load_config(write(tmp_path, "a.yaml", "preset: gpt2\nmax_steps: -1\nsave_total_limit: 3\n"), None)
    assert resolved.config.max_steps == 300


def test_nanogpt_s_default_to_compile_yields_to_zero3(tmp_path: Path) -> None:
    path = write(tmp_path, "gpt2.py", GPT2)
    assert load_config(path, None).config.compile
    assert not load_config(path, None, [("strategy", "zero3")]).config.compile
    with pytest.raises(ConfigError, match="zero3 with compile true"):
        load_config(path, None, [("strategy", "zero3"), ("compile", "true")])


def test_presets_with_their_size_first() -> None:
    assert load_config(None, "char-shakespeare").config.model.n_layer == 4


def test_mixed_dialects_leave_the_count_open(tmp_path: Path) -> None:
    text = "preset: gpt2\nmax_iters: 9\nsave_total_limit: 2\ngradient_accumulation_steps: 8\n"
    with pytest.raises(ConfigError, match=r"a.yaml:4: .*two meanings"):
        load_config(write(tmp_path, "a.yaml", text), None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--batch_size", "without its value"),
        ("--dtype float8", "float32"),
        ("--zero_stage 4", "one of 0, 1, 2, 3"),
        ("--temperature 0.5", "zerofit generate"),
        ("--gradient_accumulation_steps 0 --save_steps 1", "at least 1"),
        ("--batchsize 4", "not a configuration key"),
        ("--lr_scheduler_type reduce_lr_on_plateau", "one of"),
        ("--eval_iters 0 --batch_size 2", "at least 1"),
        ("--deepspeed_config nowhere.json", "nowhere.json cannot be read"),
        ("--batch_size four", "micro_batch was set to the text 'four'"),
    ],
)
def test_mistakes(line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        typed(line)


# nanoGPT's files, written after karpathy/nanoGPT's config folder.
SHAKESPEARE_CHAR = """
# train a miniature character-level model
out_dir = 'out-shakespeare-char'
eval_interval = 250 # keep frequent
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False # override via command line
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
# device = 'cpu'
# compile = False
"""
GPT2 = """
wandb_log = True
wandb_run_name='gpt2-124M'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
"""
FINE_TUNING = """
import time
out_dir = 'out-shakespeare'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
always_save_checkpoint = False
n_gpu = 4
batch_size = 1
gradient_accumulation_steps = 8 * n_gpu
max_iters = 20
learning_rate = 3e-5
decay_lr = False
"""


def test_a_nanogpt_file_loads_with_nanogpt_s_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "char.py", SHAKESPEARE_CHAR), None).config
    model = config.model
    assert (model.kind, model.n_layer, model.n_embd, model.block_size, model.bias) == ("gpt2", 6, 384, 256, False)
    assert (config.global_batch, config.micro_batch, config.eval_batches) == (64, 64, 200)
    assert (config.max_steps, config.schedule.decay_steps, config.optimizer.beta2) == (5000, 5000, 0.99)
    assert (config.name, config.save_interval, config.data.tokenizer) == ("out-shakespeare-char", "never", "char")
    gpt2 = load_config(write(tmp_path, "gpt2.py", GPT2), None)
    assert (gpt2.config.global_batch, gpt2.config.eval_batches) == (480, 5)
    assert {note.key: note.outcome for note in gpt2.notes}["wandb_log"] == "ignored"


def test_arithmetic_is_done_and_nothing_is_executed(tmp_path: Path) -> None:
    resolved = load_config(write(tmp_path, "ft.py", FINE_TUNING), None)
    assert resolved.config.global_batch == 32
    assert (resolved.config.schedule.kind, resolved.config.schedule.warmup_steps) == ("constant", 0)
    assert resolved.origins["global_batch"].endswith("ft.py:9")


def test_published_weights_bring_their_shape(tmp_path: Path) -> None:
    path = write(tmp_path, "ft.py", FINE_TUNING + "init_from = 'gpt2-xl'\n")
    resolved = load_config(path, None)
    assert resolved.config.init_from == "gpt2-xl"
    assert resolved.origins["model.n_layer"] == "default"
    assert resolved.origins["model.block_size"] == "nanoGPT's default"


def test_the_command_line_overrides_a_nanogpt_file_as_in_nanogpt(tmp_path: Path) -> None:
    path = write(tmp_path, "gpt2.py", GPT2)
    config = load_config(path, None, [("batch_size", "6"), ("gradient_accumulation_steps", "8")]).config
    assert (config.micro_batch, config.global_batch) == (6, 48)
    assert load_config(path, None, [("global_batch", "24")]).config.global_batch == 24
    assert load_config(path, "shakespeare_char", []).config.model.n_layer == 4  # a preset takes the defaults' place


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch_size = int('4')", "bad.py:1: batch_size .*`int"),
        ("x = 1\nfor i in range(3): x = i", "bad.py:2: .*no assignment"),
        ("batch_size = 9 ** 9 ** 9", "would have to be executed"),
        ("batch_size = 1 / 0", "division by zero"),
        ("batch_sise = 4", "nearest known name is batch_size"),
        ("batch_size = (", "bad.py:1 is no Python"),
        ("import os; os.remove('x')", "no assignment"),
        ("device = 'mps'", "cuda or cpu"),
        ("batch_size = 'a'", "bad.py:1: micro_batch was set to the text 'a'|batch_size, which nothing sets"),
        ("a = b = 3", "no assignment"),
        ("batch_size = missing + 1", "would have to be executed"),
    ],
)
def test_a_nanogpt_file_that_would_have_to_run_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        load_config(write(tmp_path, "bad.py", text), None)


def test_counts_of_a_nanogpt_file_and_its_deepspeed_json_are_compared(tmp_path: Path) -> None:
    write(tmp_path, "ds.json", json.dumps({**ZERO_2, "gradient_accumulation_steps": 5}))
    path = write(tmp_path, "gpt2.py", GPT2 + "deepspeed_config = 'ds.json'\n")
    with pytest.raises(ConfigError, match=r"(?s)gpt2.py:6 as 40.*ds.json:1 as 5.*--num-gpus 8"):
        load_config(path, None)
    with pytest.raises(ConfigError, match="40 in all, or 20 on 4 GPUs"):
        load_config(path, None, [("num_gpus", "4")])
    config = load_config(path, None, [("num_gpus", "8")]).config
    assert (config.micro_batch, config.accumulation_steps, config.strategy) == (12, 5, "zero2")  # 12 x 5 x 8 = 480


DISTRIBUTED = """
preset: gpt2
training:
  distributed: true
  distributed_strategy: deepspeed
  deepspeed: {config_path: ds.json}
  dataloader: {batch_size: 4, num_workers: 2, pin_memory: true}
  gradient_accumulation_steps: 8
  mixed_precision: bf16
"""
MAMBA = """
model_type: mamba
num_gpus: 4
model: {vocab_size: 50257, max_seq_length: 2048, d_model: 256, n_layers: 3, d_state: 16, d_conv: 4, expand: 2}
training: {batch_size: 1, gradient_accumulation_steps: 8, learning_rate: 3e-4, max_steps: 100}
data: {path: data/corpus}
"""


def test_the_older_shape_with_a_training_section(tmp_path: Path) -> None:
    write(tmp_path, "ds.json", json.dumps(ZERO_2))
    config = load_config(write(tmp_path, "old.yaml", DISTRIBUTED), None).config
    assert (config.micro_batch, config.accumulation_steps, config.global_batch) == (4, 8, None)
    assert (config.strategy, config.precision) == ("zero2", "bf16")


def test_the_older_shape_of_mamba(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "old.yaml", MAMBA), None).config
    assert (config.model.kind, config.model.n_layers, config.model.max_seq_length) == ("mamba", 3, 2048)
    assert (config.micro_batch, config.accumulation_steps, config.num_gpus, config.max_steps) == (1, 8, 4, 100)
    assert config.optimizer.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training: {distributed: false}", {"strategy": "single"}),
        ("training: {distributed_strategy: auto}", {"strategy": "auto"}),
        ("training: {distributed_strategy: ddp}", {"strategy": "ddp"}),
        ("dataloader: {batch_size: 3, num_workers: 1}", {"micro_batch": 3}),
        ("training: {}", {"max_steps": 300}),
    ],
)
def test_parts_of_older_shapes(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    resolved = load_config(write(tmp_path, "old.yaml", f"preset: gpt2\n{text}\n"), None)
    assert {key: value_of(resolved, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: {distributed_strategy: horovod}", "auto, ddp or deepspeed"),
        ("training: {lerning_rate: 1}", "nearest known key is optimizer.learning_rate"),
        ("training: {batch_size: 2}\ndataloader: {batch_size: 3}", "stands already at"),
        ("train_batch_size: 4\nzero_optimization: {stage: 2}", "--deepspeed-config"),
    ],
)
def test_mistakes_in_older_shapes(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(write(tmp_path, "old.yaml", text), None)


def test_a_file_and_its_deepspeed_json_must_not_contradict_each_other(tmp_path: Path) -> None:
    write(tmp_path, "ds.json", json.dumps({**ZERO_2, "train_micro_batch_size_per_gpu": 2}))
    path = write(tmp_path, "old.yaml", DISTRIBUTED)
    with pytest.raises(ConfigError, match=r"(?s)old.yaml:7 and the number 2 at .*ds.json:1.*command line"):
        load_config(path, None)
    assert load_config(path, None, [("micro_batch", "1")]).config.micro_batch == 1


@pytest.mark.parametrize("name", ["char.py", "gpt2.py", "ft.py", "old.yaml", "mamba.yaml", "hf.yaml"])
def test_a_migrated_file_loads_as_the_same_configuration(name: str, tmp_path: Path) -> None:
    texts = {"char.py": SHAKESPEARE_CHAR, "gpt2.py": GPT2, "ft.py": FINE_TUNING, "old.yaml": DISTRIBUTED}
    texts["hf.yaml"] = "preset: gpt2\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 8\nsave_steps: 9\n"
    write(tmp_path, "ds.json", json.dumps(ZERO_2))
    before = write(tmp_path, name, texts.get(name, MAMBA))
    after = write(tmp_path, "native.yaml", migrate(before))
    first, second = load_config(before, None), load_config(after, None)
    assert second.config == first.config
    assert second.notes == ()
    for note in first.notes:
        assert note.key.rpartition(".")[2] in after.read_text(encoding="utf-8")


def test_a_deepspeed_file_is_migrated_too(tmp_path: Path) -> None:
    before = write(tmp_path, "ds.json", json.dumps({**ZERO_2, "train_batch_size": 32, "elasticity": {}}))
    text = migrate(before)
    assert "strategy: zero2" in text
    assert "#   elasticity" in text
    after = write(tmp_path, "native.yaml", f"preset: gpt2\n{text}")
    config = load_config(after, None).config
    assert (config.global_batch, config.precision, config.offload) == (32, "bf16", "none")


def test_a_total_of_a_later_layer_is_split_anew(tmp_path: Path) -> None:
    write(tmp_path, "ds.json", json.dumps({**ZERO_2, "gradient_accumulation_steps": 8}))
    path = write(tmp_path, "a.yaml", "preset: gpt2\nmicro_batch: 2\ndeepspeed_config: ds.json\n")
    assert load_config(path, None).config.global_batch is None
    resolved = load_config(path, None, [("global_batch", "32")])
    assert (resolved.config.global_batch, resolved.config.accumulation_steps) == (32, None)
    note = next(note for note in resolved.notes if note.key == "gradient_accumulation_steps")
    assert (note.outcome, note.origin.rpartition("/")[2]) == ("overridden", "ds.json:1")


@pytest.mark.parametrize(
    ("file", "document"),
    [
        ("global_batch: 48", {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8}),
        ("micro_batch: 4\naccumulation_steps: 8", {"train_batch_size": 48}),
    ],
)
def test_a_file_s_batch_and_a_json_s_are_both_kept_for_the_plan_to_compare(
    file: str, document: dict[str, int], tmp_path: Path
) -> None:
    write(tmp_path, "ds.json", json.dumps({**ZERO_2, **document}))
    config = load_config(write(tmp_path, "a.yaml", f"preset: gpt2\n{file}\ndeepspeed_config: ds.json\n"), None).config
    with pytest.raises(ConfigError, match="no whole solution"):
        possible_splits(config, 1)
    config = load_config(tmp_path / "a.yaml", None, [("global_batch", "64")]).config
    assert possible_splits(config, 2)[0].global_batch == 64


def test_a_deepspeed_block_in_place_of_a_path_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "preset: gpt2\ndeepspeed: {zero_optimization: {stage: 2}}\n")
    with pytest.raises(ConfigError, match=r"a.yaml:2: deepspeed .*to a file of its own"):
        load_config(path, None)


def test_the_verb_writes_a_file_and_never_over_one(tmp_path: Path) -> None:
    write(tmp_path, "old.yaml", MAMBA)

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "zerofit.cli.main", "config", "migrate", "old.yaml", "--output", "new.yaml"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    assert run().returncode == 0
    assert "d_model: 256" in (tmp_path / "new.yaml").read_text(encoding="utf-8")
    assert run().returncode == 2


def test_the_page_of_names_is_the_table() -> None:
    root = Path(__file__).parents[1]
    code = "import sys; sys.path.insert(0, 'scripts'); import write_aliases; sys.stdout.write(write_aliases.text())"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    page = (root / "docs" / "aliases.md").read_text(encoding="utf-8")
    assert page == done.stdout, "run python scripts/write_aliases.py"


def test_folders_of_text_and_of_pictures() -> None:
    text = typed("--train_dir corpus --val_dir other")
    assert text.config.data.path == Path("corpus")
    assert [(note.key, note.outcome) for note in text.notes] == [("train_dir", "used"), ("val_dir", "ignored")]
    merged = Merged()
    for name, value in (("data.kind", "images"), ("@train_dir", "d/train"), ("@val_dir", "d/val")):
        merged.put(Entry(name, value, "command line"), 4)
    derive(merged, 3)
    assert merged.settings["data.prepare"].value == ["d/train", "d/val"]
    assert merged.settings["data.path"].value == "d/prepared"
    assert merged.ignored == []


def _pictures(root: Path) -> tuple[str, str]:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            (root / split / name / "1.png").write_bytes(b"")
    return str(root / "train"), str(root / "val")


def test_folders_that_hold_pictures_are_taken_for_pictures(tmp_path: Path) -> None:
    train, val = _pictures(tmp_path)
    for start in (["--model.kind", "resnet"], ["--model.layers", "18"], ["--preset", "animals90"]):
        request = parse_arguments([*start, "--train_dir", train, "--val_dir", val])
        found = load_config(None, request.preset, request.overrides)
        assert found.config.data.kind == "images", start
        assert found.config.data.prepare == (train, val)
        assert found.config.data.path == tmp_path / "prepared"
        assert [(note.key, note.outcome) for note in found.notes] == [
            ("train_dir", "translated"), ("val_dir", "translated"),
        ]  # fmt: skip
        assert "data.kind" in found.notes[0].targets
    with pytest.raises(ConfigError, match=r"holds pictures in folders of classes, and model\.kind gpt2 \(preset"):
        load_config(None, "shakespeare_char", [("train_dir", train), ("val_dir", val)])


def test_a_folder_of_ones_own_gets_no_corpus_of_a_preset(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("text")
    assert load_config(None, "shakespeare_char", [("train_dir", str(tmp_path))]).config.data.prepare == ()
    absent = load_config(None, "shakespeare_char", [("train_dir", str(tmp_path / "new"))])
    assert absent.config.data.prepare == ("shakespeare",)


def test_values_in_brackets_are_shown_as_they_are() -> None:
    notes = [Note("train_dir", "[/odd]", "command line", "used", ("data.prepare",))]
    config = load_config(None, "shakespeare_char", [("data.prepare", "[a, b]")]).config
    console = Console(record=True, width=200, file=io.StringIO())
    print_translation(console, notes, config, None)
    text = console.export_text()
    assert "[/odd]" in text
    assert "data.prepare [a, b]" in text


def test_the_length_of_a_sample_is_shown_under_the_architectures_name(tmp_path: Path) -> None:
    (note,) = typed("--seq_length 64").notes
    assert (note.outcome, note.targets) == ("used", ("model.block_size",))
    path = write(tmp_path, "old.yaml", "model_type: mamba\nnum_gpus: 1\nseq_length: 64\nbatch_size: 4\n")
    assert "max_seq_length: 64  # seq_length 64" in migrate(path)
    assert "set nothing here" not in migrate(path)


def test_a_kind_over_a_preset_of_another_kind_is_told_to_choose_a_preset() -> None:
    with pytest.raises(ConfigError, match=r"preset gpt2: model\.n_layer .* Choose a preset of that kind, or set"):
        load_config(None, "gpt2", [("model.kind", "mamba")])
