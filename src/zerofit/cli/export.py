"""``zerofit export``: a checkpoint in a format that other programs read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..config.image_models import ImageModelShape
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..checkpoint.foreign import Foreign
    from ..checkpoint.store import Saved
    from ..config.models import ModelConfig


def export(
    source: Annotated[Path, typer.Argument(help="A run folder, a step folder, or a checkpoint of another program.")],
    out: Annotated[Path, typer.Argument(help="File (pt, or NAME.safetensors) or folder to write.")],
    to: Annotated[
        Literal["pt", "safetensors", "huggingface", "state-spaces", "deepspeed", "onnx"],
        typer.Option(help="Format to write; state-spaces is mamba_ssm's."),
    ],
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Type of the weights.")] = "fp32",
    checkpoint: Annotated[str, typer.Option(help="Of a run: latest, best, final, or a step.")] = "latest",
    weights: Annotated[
        Literal["trained", "ema"], typer.Option(help="The weights, or their average (runs with ema_decay).")
    ] = "trained",
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file, as 5GB or 512MiB.")] = "5GB",
    config: Annotated[Path | None, typer.Option(help="Configuration with the model of a foreign checkpoint.")] = None,
    preset: Annotated[str | None, typer.Option(help="Preset with the model of a foreign checkpoint.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a checkpoint as a state dict, safetensors, a Hugging Face folder or a DeepSpeed folder.

    The source is a run of zerofit, or a checkpoint of DeepSpeed, nanoGPT, Hugging Face or PyTorch: its kind is told
    from its content. What was written is read back and compared before it gets its name.
    """
    from ..planning.sizes import parse_bytes

    shard_bytes = parse_bytes(max_shard_size, "--max-shard-size")
    from ..checkpoint.export import export as write
    from ..checkpoint.source import weights_of
    from ..checkpoint.store import Saved

    found, model = _open(source, checkpoint, config, preset)
    if weights == "ema" and not isinstance(found, Saved):
        raise ConfigError(f"--weights ema: {source} is another program's checkpoint, of which only weights are read.")
    chosen = weights_of(found, weights) if isinstance(found, Saved) else found
    if isinstance(model, ImageModelShape) and isinstance(found, Saved):
        from ..checkpoint.export_images import export_classifier

        done = export_classifier(weights_of(found, weights), model, out, to=to, dtype=dtype, force=force)
    elif to == "onnx":
        raise ConfigError(f"--to onnx: {model.kind} is not exported to ONNX, classifiers of pictures are. Use --to pt.")
    else:
        done = write(chosen, model, out, to=to, dtype=dtype, shard_bytes=shard_bytes, force=force)
    notes = [*(() if isinstance(found, Saved) else found.notes), *done.notes]
    if as_json:
        keys = ("to", "dtype", "files", "size_bytes", "parameters", "step")
        print(json.dumps({"path": str(done.path), **{key: getattr(done, key) for key in keys}, "notes": notes}))
    else:
        print("\n".join([*notes, done.describe()]))


def _open(
    source: Path, checkpoint: str, config: Path | None, preset: str | None
) -> tuple[Saved | Foreign, ModelConfig]:
    """The checkpoint and its model.

    Raises:
        ConfigError: a model was named for a run that knows its own, or none for a source that does not tell it.
    """
    from ..checkpoint.foreign import open_foreign
    from ..checkpoint.model import model_config
    from ..checkpoint.source import own_checkpoint
    from ..config.load import load_config

    asked = load_config(config, preset).config.model if config or preset else None
    saved = own_checkpoint(source, checkpoint)
    if saved is not None:
        if asked is not None:
            raise ConfigError(f"{source} is a run of zerofit and knows its model: leave out --config and --preset.")
        return saved, model_config(saved)
    found = open_foreign(source, asked)
    if found.model is None:
        raise ConfigError(
            f"{source} ({found.what}) does not tell the whole shape of its model: the tensors do not show how "
            f"many heads it has. Name it with --config FILE or --preset NAME (`zerofit presets` lists them)."
        )
    return found, found.model
