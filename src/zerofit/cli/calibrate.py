"""``zerofit plan --calibrate``: measure this machine's GPUs once, and remember."""

from __future__ import annotations

import json
from datetime import date

from rich.console import Console

from ..errors import ConfigError, ZerofitError
from ..launch.trials import Trial, TrialResult, run_trial
from ..planning.calibration import Calibration, store_calibration
from ..planning.gpus import GpuKind
from ..planning.hardware import Hardware, probe
from ..planning.sizes import format_bytes
from .plan_arguments import PlanRequest

#: Context, products, copies and collectives take some ten seconds; a first NCCL start may take longer.
TIME_LIMIT_SECONDS = 300.0


def run_calibrate(request: PlanRequest) -> None:
    """Measure all visible GPUs at once and store the figures of their kind.

    Raises:
        ConfigError: no GPU, GPUs of several kinds or of none that zerofit knows, or other flags.
        ZerofitError: a process failed.
    """
    as_json, rest = "--json" in request.rest, [part for part in request.rest if part != "--json"]
    if rest or request.described or request.switches != {"calibrate"}:
        raise ConfigError(
            "`zerofit plan --calibrate` measures the GPUs that are here and takes --json only. Leave the rest away."
        )
    hardware = probe()
    kind = _kind(hardware)
    free = hardware.gpus[0].free_bytes
    trial = Trial("zerofit.launch.rates_trial", [str(free)], len(hardware.gpus), TIME_LIMIT_SECONDS)
    measured = calibration_from(run_trial(trial), kind.key, len(hardware.gpus))
    path = store_calibration(measured)
    if as_json:
        print(json.dumps({**measured.model_dump(mode="json"), "path": str(path)}))
    else:
        _show(Console(), measured, str(path))


def _kind(hardware: Hardware) -> GpuKind:
    kinds = {gpu.kind for gpu in hardware.gpus}
    kind = next(iter(kinds), None)
    if not hardware.gpus:
        raise ConfigError(
            "`zerofit plan --calibrate` measures GPUs, and no NVIDIA GPU is visible here. Check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES."
        )
    if kind is None or len(kinds) > 1:
        names = ", ".join(sorted({gpu.name for gpu in hardware.gpus}))
        raise ConfigError(
            f"`zerofit plan --calibrate` measures one kind of GPU that zerofit's table knows, and found {names}. Take "
            f"GPUs of one kind with CUDA_VISIBLE_DEVICES."
        )
    return kind


def calibration_from(outcome: TrialResult, kind: str, gpus: int) -> Calibration:
    """The trial's figures as a calibration.

    Raises:
        ZerofitError: the trial did not end well; its log's end is in the message.
    """
    if outcome.status != "ok" or outcome.result is None:
        raise ZerofitError(
            f"Calibrating {kind} {outcome.status} after {outcome.seconds:.0f} s, and nothing was stored. Its output "
            f"ends:\n{outcome.log_tail}"
        )
    known = {name: value for name, value in outcome.result.items() if name in Calibration.model_fields}
    source = f"measured here on {gpus} x {outcome.result['device']}, {date.today()}, torch {outcome.result['torch']}"
    return Calibration(kind=kind, source=source, **known)


def _show(console: Console, measured: Calibration, path: str) -> None:
    console.print(f"{measured.source}:", highlight=False)
    for name, value in measured.model_dump(exclude={"kind", "source"}, exclude_none=True).items():
        shown = format_bytes(value) if name.endswith("_bytes") else f"{value / (1e12 if 'flops' in name else 1e9):,.0f}"
        unit = "" if name.endswith("_bytes") else " TFLOP/s" if "flops" in name else " GB/s"
        console.print(f"  {name:20} {shown}{unit}", highlight=False)
    console.print(f"Stored in {path}; the planner uses it from now on.", highlight=False, soft_wrap=True)
