"""``zerofit generate``: text from a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import DataError


def generate(
    run: Annotated[Path, typer.Argument(help="A run folder, or a step folder of its checkpoints.")],
    prompt: Annotated[str, typer.Option(help="Start of the text.")] = "\n",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 500,
    samples: Annotated[int, typer.Option(min=1, help="Texts to write.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among this many most likely tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first text; the next ones count up.")] = 1337,
    checkpoint: Annotated[str, typer.Option(help="latest, best, final, or a step.")] = "latest",
    weights: Annotated[
        Literal["trained", "ema"], typer.Option(help="The weights, or their average (runs with ema_decay).")
    ] = "trained",
    data: Annotated[Path | None, typer.Option(help="Prepared data with the tokenizer; default: the run's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write text with a trained model."""
    import torch

    from ..checkpoint.model import load_model, model_config
    from ..checkpoint.source import weights_of
    from ..config.models import LanguageModelShape
    from ..data.tokenizers import load_tokenizer
    from ..tasks.sampling import generate as continue_text
    from .saved_run import data_folder, open_run

    saved = open_run(run, checkpoint)
    shape = model_config(saved)
    if not isinstance(shape, LanguageModelShape):
        raise DataError(
            f"{run} holds a {shape.kind}, and `zerofit generate` writes text with a language model. Use `zerofit "
            f"classify {run} PICTURES`."
        )
    folder = data_folder(saved, data)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise DataError(f"{folder} has no meta.json that names a tokenizer. Give the prepared data with --data.")
    ids = tokenizer.encode(prompt).tolist()
    if not ids:
        raise DataError("The prompt is empty. Give at least one character with --prompt.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _ = load_model(weights_of(saved, weights), device)
    texts = []
    for number in range(samples):
        out = continue_text(
            lambda tensor: model(tensor.to(device)),
            ids,
            tokens,
            block_size=shape.sequence_length,
            temperature=temperature,
            top_k=top_k,
            seed=seed + number,
        )
        texts.append(tokenizer.decode(out))
    print(json.dumps({"step": saved.step, "texts": texts}) if as_json else "\n---------------\n".join(texts))
