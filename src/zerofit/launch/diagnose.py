"""What an exit code and a log say, in words. Pure but for reading the files it is given; imports no torch."""

from __future__ import annotations

import signal
from collections import deque
from pathlib import Path

#: Exit codes of zerofit's own, see `errors`: the worker has said why, so nobody explains them again.
OWN_EXIT_CODES = {
    2: "the request is wrong; nothing was started",
    3: "it does not fit the hardware",
    4: "interrupted after saving; the run can be resumed",
}

#: What usually stands behind a signal that nobody sent on purpose. By name: Windows has few of them.
_SIGNAL_CAUSES = {
    "SIGKILL": (
        "usually the kernel's out-of-memory killer: host RAM, or the memory limit of the container or the batch job, "
        "was exhausted"
    ),
    "SIGBUS": "usually shared memory: /dev/shm is full (containers: raise --shm-size), or a mapped file was truncated",
    "SIGSEGV": "a native library crashed: a mismatch of driver, CUDA and PyTorch, or a bug in a compiled operation",
    "SIGILL": "an instruction that this CPU does not have: an operation was compiled for another machine",
    "SIGABRT": "a native library gave up: its last lines name the failed check",
    "SIGFPE": "a native library divided by zero",
    "SIGTERM": "something outside asked it to stop: a batch system, a container runtime or a person",
    "SIGINT": "Ctrl-C",
    "SIGHUP": "its terminal was closed",
}

#: Texts by which PyTorch, CUDA and NCCL report exhausted device memory, in lower case.
_DEVICE_MEMORY_TEXTS = (
    "torch.outofmemoryerror",
    "torch.cuda.outofmemoryerror",
    "cuda out of memory",
    "cuda error: out of memory",
    "cuda driver error: out of memory",
    "cuda_error_out_of_memory",
    "cublas_status_alloc_failed",
    "cuda failure 2 'out of memory'",
)

#: Texts by which PyTorch and Python report exhausted host memory, in lower case.
_HOST_MEMORY_TEXTS = ("defaultcpuallocator: can't allocate memory", "\nmemoryerror")


def describe_exit(code: int) -> str:
    """An exit code in words; negative codes are signals, as `subprocess` counts them.

    Codes from 129 are read as a shell's "128 + signal".

    >>> describe_exit(2)
    'ended with exit code 2: the request is wrong; nothing was started'
    """
    if code in OWN_EXIT_CODES:
        return f"ended with exit code {code}: {OWN_EXIT_CODES[code]}"
    name = _signal_name(-code if code < 0 else code - 128)
    if name is None:
        return f"ended with exit code {code}"
    cause = _SIGNAL_CAUSES.get(name)
    return f"was killed by {name} ({code})" + (f": {cause}" if cause else "")


def _signal_name(number: int) -> str | None:
    try:
        return signal.Signals(number).name
    except ValueError:
        return None


def is_device_out_of_memory(text: str) -> bool:
    """Whether a log's text reports exhausted GPU memory."""
    lowered = text.lower()
    return any(sign in lowered for sign in _DEVICE_MEMORY_TEXTS)


def is_host_out_of_memory(text: str) -> bool:
    """Whether a log's text reports exhausted host memory (the kernel's killer leaves no text)."""
    lowered = "\n" + text.lower()
    return any(sign in lowered for sign in _HOST_MEMORY_TEXTS)


def tail(path: Path, lines: int = 20) -> str:
    """The last ``lines`` lines of a text file; empty when there is no such file."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return "".join(deque(file, maxlen=lines)).rstrip()
    except OSError:
        return ""


def oom_kills(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """How many processes the kernel has killed for memory in this process's control group so far.

    Reads ``memory.events`` (version 2) or ``memory.oom_control`` (version 1) of the group itself, else, in a
    container that sees its own group as the root, of the root. None where neither can be read.
    """
    for file in _oom_files(cgroups, own):
        try:
            counts = dict(line.split() for line in file.read_text(encoding="ascii").splitlines())
            return int(counts["oom_kill"])
        except (OSError, KeyError, ValueError):
            continue
    return None


def _oom_files(cgroups: Path, own: Path) -> list[Path]:
    """Candidates, the most exact first."""
    try:
        entries = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    unified = [cgroups / path.lstrip("/") / "memory.events" for _, controllers, path in entries if not controllers]
    legacy = [
        cgroups / "memory" / path.lstrip("/") / "memory.oom_control"
        for _, controllers, path in entries
        if "memory" in controllers.split(",")
    ]
    return [*unified, cgroups / "memory.events", *legacy, cgroups / "memory" / "memory.oom_control"]
