"""``zerofit data``: make tokens, and look at them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.text import Text

    from ..data.tokenizers import Tokenizer

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
        list[str],
        typer.Argument(
            help="shakespeare, python-docs, openwebtext, or .txt, .jsonl and .parquet files (also .gz, .bz2, .xz, "
            ".zst), folders, patterns."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default data/SOURCE_TOKENIZER.")] = None,
    tokenizer: Annotated[
        str,
        typer.Option(help="char, bytes, gpt2, or a Hugging Face tokenizer: a hub name, a folder, a tokenizer.json."),
    ] = "char",
    val_fraction: Annotated[float, typer.Option(min=0.0001, max=0.9999, help="Share that validates.")] = 0.1,
    split: Annotated[
        Literal["tail", "documents"], typer.Option(help="The last tokens validate, or documents drawn from everywhere.")
    ] = "tail",
    text_key: Annotated[str, typer.Option(help="Member or column that holds the text (.jsonl, .parquet).")] = "text",
    subset: Annotated[str | None, typer.Option(help="Part of the documents, as 1% or 20000.")] = None,
    errors: Annotated[
        Literal["strict", "replace"], typer.Option(help="Refuse text that is not valid UTF-8, or replace it.")
    ] = "strict",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that tokenise; default: one a core.")] = None,
    force: Annotated[bool, typer.Option(help="Write over a folder that holds something else.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tokenise text into train.bin and val.bin (nanoGPT's format) and meta.json. After a kill, the same command goes on
    where it stopped.

    For pictures: zerofit data prepare images FOLDER.
    """
    from rich.console import Console

    from ..config.schema import DataConfig
    from ..data.prepare import prepare as prepare_tokens

    folder = out or Path("data") / f"{_short_name(sources[0])}_{_short_name(tokenizer)}"
    config = DataConfig(
        path=folder, prepare=tuple(sources), tokenizer=tokenizer, val_fraction=val_fraction, split=split,
        text_key=text_key, subset=subset, errors=errors,
    )  # fmt: skip
    prepared = prepare_tokens(config, force=force, workers=workers, console=Console(stderr=True))
    if as_json:
        known = {key: getattr(prepared, key) for key in ("tokens", "documents", "vocab_size", "notes")}
        print(json.dumps({"path": str(folder), **known}))
    else:
        print(("" if prepared.made_now else "Already there: ") + prepared.describe())


def _short_name(spelled: str) -> str:
    """A word for a folder's name: ``my/tok/tokenizer.json`` -> ``tok``, ``books/*.txt.gz`` -> ``books``."""
    path = Path(spelled)
    if path.name == "tokenizer.json" or "*" in path.name:
        path = path.parent
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in path.name.split(".")[0]) or "text"


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="Folder of prepared tokens or pictures.")],
    split: Annotated[Literal["train", "val"], typer.Option(help="Which part.")] = "train",
    samples: Annotated[int, typer.Option(min=1, help="Samples to show.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sample (the model's block_size).")] = 64,
    seed: Annotated[int, typer.Option(help="Of the sample order.")] = 1337,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show samples as training sees them: the trained tokens coloured, in alternating shades a token, and a mark where
    a document starts.

    Of pictures: the class table, and the first in training order.
    """
    from ..data.images.store import is_prepared_images

    if is_prepared_images(path):
        show_images(path, split, samples, seed, as_json=as_json)
        return
    from rich.console import Console

    from ..data.documents import Documents
    from ..data.metadata import token_width
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
    documents = Documents(path, split, ids, tokenizer.end_of_text if tokenizer else None)
    starts = dataset.starts(0, samples)
    windows = dataset.window(starts).tolist()
    marks = [
        {place - start: number for place, number in documents.starts_in(start, start + tokens + 1).items()}
        for start in starts.tolist()
    ]
    if as_json:
        texts = [tokenizer.decode(window) if tokenizer else None for window in windows]
        found = {"tokens": len(ids), "vocab_size": vocabulary_size(path), "samples": windows, "texts": texts}
        places = [sorted(mark) for mark in marks]
        print(json.dumps({**found, "starts": starts.tolist(), "document_starts": places}))
        return
    console = Console(highlight=False)
    console.print(f"{path / split}.bin: {len(ids):,} tokens, vocabulary {vocabulary_size(path):,}")
    width = token_width(path, path / f"{split}.bin")
    if width.reason is not None:
        console.print(f"There is no meta.json: the tokens are taken as {width.dtype.name} ({width.reason}).")
    for number, (start, window, mark) in enumerate(zip(starts.tolist(), windows, marks, strict=True)):
        console.rule(f"sample {number}, from token {start:,}")
        console.print(_coloured(window, tokenizer, mark))


def _coloured(window: list[int], tokenizer: Tokenizer | None, marks: dict[int, int | None]) -> Text:
    """A sample's text. Its first token is context only: it is never a target."""
    from rich.text import Text

    text = Text()
    pending: list[int] = []
    for position, token in enumerate(window):
        if position in marks:
            number = marks[position]
            text.append(f"[document{'' if number is None else f' {number:,}'}]", style="bold black on yellow")
        pending.append(token)
        piece = tokenizer.decode(pending) if tokenizer else f"{token} "
        # A character may take several tokens: it is shown when it is whole.
        if piece.endswith("\ufffd") and len(pending) < 4 and position + 1 < len(window) and position + 1 not in marks:
            continue
        text.append(piece, style=("green", "cyan")[position % 2] if position else "dim")
        pending = []
    return text
