"""Exit codes and logs in words."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from zerofit.launch.diagnose import describe_exit, is_device_out_of_memory, is_host_out_of_memory, oom_kills, tail


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, ["SIGKILL (-9)", "out-of-memory killer", "host RAM"]),
        (137, ["SIGKILL (137)", "out-of-memory killer"]),
        (-7, ["SIGBUS (-7)", "/dev/shm"]),
        (-11, ["SIGSEGV (-11)", "native library"]),
        (-4, ["SIGILL (-4)", "this CPU"]),
        (-6, ["SIGABRT (-6)"]),
        (-15, ["SIGTERM (-15)", "asked it to stop"]),
        (-10, ["SIGUSR1 (-10)"]),
        (2, ["exit code 2", "request is wrong"]),
        (3, ["exit code 3", "does not fit"]),
        (4, ["exit code 4", "resumed"]),
        (1, ["ended with exit code 1"]),
        (255, ["ended with exit code 255"]),
        (-200, ["ended with exit code -200"]),
    ],
)
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals are numbered as on Linux")
def test_exit_codes_in_words(code: int, words: list[str]) -> None:
    described = describe_exit(code)
    assert all(word in described for word in words), described


@pytest.mark.parametrize(
    "text",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …",
        "torch.cuda.OutOfMemoryError: Allocation on device",
        "RuntimeError: CUDA error: out of memory",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "ncclUnhandledCudaError: Call to CUDA function failed.\nCuda failure 2 'out of memory'",
    ],
)
def test_exhausted_device_memory_is_recognised(text: str) -> None:
    assert is_device_out_of_memory(f"Traceback (most recent call last):\n{text}\n")


def test_host_memory_is_not_device_memory() -> None:
    host = "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    assert is_host_out_of_memory(host)
    assert is_host_out_of_memory("Traceback (most recent call last):\nMemoryError")
    assert not is_device_out_of_memory(host)


def test_a_word_about_memory_is_not_an_error() -> None:
    harmless = "step 1: gpu memory 3.1 GiB; will not run out of memory; caught no MemoryError so far"
    assert not is_device_out_of_memory(harmless)
    assert not is_host_out_of_memory(harmless)


def test_tail_gives_the_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"first\nsecond\n\xff third\n\n")
    assert tail(log, 3) == "second\n\ufffd third"
    assert tail(log, 1) == ""
    assert tail(tmp_path / "absent") == ""


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")
    return path


def test_oom_kills_of_the_own_group(tmp_path: Path) -> None:
    own = _write(tmp_path / "own", "0::/job/step\n")
    _write(tmp_path / "fs/memory.events", "low 0\noom_kill 7\n")
    _write(tmp_path / "fs/job/step/memory.events", "low 0\noom 4\noom_kill 2\noom_group_kill 0\n")
    assert oom_kills(tmp_path / "fs", own) == 2


def test_oom_kills_of_a_container_that_sees_its_group_as_the_root(tmp_path: Path) -> None:
    own = _write(tmp_path / "own", "0::/docker/abc\n")
    _write(tmp_path / "fs/memory.events", "oom_kill 7\n")
    assert oom_kills(tmp_path / "fs", own) == 7


def test_oom_kills_under_version_1(tmp_path: Path) -> None:
    own = _write(tmp_path / "own", "5:cpu,cpuacct:/job\n4:memory:/job\n")
    _write(tmp_path / "fs/memory/job/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert oom_kills(tmp_path / "fs", own) == 3


def test_oom_kills_unknown(tmp_path: Path) -> None:
    assert oom_kills(tmp_path, tmp_path / "absent") is None
    assert oom_kills(tmp_path, _write(tmp_path / "own", "0::/\n")) is None
