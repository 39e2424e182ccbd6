"""``zerofit data prepare images`` and the look at prepared pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config.images import PILLOW_MAX_PIXELS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..data.prepare.images import PreparedImages

#: Rows of the class table: so many of the largest and so many of the smallest classes.
LARGEST_SHOWN, SMALLEST_SHOWN = 30, 10
SKIPPED_SHOWN = 20


def prepare_images_command(
    folders: Annotated[
        list[Path],
        typer.Argument(help="One folder (train/CLASS and val/CLASS, or CLASS), or two: for training, for validation."),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default data/FOLDER_images.")] = None,
    cache_size: Annotated[int, typer.Option(min=8, max=2048, help="Pixels of the shorter side.")] = 256,
    val_fraction: Annotated[
        float, typer.Option(min=0.0001, max=0.9999, help="Share of each class that validates, of one folder.")
    ] = 0.1,
    split_seed: Annotated[int, typer.Option(help="Decides which pictures validate.")] = 1337,
    min_side: Annotated[int, typer.Option(min=1, help="Smaller pictures are left out.")] = 8,
    max_pixels: Annotated[
        int, typer.Option(min=1, max=PILLOW_MAX_PIXELS, help="Larger ones are taken for decompression bombs.")
    ] = 89_478_485,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Bad files up to this share are left out; more are an error.")
    ] = 0.05,
    cache: Annotated[bool, typer.Option(help="Write the pixel cache; without it training reads the files.")] = True,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default every core.")] = None,
    force: Annotated[bool, typer.Option(help="Write over a folder of other prepared pictures.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check pictures in folders of classes, split them, and write a cache of resized pixels."""
    from rich.console import Console

    from ..config.images import ImageDataConfig
    from ..data.prepare.images import prepare_images

    folder = out or Path("data") / f"{folders[0].name or 'pictures'}_images"
    config = ImageDataConfig(
        kind="images", path=folder, prepare=tuple(map(str, folders)), cache_size=cache_size, val_fraction=val_fraction,
        split_seed=split_seed, min_side=min_side, max_pixels=max_pixels, max_bad_fraction=max_bad_fraction,
        read="cache" if cache else "files",
    )  # fmt: skip
    console = Console(highlight=False)
    with _progress(quiet=as_json or not console.is_terminal) as progress:
        prepared = prepare_images(config, force=force, workers=workers, progress=progress)
    if as_json:
        print(json.dumps(as_dict(prepared)))
    else:
        print_prepared(console, prepared)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, else nothing."""
    if quiet:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("checking pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def as_dict(prepared: PreparedImages) -> dict[str, object]:
    """For ``--json``."""
    return {
        "path": str(prepared.folder), "classes": prepared.classes, "samples": prepared.samples,
        "imbalance": prepared.imbalance, "skipped": prepared.skipped, "notices": prepared.notices,
        "cache_bytes": prepared.cache_bytes,
    }  # fmt: skip


def print_prepared(console: Console, prepared: PreparedImages) -> None:
    """The class table, the imbalance, and what was left out or is worth knowing."""
    console.print(class_table(prepared))
    console.print(("" if prepared.made_now else "Already there: ") + prepared.describe(), soft_wrap=True, markup=False)
    console.print(f"Largest to smallest class in train: {prepared.imbalance:.1f} to 1")
    if prepared.skipped:
        console.print(f"Left out: {len(prepared.skipped)}")
        for row in prepared.skipped[:SKIPPED_SHOWN]:
            _print(console, f"  {row['path']}: {row['reason']}")
        if len(prepared.skipped) > SKIPPED_SHOWN:
            _print(console, f"  and {len(prepared.skipped) - SKIPPED_SHOWN} more, in {prepared.folder / 'meta.json'}")
    for notice in prepared.notices:
        _print(console, f"Note: {notice}")


def _print(console: Console, text: str) -> None:
    console.print(text.encode("utf-8", "replace").decode(), soft_wrap=True, markup=False)


def class_table(prepared: PreparedImages) -> Table:
    """Pictures of each class; of very many classes the largest and the smallest."""
    from rich.table import Table
    from rich.text import Text

    table = Table("class", "train", "val", "share of train")
    for column in table.columns[1:]:
        column.justify = "right"
    total = max(prepared.samples["train"], 1)
    rows = sorted(prepared.classes.items(), key=lambda row: (-row[1]["train"], row[0]))
    hidden = len(rows) - LARGEST_SHOWN - SMALLEST_SHOWN
    for place, (name, counts) in enumerate(rows):
        if hidden > 0 and place == LARGEST_SHOWN:
            table.add_row(f"… {hidden} more", "", "", "")
        if hidden <= 0 or place < LARGEST_SHOWN or place >= LARGEST_SHOWN + hidden:
            shown = Text(name.encode("utf-8", "replace").decode())
            table.add_row(shown, f"{counts['train']:,}", f"{counts['val']:,}", f"{counts['train'] / total:.1%}")
    return table


def show_images(folder: Path, split: str, samples: int, seed: int, *, as_json: bool) -> None:
    """The class table, and the first pictures in training order."""
    from rich.console import Console

    from ..data.images.dataset import open_images
    from ..data.prepare.images import of_meta

    dataset = open_images(folder, split, seed)
    prepared = of_meta(folder, dataset.store.meta)
    rows = []
    for place in dataset.sample_indices(0, min(samples, dataset.samples)).tolist():
        number = int(dataset.numbers[place])
        record = dataset.store.index[number]
        rows.append({
            "class": dataset.classes[int(record["label"])], "path": dataset.store.paths[number],
            "width": int(record["source_width"]), "height": int(record["source_height"]),
        })  # fmt: skip
    if as_json:
        print(json.dumps({**as_dict(prepared), "shown": rows}))
        return
    console = Console(highlight=False)
    console.print(class_table(prepared))
    for row in rows:
        _print(console, f"{row['class']}: {row['path']} ({row['width']} x {row['height']})")
