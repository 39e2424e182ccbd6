"""Named configurations that come with zerofit, one YAML file each."""

from __future__ import annotations

from importlib.resources import files

from ...errors import ConfigError
from ..keys import nearest


def preset_names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in files(__name__).iterdir() if entry.name.endswith(".yaml")
    )


def preset_text(name: str) -> str:
    """The YAML of one preset, comments included.

    Raises:
        ConfigError: there is no such preset; the message names the nearest one and lists all.
    """
    name = name.replace("-", "_")
    turned = "_".join(reversed(name.split("_")))  # 7b_mamba, as older scripts have it
    name = turned if name not in preset_names() and turned in preset_names() else name
    if name not in preset_names():
        found = nearest(name, preset_names())
        guess = f"did you mean {found}? " if found else ""
        raise ConfigError(f"There is no preset {name!r}: {guess}The presets are {', '.join(preset_names())}.")
    return (files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")
