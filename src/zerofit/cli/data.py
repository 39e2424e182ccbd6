"""``zerofit data``: make tokens, and look at them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from .data_images import prepare_images_command, show_images

IMAGES = "prepare images"


class DataGroup(TyperGroup):
    """``prepare images`` is a command of two words, beside ``prepare``, which takes text."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command, and what is left of the arguments."""
        return super().resolve_command(ctx, [IMAGES, *args[2:]] if args[:2] == IMAGES.split() else args)


app = typer.Typer(
    cls=DataGroup, no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Prepare data, and show it."
)
app.command(IMAGES)(prepare_images_command)


@app.command()
def prepare(
    sources: Annotated[
        list[str], typer.Argument(help="shakespeare, python-docs, or .txt and .jsonl files, folders, patterns.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default data/SOURCE_TOKENIZER.")] = None,
    tokenizer: Annotated[
        Literal["char", "gpt2"], typer.Option(help="Characters, or GPT-2's byte-pair encoding.")
    ] = "char",
    val_fraction: Annotated[float, typer.Option(min=0.0001, max=0.9999, help="Share at the end that validates.")] = 0.1,
    force: Annotated[bool, typer.Option(help="Write over a folder that holds something else.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tokenise text into train.bin and val.bin (nanoGPT's format) and meta.json.

    For pictures: zerofit data prepare images FOLDER.
    """
    from ..config.schema import DataConfig
    from ..data.prepare import prepare as prepare_tokens

    folder = out or Path("data") / f"{Path(sources[0]).stem}_{tokenizer}"
    config = DataConfig(path=folder, prepare=tuple(sources), tokenizer=tokenizer, val_fraction=val_fraction)
    prepared = prepare_tokens(config, force=force)
    if as_json:
        print(json.dumps({"path": str(folder), "tokens": prepared.tokens, "vocab_size": prepared.vocab_size}))
    else:
        print(("" if prepared.made_now else "Already there: ") + prepared.describe())


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="Folder of prepared tokens or pictures.")],
    split: Annotated[Literal["train", "val"], typer.Option(help="Which part.")] = "train",
    samples: Annotated[int, typer.Option(min=1, help="Samples to show.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sample (the model's block_size).")] = 64,
    seed: Annotated[int, typer.Option(help="Of the sample order.")] = 1337,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show samples as training sees them: the trained tokens coloured, in alternating shades a token.

    Of pictures: the class table, and the first in training order.
    """
    from ..data.images.store import is_prepared_images

    if is_prepared_images(path):
        show_images(path, split, samples, seed, as_json=as_json)
        return
    from rich.console import Console
    from rich.text import Text

    from ..data.tokenizers import load_tokenizer
    from ..data.tokens import TokenDataset, open_tokens, vocabulary_size
    from ..errors import DataError

    ids = open_tokens(path, split)
    if len(ids) <= tokens:
        raise DataError(
            f"{path / split}.bin has {len(ids)} tokens; a sample of {tokens} needs more. Use fewer --tokens."
        )
    dataset = TokenDataset(ids, tokens, seed)
    tokenizer = load_tokenizer(path)
    windows = dataset.window(dataset.starts(0, samples)).tolist()
    if as_json:
        texts = [tokenizer.decode(window) if tokenizer else None for window in windows]
        print(json.dumps({"tokens": len(ids), "vocab_size": vocabulary_size(path), "samples": windows, "texts": texts}))
        return
    console = Console(highlight=False)
    console.print(f"{path / split}.bin: {len(ids):,} tokens, vocabulary {vocabulary_size(path):,}")
    for number, window in enumerate(windows):
        # The first token is context only: it is never a target.
        text = Text(tokenizer.decode(window[:1]) if tokenizer else f"{window[0]} ", style="dim")
        for position, token in enumerate(window[1:]):
            piece = tokenizer.decode([token]) if tokenizer else f"{token} "
            text.append(piece, style=("green", "cyan")[position % 2])
        console.rule(f"sample {number}")
        console.print(text)
