"""What one GPU does during a few steps, from torch's profiler; for the benchmarks beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def profiled(step: Callable[[], object], steps: int = 2) -> dict[str, Any]:
    """Milliseconds of a step in which this rank's GPU computes, communicates, copies from or to the host, computes and
    communicates at once, or does nothing; and its kernels that take longest."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    spans: dict[str, list[tuple[float, float]]] = {"computing": [], "communicating": [], "copying": []}
    totals: dict[str, float] = {}
    for event in found.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.device_type() != torch.autograd.DeviceType.CUDA or event.duration_ns() <= 0:
            continue
        if getattr(event, "is_user_annotation", lambda: False)():
            continue  # a range that a library marked, not a kernel
        name, start, milliseconds = event.name(), event.start_ns() / 1e6, event.duration_ns() / 1e6
        kind = "communicating" if "nccl" in name.lower() else "copying" if _of_host(name) else "computing"
        spans[kind].append((start, start + milliseconds))
        totals[name[:60]] = totals.get(name[:60], 0.0) + milliseconds / steps
    everything = [span for some in spans.values() for span in some]
    length = (max(stop for _, stop in everything) - min(start for start, _ in everything)) / steps
    told = {kind: covered(some) / steps for kind, some in spans.items()}
    working = covered(spans["computing"] + spans["communicating"]) / steps
    told["both"] = told["computing"] + told["communicating"] - working
    return {
        "profile_ms": {"step": length, **told, "idle": length - covered(everything) / steps},
        "kernels_ms": dict(sorted(totals.items(), key=lambda item: -item[1])[:25]),
    }


def _of_host(name: str) -> bool:
    return name.startswith("Memcpy") and "DtoD" not in name


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union."""
    total, until = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total
