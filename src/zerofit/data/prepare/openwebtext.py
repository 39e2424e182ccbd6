"""OpenWebText (Gokaslan & Cohen 2019), an open reproduction of GPT-2's training text, from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ...errors import DataError, MissingDependency

REPOSITORY = "Skylion007/openwebtext"
#: Documents in it (8,009,762 for training and 4,007 for validation in nanoGPT's split; data/openwebtext/prepare.py).
DOCUMENTS = 8_013_769


def openwebtext(documents: int | None, share: float, workers: int) -> Callable[[], Iterator[str]]:
    """The texts in the dataset's order.

    The whole corpus is downloaded once (13 GB, 54 GB on the disk) into the library's cache; a part is streamed, so that
    only its files are fetched.

    Args:
        documents: the first so many; None for all.
        share: of the documents; the first ones are taken.
        workers: processes of the download.

    Raises:
        MissingDependency: `datasets` is not installed.
        DataError: the hub does not answer.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependency(
            "openwebtext needs Hugging Face's datasets: run `pip install 'zerofit[data]'`."
        ) from error
    count = documents if documents is not None else None if share == 1.0 else max(int(DOCUMENTS * share), 1)

    def read() -> Iterator[str]:
        try:
            if count is None:
                rows: Any = datasets.load_dataset(REPOSITORY, split="train", num_proc=workers)
            else:
                rows = datasets.load_dataset(REPOSITORY, split="train", streaming=True).take(count)
            for row in rows:
                yield row["text"]
        except Exception as error:  # the library lets whatever its download raised through
            raise DataError(
                f"OpenWebText could not be read from the Hugging Face hub, {REPOSITORY} ({type(error).__name__}: "
                f"{str(error)[:200]}). Connect this machine to the network, or download its .parquet files elsewhere "
                f"and give their folder as the source."
            ) from error

    return read
