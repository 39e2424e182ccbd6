"""``zerofit eval``: the losses of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, or a step folder of its checkpoints.")],
    checkpoint: Annotated[str, typer.Option(help="latest, best, final, or a step.")] = "best",
    data: Annotated[Path | None, typer.Option(help="Folder of prepared tokens; default: the run's own.")] = None,
    batches: Annotated[int | None, typer.Option(min=1, help="Batches of each split; default: all of it.")] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="Samples of a batch.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a checkpoint on the training and validation data, in fp32."""
    import torch

    from ..checkpoint.model import load_model
    from ..data.loader import Share, evaluation_window
    from ..data.tokens import SPLITS, check_data, open_split
    from ..engines.common import evaluate_window
    from ..tasks import task_of
    from ..types import World
    from .saved_run import data_folder, open_run

    saved = open_run(run, checkpoint)
    folder = data_folder(saved, data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config = load_model(saved, device)
    check_data(folder, config)
    share = Share(micro_batch, 1, 0, 1)
    found: dict[str, float] = {"step": saved.step}
    for split in SPLITS:
        dataset = open_split(folder, split, config, seed=0)
        window = evaluation_window(dataset, share, batches or -(-dataset.blocks // micro_batch))
        for name, value in (
            task_of(config).metrics(evaluate_window(model, window, World(0, 1, 0, device)).read()).items()
        ):
            found[f"{split}_{name}"] = value
    print(json.dumps(found) if as_json else "\n".join(f"{name}: {value:.6g}" for name, value in found.items()))
