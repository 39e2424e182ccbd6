"""``zerofit classify``: what pictures show, by a trained classifier."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import CheckpointError, DataError


def classify(
    run: Annotated[Path, typer.Argument(help="A run folder, or a step folder of its checkpoints.")],
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")],
    top: Annotated[int, typer.Option(min=1, help="Most likely classes to print.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 32,
    checkpoint: Annotated[str, typer.Option(help="latest, best, final, or a step.")] = "best",
    weights: Annotated[
        Literal["trained", "ema"], typer.Option(help="The weights, or their average (runs with ema_decay).")
    ] = "trained",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> None:
    """Print the most likely classes of pictures with their probabilities.

    Files that cannot be read are named on standard error; the exit code is 2 when none could be read.
    """
    import torch

    from ..checkpoint.model import load_model
    from ..checkpoint.source import weights_of
    from ..tasks.classify import classify as answers
    from ..tasks.classify import pictures_in
    from .saved_run import open_run

    saved = open_run(run, checkpoint)
    facts = saved.state.get("facts") or {}
    if "classes" not in facts:
        raise CheckpointError(
            f"{run} holds no classifier of pictures (its checkpoints name no classes). Name a run that was trained on "
            f"pictures; `zerofit generate` writes text with language models."
        )
    paths = pictures_in(pictures)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = load_model(weights_of(saved, weights), device)
    failures = 0
    for answer in answers(model, facts, paths, top=top, batch=batch, device=device):
        if answer.failure is not None:
            failures += 1
            print(f"{answer.path} cannot be read: {answer.failure}", file=sys.stderr)
        elif as_json:
            named = [{"class": name, "probability": round(share, 6)} for name, share in answer.classes]
            print(json.dumps({"path": str(answer.path), "classes": named}, ensure_ascii=False))
        else:
            print(f"{answer.path}: " + ", ".join(f"{name} {share:.1%}" for name, share in answer.classes))
    if failures == len(paths):
        raise DataError(f"None of the {len(paths)} files could be read; the reasons are above.")
