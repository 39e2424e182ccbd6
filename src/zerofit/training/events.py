"""``events.jsonl``: one JSON object a line, appended by the main rank. Its field names are an interface."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events; a line is written whole or not at all as far as readers see (they skip a torn last line)."""

    def __init__(self, path: Path, enabled: bool) -> None:
        """Other ranks than the main one pass ``enabled=False`` and write nothing."""
        # Not buffered: what could not be written is not tried again when the file is closed.
        self._file = path.open("ab", buffering=0) if enabled else None
        self._lost = False

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event. Numbers that are not finite become their name (JSON has none): "nan", "inf", "-inf"."""
        if self._file is None:
            return
        line = json.dumps({"kind": kind, **{k: _finite(v) for k, v in fields.items()}}) + "\n"
        try:
            self._file.write(line.encode())
        except OSError as error:  # a full disk must not end training
            if not self._lost:
                print(f"Warning: {self._file.name} cannot be written ({error}); events are lost.", file=sys.stderr)
            self._lost = True

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole events of a file; a line that a crash tore is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events
