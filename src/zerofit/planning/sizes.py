"""Sizes as people type them, and as they read them."""

from __future__ import annotations

import re

from ..errors import ConfigError

KIB, MIB, GIB, TIB = 1024, 1024**2, 1024**3, 1024**4
#: SI letters count in thousands and IEC's in 1024ths; a letter alone is binary, as for Slurm, ``free -h`` and Docker.
_UNITS = {
    "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB, "ki": KIB, "mi": MIB, "gi": GIB, "ti": TIB,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?|\.[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)
#: A number without a unit is bytes, and nobody plans with fewer than this.
_LEAST_PLAIN_BYTES = MIB


def parse_bytes(text: str, flag: str) -> int:
    """Bytes of ``24GB`` (24 x 10^9), ``24GiB`` or ``24G`` (24 x 2^30), ``24564MiB``, ``1.5TB``, ``25769803776``.

    Args:
        text: as typed.
        flag: where it was typed, for the message.

    Raises:
        ConfigError: no number, an unknown unit, nothing, or a bare number too small to be bytes.
    """
    found = _SIZE.fullmatch(text)
    unit = found.group(2).lower() if found else ""
    if found is None or (unit and unit not in _UNITS):
        raise ConfigError(
            f"{flag} was set to {text!r}, and it takes a size: a number with a unit, such as 24GiB, 24GB, 24564MiB or "
            f"1.5TB (GB counts in 10^9 bytes, GiB in 2^30)."
        )
    size_bytes = int(float(found.group(1).replace(",", "").replace("_", "")) * _UNITS.get(unit, 1))
    if size_bytes <= 0 or (not unit and size_bytes < _LEAST_PLAIN_BYTES):
        raise ConfigError(
            f"{flag} was set to {text!r}, which is {size_bytes:,} bytes: a number without a unit is bytes, and no "
            f"memory is that small. Write {text.strip()}GiB if that was meant."
            if size_bytes
            else f"{flag} was set to {text!r}, and a size must be above 0. Leave {flag} away for the usual one."
        )
    return size_bytes


def format_bytes(size_bytes: float) -> str:
    """``24.00 GiB``, ``41.6 MiB``, ``1.4 KiB``: what people read is binary."""
    for unit, name, digits in ((10 * TIB, "TiB", 1), (GIB, "GiB", 2), (MIB, "MiB", 1)):
        if size_bytes >= unit:
            return f"{size_bytes / min(unit, TIB):.{digits}f} {name}"
    return f"{size_bytes / KIB:.1f} KiB" if size_bytes else "0"


def format_seconds(seconds: float) -> str:
    """``184 ms``, ``2.82 s``, ``5.3 min``, ``3 h 20 min``, ``2.5 days``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 120:
        return f"{minutes:.0f} min"
    if minutes < 48 * 60:
        return f"{minutes // 60:.0f} h {minutes % 60:.0f} min"
    return f"{minutes / 1440:.1f} days"
