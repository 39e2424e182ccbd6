"""Texts continued by a language model, one token after another, several at once.

The window: a model with a limit (GPT-2: ``block_size``) sees the last tokens of a text that is longer. ``slide`` shows
it as many as it can take, so that every token past the limit costs a pass over the whole window, because all positions
move. ``half`` drops the older half of the window whenever it is full: one such pass in every ``limit / 2`` tokens, for
a shorter memory. Which tokens a row sees depends on that row alone, with a cache and without, in any company.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..models.stepping import Stepper
from .decoding import Decoding, draw

Overflow = Literal["slide", "half"]


class Reader(Protocol):
    """Says what follows each row's window."""

    def logits(self, windows: Sequence[Sequence[int]], moved: bool) -> Tensor:
        """(B, V) logits of the token after each window.

        Args:
            windows: what each row shows.
            moved: some window's start moved since the last call; otherwise each window grew by one token.
        """


class CachedReader:
    """Reads through a `Stepper`: one token a call, and whole windows only when one of them moved."""

    def __init__(self, stepper: Stepper, device: torch.device | str) -> None:
        self.stepper, self.device = stepper, device
        self.state: Any = None

    def logits(self, windows: Sequence[Sequence[int]], moved: bool) -> Tensor:
        if self.state is None or moved:
            longest = max(map(len, windows))
            padding = torch.tensor([longest - len(window) for window in windows], device=self.device)
            rows = [[0] * (longest - len(window)) + list(window) for window in windows]
            self.state = self.stepper.initial_state(len(windows))
            found, self.state = self.stepper.step(torch.tensor(rows, device=self.device), self.state, padding)
        else:
            last = torch.tensor([[window[-1]] for window in windows], device=self.device)
            found, self.state = self.stepper.step(last, self.state)
        return found


class PlainReader:
    """Reads whole windows with the forward pass; for sharded models, and architectures without a `Stepper`.

    Args:
        predict: (B, T) int64 tokens on the CPU -> logits (B, T, V). Collective where the model is sharded.
    """

    def __init__(self, predict: Callable[[Tensor], Tensor]) -> None:
        self.predict = predict

    def logits(self, windows: Sequence[Sequence[int]], moved: bool) -> Tensor:
        longest = max(map(len, windows))
        # What stands after a row's end cannot change what stands before it: the models are causal.
        rows = torch.tensor([[*window, *[0] * (longest - len(window))] for window in windows])
        ends = torch.tensor([len(window) - 1 for window in windows])
        found = self.predict(rows)
        return found[torch.arange(len(windows), device=found.device), ends.to(found.device)]


@torch.no_grad()
def stream(
    reader: Reader,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    limit: int | None,
    rules: Decoding,
    seeds: Sequence[int],
    overflow: Overflow = "slide",
) -> Iterator[list[int]]:
    """Each time one new token of every row, `new_tokens` times; stop asking to stop early.

    Where `reader` is collective, every rank calls this with the same arguments and asks equally often.

    Args:
        reader: says what follows.
        prompts: token ids of each row, at least one each; of any lengths.
        new_tokens: how many tokens to add.
        limit: tokens that the model can take; None: any number.
        rules: how tokens are drawn.
        seeds: of each row's draws, which use a generator of their own.
        overflow: what a text longer than `limit` shows; see the module.
    """
    texts = [list(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    starts = [0 if limit is None else max(len(text) - limit, 0) for text in texts]
    moved = True
    for _ in range(new_tokens):
        found = reader.logits([text[start:] for text, start in zip(texts, starts, strict=True)], moved).float().cpu()
        new = [draw(row, text, rules, g) for row, text, g in zip(found, texts, generators, strict=True)]
        for text, token in zip(texts, new, strict=True):
            text.append(token)
        after = [_start(len(text), start, limit, overflow) for text, start in zip(texts, starts, strict=True)]
        moved, starts = after != starts, after
        yield new


def _start(length: int, start: int, limit: int | None, overflow: Overflow) -> int:
    """Where the window of a text of `length` tokens starts."""
    if limit is None or length - start <= limit:
        return start
    return length - (limit if overflow == "slide" else max(limit // 2, 1))


def generate(
    predict: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    new_tokens: int,
    *,
    block_size: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 1337,
) -> list[int]:
    """One prompt continued by `new_tokens` tokens with the forward pass alone; see `PlainReader` and `Decoding`.

    Collective where `predict` is: all ranks draw equally often, whatever they draw.
    """
    steps = stream(
        PlainReader(predict),
        [prompt],
        new_tokens,
        limit=block_size,
        rules=Decoding(temperature, top_k),
        seeds=[seed],
    )
    return [*prompt, *(token for (token,) in steps)]
