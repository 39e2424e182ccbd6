"""Image classification: pictures in folders of classes, accuracy, and the table of what is taken for what."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config.image_models import ImageModelShape
from ..config.images import ImageDataConfig
from ..config.models import ModelShape
from ..config.schema import Config
from ..data.images.store import check_images, images_fingerprint, is_prepared_images, read_images_meta
from ..data.prepare.images import prepare_images
from ..errors import ConfigError, DataError
from ..types import Batch, LossSum
from .base import Best, Ending, Feed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config.models import ModelConfig
    from ..data.images.loader import ReadPlan
    from ..data.loader import Share

#: Files of a finished run: the table of what was taken for what, and each class's share that was found.
CONFUSION, PER_CLASS = "confusion_matrix.csv", "classes.json"
#: Classes that the closing words name: those that are found least.
WORST_SHOWN = 5


class ImageClassification:
    """Tell which class a picture shows. See `zerofit.tasks.base.Task`."""

    items = "images"
    best = Best("val_accuracy", highest=True)

    def prepare(self, config: Config, say: Callable[[str], None]) -> None:
        data = pictures_of(config)
        if data.prepare and not is_prepared_images(data.path):
            say(f"Preparing {', '.join(data.prepare)} …")
            prepared = prepare_images(data)
            say(prepared.describe())
            for notice in prepared.notices:
                say(f"Note: {notice}.")

    def decided_by_data(self, config: Config) -> dict[str, object]:
        model, decided = image_model(config.model), dict[str, object]()
        if model.input_size is None:
            decided["input_size"] = pictures_of(config).image_size
        if model.num_classes is None:
            decided["num_classes"] = len(read_images_meta(config.data.path)["classes"])
        return decided

    def check(self, config: Config) -> Sequence[str]:
        from ..data.augment import check_augment

        data, model = pictures_of(config), image_model(config.model)
        store = check_images(data)
        if model.num_classes != len(store.classes):
            raise DataError(
                f"model.num_classes {model.num_classes}, and {data.path} holds {len(store.classes)} classes "
                f"({', '.join(store.classes[:3])} …). They must be as many: leave model.num_classes out to take it "
                f"from the data."
            )
        if model.input_size != data.image_size:
            raise ConfigError(
                f"model.input_size {model.input_size} with data.image_size {data.image_size}: the model sees what the "
                f"data hands over. Leave model.input_size out."
            )
        if data.augment.changes_colour:
            check_augment(data, 2)
        return ()

    def epoch_samples(self, config: Config) -> int:
        from ..data.images.dataset import open_images

        data = pictures_of(config)
        return open_images(data.path, "train", config.seed, balanced=data.balanced).samples

    def fingerprint(self, config: Config) -> dict[str, dict[str, Any]]:
        return images_fingerprint(config.data.path)

    def facts(self, config: Config) -> dict[str, Any]:
        data = pictures_of(config)
        meta = read_images_meta(data.path)
        sizes = {"image_size": data.image_size, "eval_resize": data.eval_resize}
        return {"classes": meta["classes"], **sizes, "cache_size": meta["request"]["cache_size"]}

    def open(self, config: Config, model: ModelConfig, share: Share, *, pin_memory: bool) -> Feed:
        import torch

        from ..data.augment import check_augment
        from ..data.images.dataset import open_images
        from ..data.images.loader import ImageEvaluation, ImageLoader
        from ..data.loader import Share

        data = pictures_of(config)
        check_augment(data, share.micro_batch)
        train, val = (
            open_images(data.path, split, config.seed, balanced=data.balanced and split == "train")
            for split in ("train", "val")
        )
        # Batches are pinned for a GPU: the one that this rank has made current.
        device = torch.device("cuda", torch.cuda.current_device()) if pin_memory else None
        reading = read_plan(data, device)
        some = config.eval_batches * share.accumulation_steps
        probe = ImageEvaluation(val, Share(1, 1, 0, 1), replace(reading, device=None, num_workers=0), 1)[0]
        return Feed(
            ImageLoader(train, share, reading),
            {"train": ImageEvaluation(train, share, reading, some), "val": ImageEvaluation(val, share, reading)},
            self.batch_of({name: tensor.contiguous() for name, tensor in probe.inputs.items()}),
            self.transform(data, image_model(model), compile=config.compile),
        )

    @staticmethod
    def transform(
        data: ImageDataConfig, model: ImageModelShape, *, compile: bool = False
    ) -> Callable[[dict[str, Tensor], bool], dict[str, Tensor]]:
        """Crops, augmentation and normalisation on the device (`zerofit.data.augment`)."""
        from ..data.augment import Augment

        train = Augment(data, train=True, num_classes=model.classes, compile=compile)
        evaluation = Augment(data, train=False, num_classes=model.classes)
        return lambda inputs, training: (train if training else evaluation)(inputs)

    def batch_of(self, inputs: Mapping[str, Tensor]) -> Batch:
        return Batch(inputs, int((inputs["targets"] >= 0).sum()))

    def random_batch(self, model: ModelConfig, samples: int, generator: Any) -> Batch:
        import torch

        shape = image_model(model)
        images = torch.randn((samples, 3, shape.pixels, shape.pixels), generator=generator)
        return self.batch_of(
            {"images": images, "targets": torch.randint(0, shape.classes, (samples,), generator=generator)}
        )

    def metrics(self, sums: Mapping[str, LossSum]) -> dict[str, float]:
        """``loss`` in nats a picture (without label smoothing), ``accuracy`` and ``top5_accuracy`` as shares."""
        names = {"loss": "loss", "correct": "accuracy", "correct_top5": "top5_accuracy"}
        return {shown: sums[name].mean for name, shown in names.items() if name in sums}

    def words(self, config: Config, model: ModelConfig, predict: Callable[[Tensor], Tensor]) -> str | None:
        return None

    def finish(self, ending: Ending) -> str | None:
        """Write `CONFUSION` and `PER_CLASS` of the validation pictures, under the weights of the last step."""
        classes: list[str] = self.facts(ending.config)["classes"]
        counts = confusion(ending, len(classes))
        if not ending.is_main:
            return None
        found = recalls(classes, counts)
        rows: list[list[Any]] = [
            ["class \\ taken for", *classes],
            *([name, *row] for name, row in zip(classes, counts, strict=True)),
        ]
        (ending.folder / CONFUSION).write_text("".join(_csv_row(row) for row in rows), encoding="utf-8")
        (ending.folder / PER_CLASS).write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
        worst = sorted((row for row in found if row["pictures"]), key=lambda row: row["recall"])[:WORST_SHOWN]
        named = ", ".join(f"{row['class']} {row['recall']:.0%}" for row in worst)
        return f"Classes found least: {named}. All of them: {PER_CLASS} and {CONFUSION} in the run folder."


TASK = ImageClassification()


def image_model(model: ModelShape) -> ImageModelShape:
    """The shape of a model of this task."""
    assert isinstance(model, ImageModelShape)  # `tasks.task_of` has chosen this task by the model
    return model


def pictures_of(config: Config) -> ImageDataConfig:
    """The data of a configuration of this task."""
    assert isinstance(config.data, ImageDataConfig)  # `Config` refuses other data
    return config.data


def read_plan(data: ImageDataConfig, device: torch.device | None) -> ReadPlan:
    """How a rank reads; batches go to `device` ahead when one is given."""
    from ..data.images.loader import ReadPlan

    pin = data.pin_memory if data.pin_memory is not None else device is not None
    return ReadPlan(data.read, device, data.num_workers, data.prefetch_factor, pin)


def confusion(ending: Ending, classes: int) -> list[list[int]]:
    """Row: the true class; column: what it was taken for; validation pictures of all ranks. Collective."""
    import torch

    counts = torch.zeros(classes * classes, dtype=torch.int64)
    for batch in ending.feed.evaluation["val"]:
        targets = batch.inputs["targets"].cpu()
        guesses = ending.predict(batch.inputs).argmax(dim=1).cpu()
        real = targets >= 0
        counts += torch.bincount(targets[real] * classes + guesses[real], minlength=classes * classes)
    total: list[list[int]] = ending.add(counts).view(classes, classes).tolist()
    return total


def recalls(classes: list[str], counts: list[list[int]]) -> list[dict[str, Any]]:
    """Of each class: its pictures, the share that was found (null without pictures), and what most others were taken
    for."""
    found = []
    for number, (name, row) in enumerate(zip(classes, counts, strict=True)):
        wrong = {classes[other]: count for other, count in enumerate(row) if other != number and count}
        pictures = sum(row)
        found.append({
            "class": name, "pictures": pictures, "recall": row[number] / pictures if pictures else None,
            "mostly_taken_for": max(wrong, key=wrong.__getitem__) if wrong else None,
        })  # fmt: skip
    return found


def _csv_row(cells: list[Any]) -> str:
    import csv
    import io

    out = io.StringIO()
    csv.writer(out).writerow(cells)
    return out.getvalue()
