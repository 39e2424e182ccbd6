"""What a process does that checks pictures: a shard of them, read, shrunk and written.

Imports little: every process that starts pays for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..child_processes import end_with_parent
from .decode import BadPicture, Limits, Resize, decode, find_resize
from .discover import Picture


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shard_name(number: int) -> str:
    """File of a shard's pixels."""
    return f"pixels-{number:05d}.bin"


@dataclass
class Checked:
    """A picture after it was read: its row, or why it is left out."""

    picture: Picture
    sha256: str = ""
    record: dict[str, int] = field(default_factory=dict)
    reason: str = ""


def shard_rows(work: Path, number: int) -> Path:
    return work / f"rows-{number:05d}.json"


def check_shard(
    pictures: Sequence[Picture], number: int, work: Path, limits: Limits, size: int, resize: str, keep_pixels: bool
) -> int:
    """Read, check and shrink some pictures; write their pixels, then their rows. Returns `number`."""
    rows: list[dict[str, Any]] = []
    offset = 0
    unfinished = work / f"{shard_name(number)}.{os.getpid()}"
    with unfinished.open("wb", buffering=1 << 22) as out:
        for picture in pictures:
            checked = _check(picture, limits, size, find_resize(resize))
            if not isinstance(checked, tuple):
                rows.append({"reason": checked.reason})
                continue
            row, pixels = checked
            record = {**row.record, "shard": number, "offset": offset}
            rows.append({"sha256": row.sha256, "record": record})
            if keep_pixels:
                offset += out.write(pixels)
    unfinished.replace(work / shard_name(number))
    text = work / f"rows-{number:05d}.{os.getpid()}"
    text.write_text(json.dumps(rows), encoding="utf-8")
    text.replace(shard_rows(work, number))
    return number


def _check(picture: Picture, limits: Limits, size: int, resize: Resize) -> Checked | tuple[Checked, bytes]:
    try:
        data = Path(picture.path).read_bytes()
        decoded = decode(data, size, limits, resize)
    except BadPicture as error:
        return Checked(picture, reason=str(error))
    except OSError as error:
        return Checked(picture, reason=f"unreadable: {error.strerror}")
    height, width = decoded.pixels.shape[:2]
    record = {
        "transposed": int(decoded.transposed), "orientation": decoded.orientation, "height": height, "width": width,
        "plain_jpeg": int(decoded.plain_jpeg), "source_height": decoded.source_height,
        "source_width": decoded.source_width,
    }  # fmt: skip
    return Checked(picture, hashlib.sha256(data).hexdigest(), record), decoded.pixels.tobytes()


def read_shard(work: Path, number: int, pictures: Sequence[Picture]) -> Iterator[Checked]:
    rows = json.loads(shard_rows(work, number).read_text(encoding="utf-8"))
    for picture, row in zip(pictures, rows, strict=True):
        yield Checked(picture, row.get("sha256", ""), row.get("record", {}), row.get("reason", ""))


def start_worker() -> None:
    """Pillow warns of large pictures and odd metadata; what counts is said in `BadPicture`. Ctrl-C is for the main
    process, which ends its workers."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
