"""How much reading pictures ahead holds: for the loader, which does it, and for the planner, which says so. Pure."""

from __future__ import annotations

#: Windows that are larger wait in page-locked memory, and the engine copies each micro-batch when its turn comes.
MAX_DEVICE_BYTES_AHEAD = 512 << 20

#: Processes that copy out of the cache for a GPU. One copies 20,000 pictures/s and more; several wait for a disk at
#: the same time.
MAX_CACHE_PROCESSES = 4

#: Pictures that a process copies out of the cache, or decodes, at a time.
COPIED_TOGETHER, DECODED_TOGETHER = 128, 32


def windows_ahead(prefetch_factor: int) -> int:
    """Windows that are there at once: the one in use, those that wait, and one in the making."""
    return prefetch_factor + 2


def stays_on_host(window_bytes: int, prefetch_factor: int) -> bool:
    """Whether windows of so many bytes wait in page-locked memory instead of on the GPU."""
    return window_bytes * windows_ahead(prefetch_factor) > MAX_DEVICE_BYTES_AHEAD
