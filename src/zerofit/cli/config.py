"""``zerofit config``: configurations of other tools, in zerofit's own keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Read configurations of other tools.")


@app.callback()
def config() -> None:
    """Read configurations of other tools."""


@app.command()
def migrate(
    file: Annotated[Path, typer.Argument(help="YAML or JSON, nanoGPT's config/*.py, or a DeepSpeed JSON.")],
    output: Annotated[Path | None, typer.Option(help="Write there; default: print.")] = None,
) -> None:
    """Write a file in zerofit's own keys, with a comment on what became of each key."""
    from ..config.migrate import migrate as migrated

    text = migrated(file)
    if output is None:
        print(text, end="")
        return
    if output.exists():
        raise ConfigError(f"{output} exists already, and nothing is written over. Choose another --output.")
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error.strerror}). Choose another --output.") from error
    print(f"Wrote {output}.")
