"""``zerofit generate``: text from a trained model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from ..config.models import LanguageModelShape
    from ..data.tokenizers import Tokenizer
    from ..models.stepping import Stepper
    from ..tasks.decoding import Decoding
    from ..tasks.sampling import Overflow, Reader

BETWEEN = "\n---------------\n"


def generate(
    run: Annotated[
        Path, typer.Argument(help="A run folder, a step folder, or another program's checkpoint (then with --data).")
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="Start of the text; repeat for several.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="A file with a prompt on each line.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 500,
    samples: Annotated[int, typer.Option(min=1, help="Texts to write for each prompt.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among this many most likely tokens.")] = None,
    top_p: Annotated[
        float, typer.Option(min=1e-9, max=1.0, help="Draw among the likeliest tokens of this joint probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Leave out tokens below this share of the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(min=1e-9, help="Above 1: tokens that stand in the text become less likely.")
    ] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeat for several.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first text; the next ones count up.")] = 1337,
    checkpoint: Annotated[str, typer.Option(help="latest, best, final, a tag, or a step.")] = "latest",
    weights: Annotated[
        Literal["trained", "ema"], typer.Option(help="The weights, or their average (runs with ema_decay).")
    ] = "trained",
    data: Annotated[Path | None, typer.Option(help="Prepared data with the tokenizer; default: the run's own.")] = None,
    overflow: Annotated[
        str, typer.Option(help="Beyond the model's context: slide (the last tokens) or half (drop half, faster).")
    ] = "slide",
    cache: Annotated[bool, typer.Option(help="Keep keys and values instead of reading the text again.")] = True,
    batch: Annotated[int, typer.Option(min=1, help="Texts written at once.")] = 32,
    stream: Annotated[
        bool | None, typer.Option(help="Show text as it is written, one after another; default: on a terminal.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write text with a trained model."""
    from ..checkpoint.model import model_config
    from ..config.models import LanguageModelShape
    from ..data.tokenizers import load_tokenizer
    from ..tasks.decoding import Decoding
    from .saved_run import data_folder, open_weights

    if overflow not in ("slide", "half"):
        raise ConfigError(f"--overflow {overflow}: it takes slide or half.")
    if as_json and stream:
        raise ConfigError("--json and --stream were both given: JSON is printed when it is whole. Leave one away.")
    texts = _prompts(prompt, prompts_file)
    saved = open_weights(run, checkpoint, weights)
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
    rows = [
        _Row(text, _ids(tokenizer, text), seed + number)
        for number, text in enumerate(text for text in texts for _ in range(samples))
    ]
    rules = Decoding(temperature, top_k, top_p, min_p, repetition_penalty)
    _check_ids(rows, shape, folder)
    writer = _open_writer(saved, device, tokenizer, rules, tokens, tuple(stop or ()), overflow, cache)
    live = (sys.stdout.isatty() and not as_json) if stream is None else stream
    if live:
        _stream(writer, rows)
        return
    for first in range(0, len(rows), batch):
        for _ in writer.write(rows[first : first + batch]):
            pass
    whole = [row.prompt + row.text for row in rows]
    if as_json:
        found = [{"prompt": row.prompt, "text": row.text, "tokens": row.tokens, "stopped": row.stopped} for row in rows]
        print(json.dumps({"step": saved.step, "texts": whole, "samples": found}))
    else:
        _show(BETWEEN.join(whole) + "\n")


@dataclass
class _Row:
    """One text: its prompt, and what was written."""

    prompt: str
    ids: list[int]
    seed: int
    text: str = ""
    tokens: int = 0
    stopped: bool = False


@dataclass(frozen=True)
class _Writer:
    """A loaded model with the rules of this call."""

    model: Any
    stepper: Stepper | None
    limit: int | None
    device: str
    tokenizer: Tokenizer
    rules: Decoding
    new_tokens: int
    stops: tuple[str, ...]
    overflow: Overflow
    cache: bool

    def write(self, rows: Sequence[_Row]) -> Iterator[list[str]]:
        """Continue the rows together; each time what can be shown of each."""
        from ..tasks.sampling import stream
        from ..tasks.text_stream import TextStream

        shown = [TextStream(self.tokenizer.decode, self.stops) for _ in rows]
        steps = stream(
            self._reader(),
            [row.ids for row in rows],
            self.new_tokens,
            limit=self.limit,
            rules=self.rules,
            seeds=[row.seed for row in rows],
            overflow=self.overflow,
        )
        for new in steps:
            yield [text.push(token) for text, token in zip(shown, new, strict=True)]
            if all(text.stopped for text in shown):
                break
        yield [text.finish() for text in shown]
        for row, text in zip(rows, shown, strict=True):
            row.text, row.tokens, row.stopped = text.text, text.tokens, text.stopped

    def _reader(self) -> Reader:
        from ..tasks.sampling import CachedReader, PlainReader

        if self.stepper is None or not self.cache:
            return PlainReader(lambda tokens: self.model(tokens.to(self.device)))
        return CachedReader(self.stepper, self.device)


def _open_writer(
    saved: Any,
    device: str,
    tokenizer: Tokenizer,
    rules: Decoding,
    tokens: int,
    stops: tuple[str, ...],
    overflow: Any,
    cache: bool,
) -> _Writer:
    import torch

    from ..checkpoint.model import load_model
    from ..models import stepper_of

    has_gpu = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not has_gpu):
        raise ConfigError(f"--device {device}: it takes auto, cpu{' or cuda' if has_gpu else '; no GPU is visible'}.")
    place = ("cuda" if has_gpu else "cpu") if device == "auto" else device
    model, config = load_model(saved, place)
    stepper = stepper_of(config.kind, model)
    limit = stepper.context_length if stepper else config.items_per_sample
    return _Writer(model, stepper, limit, place, tokenizer, rules, tokens, stops, overflow, cache)


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """The prompts, in order; a line end when none was given.

    Raises:
        DataError: the file cannot be read or is empty.
    """
    texts = list(given or ())
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise DataError(f"--prompts-file {file} cannot be read: {reason}. Give a text file in UTF-8.") from error
        found = [line for line in lines if line]
        if not found:
            raise DataError(f"--prompts-file {file} holds no prompt. Write one on each line.")
        texts += found
    return texts or ["\n"]


def _ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids: list[int] = tokenizer.encode(prompt).tolist()
    if not ids:
        raise DataError("A prompt is empty. Give at least one character with --prompt.")
    return ids


def _check_ids(rows: Sequence[_Row], shape: LanguageModelShape, folder: Path) -> None:
    """Prompts in a tokenizer that is not the model's.

    Raises:
        DataError: a token that the model does not have.
    """
    largest = max(max(row.ids) for row in rows)
    if shape.vocab_size is not None and largest >= shape.vocab_size:
        raise DataError(
            f"A prompt holds the token {largest} in the tokenizer of {folder}, and the model has {shape.vocab_size} "
            f"tokens: it was trained with another tokenizer. Name data prepared with that one, with --data."
        )


def _stream(writer: _Writer, rows: Sequence[_Row]) -> None:
    """One text after another, as it is written."""
    for number, row in enumerate(rows):
        _show((BETWEEN if number else "") + row.prompt)
        for (new,) in writer.write([row]):
            _show(new)
    _show("\n")


def _show(text: str) -> None:
    """Print in the terminal's own encoding; a character that it lacks becomes a question mark, not an error."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()
