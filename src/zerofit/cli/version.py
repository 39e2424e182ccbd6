"""``zerofit version``: what a bug report needs first. Reads the packages' records and imports none of them."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Annotated

import typer

from .. import __version__

PACKAGES = ("torch", "deepspeed", "pydantic", "numpy", "safetensors")


def version(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print the versions of zerofit, Python and the packages that training stands on."""
    versions: dict[str, str | None] = {"zerofit": __version__, "python": platform.python_version()}
    versions |= {package: _installed(package) for package in PACKAGES}
    if as_json:
        print(json.dumps(versions))
    else:
        print("\n".join(f"{name} {found or 'not installed'}" for name, found in versions.items()))


def _installed(package: str) -> str | None:
    try:
        return installed(package)
    except PackageNotFoundError:
        return None
