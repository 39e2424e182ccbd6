"""``zerofit eval``: the losses of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..config.models import LanguageModelShape
from ..errors import DataError

if TYPE_CHECKING:
    from ..checkpoint.foreign import Foreign
    from ..checkpoint.source import Averaged
    from ..checkpoint.store import Saved
    from ..config.models import ModelConfig
    from ..data.loader import Share
    from ..types import Batch


def evaluate(
    run: Annotated[
        Path,
        typer.Argument(help="A run folder, a step folder, or another program's checkpoint (then with --data)."),
    ],
    checkpoint: Annotated[str, typer.Option(help="latest, best, final, or a step.")] = "best",
    weights: Annotated[
        Literal["trained", "ema"], typer.Option(help="The weights, or their average (runs with ema_decay).")
    ] = "trained",
    data: Annotated[Path | None, typer.Option(help="Folder of prepared tokens; default: the run's own.")] = None,
    batches: Annotated[int | None, typer.Option(min=1, help="Batches of each split; default: all of it.")] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="Samples of a batch.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a checkpoint on the training and validation data, in fp32."""
    import torch

    from ..checkpoint.model import load_model
    from ..data.loader import Share
    from ..engines.common import Inputs, evaluate_window
    from ..tasks import task_of
    from ..tasks.base import metric_name
    from ..types import World
    from .saved_run import data_folder, open_weights

    saved = open_weights(run, checkpoint, weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config = load_model(saved, device)
    share, inputs = Share(micro_batch, 1, 0, 1), Inputs(device)
    if isinstance(config, LanguageModelShape):
        windows: dict[str, Iterable[Batch]] = dict(_texts(saved, data, config, share, batches))
    else:
        windows, inputs.transform = _pictures(saved, data_folder(saved, data), config, share, batches)
    found: dict[str, float] = {} if saved.step is None else {"step": saved.step}
    for split, window in windows.items():
        sums = evaluate_window(model, window, World(0, 1, 0, device), inputs).read()
        for name, value in task_of(config).metrics(sums).items():
            found[metric_name(split, name)] = value
    print(json.dumps(found) if as_json else "\n".join(f"{name}: {value:.6g}" for name, value in found.items()))


def _texts(
    saved: Saved | Averaged | Foreign, data: Path | None, config: LanguageModelShape, share: Share, batches: int | None
) -> Iterator[tuple[str, Iterator[Batch]]]:
    """Batches of each split, and of each source."""
    from ..config.schema import DataConfig
    from ..data.loader import evaluation_window
    from ..data.run_data import folders, open_evaluation
    from ..data.tokens import check_data
    from .saved_run import trained_data

    everything = [DataConfig(path=data)] if data else trained_data(saved)
    for folder in folders(everything):
        check_data(folder, config)
    for split, dataset in open_evaluation(everything, config, seed=0).items():
        yield split, evaluation_window(dataset, share, batches or -(-dataset.blocks // share.micro_batch))


def _pictures(
    saved: Saved | Averaged | Foreign, folder: Path, config: ModelConfig, share: Share, batches: int | None
) -> Any:
    """Batches of each split, and what becomes of them on the device.

    Raises:
        DataError: the classes of the data are not those that the model was trained on.
    """
    from ..config.images import ImageDataConfig
    from ..data.images.dataset import open_images
    from ..data.images.loader import ImageEvaluation
    from ..data.images.store import SPLITS
    from ..tasks.image_classification import TASK, image_model, read_plan

    if "facts" not in saved.state:
        raise DataError(
            f"{saved.folder} was written by another program and does not tell its classes. Start a run from it "
            f"(model.weights_from), and evaluate that."
        )
    data = ImageDataConfig.model_validate(saved.state["config"]["data"]).model_copy(update={"path": folder})
    splits = {split: open_images(folder, split, 0) for split in SPLITS}
    classes = saved.state["facts"]["classes"]
    if splits["val"].classes != classes:
        raise DataError(
            f"{folder} has the classes {', '.join(splits['val'].classes[:3])} …, and the model was trained on "
            f"{', '.join(classes[:3])} …: they must be the same, in the same order. Give its own data with --data."
        )
    reading = read_plan(data, None)
    windows = {split: ImageEvaluation(dataset, share, reading, batches) for split, dataset in splits.items()}
    return windows, TASK.transform(data, image_model(config))
