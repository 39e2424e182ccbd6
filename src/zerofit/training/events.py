"""``events.jsonl``: one JSON object a line, appended by the main rank. Its field names are an interface."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events; a line is written whole or not at all as far as readers see (they skip a torn last line)."""

    def __init__(self, path: Path, enabled: bool) -> None:
        """Other ranks than the main one pass ``enabled=False`` and write nothing."""
        self._file = path.open("a", encoding="utf-8") if enabled else None

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event. Numbers that are not finite become their name (JSON has none): "nan", "inf", "-inf"."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, **{k: _finite(v) for k, v in fields.items()}}) + "\n")
            self._file.flush()

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
