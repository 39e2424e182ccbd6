"""CUDA source to a loaded kernel without a compiler on the machine: NVRTC and the driver through ctypes.

NVRTC comes with torch's CUDA wheels (``nvidia/cu13`` or ``nvidia/cuda_nvrtc``); the driver is there where a GPU is.
Compiled code is kept under ``$XDG_CACHE_HOME/zerofit/kernels``, named by a hash of source, options, architecture and
NVRTC's version, so that each is compiled once a machine (3 to 5 s for the selective scan).
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

#: CUfunction_attribute: percentage of the unified cache that should serve as shared memory.
_CARVEOUT = 9


class Unavailable(Exception):
    """Kernels cannot be compiled or loaded here; the message says why."""


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    tried = []
    for path in _candidates():
        # The library opens its builtins by bare name: loaded beforehand, they are found wherever they lie.
        for builtins in sorted(path.parent.glob("*nvrtc-builtins*")):
            if ".alt." not in builtins.name:
                with contextlib.suppress(OSError):
                    ctypes.CDLL(str(builtins), mode=getattr(ctypes, "RTLD_GLOBAL", 0))
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            tried.append(f"{path}: {error}")
    raise Unavailable("; ".join(tried) or "NVRTC (libnvrtc, part of torch's CUDA wheels) was not found")


def _candidates() -> Iterator[Path]:
    """libnvrtc beside torch, of torch's CUDA version first, then wherever the system finds one."""
    names = ("nvrtc64_*.dll",) if sys.platform == "win32" else ("libnvrtc.so.*", "libnvrtc-????????.so.*")
    major = (torch.version.cuda or "0").split(".")[0]
    packages = Path(torch.__file__).parent.parent
    folders = [packages / "nvidia" / f"cu{major}" / "lib", packages / "nvidia" / "cuda_nvrtc" / "lib"]
    folders += [packages / "nvidia" / f"cu{major}" / "bin", packages / "torch" / "lib"]
    if os.environ.get("CUDA_HOME"):
        folders.append(Path(os.environ["CUDA_HOME"]) / "lib64")
    for folder in folders:
        for name in names:
            yield from (p for p in sorted(folder.glob(name)) if ".alt." not in p.name)
    found = ctypes.util.find_library("nvrtc")
    if found:
        yield Path(found)


@functools.cache
def _driver() -> ctypes.CDLL:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise Unavailable(f"the NVIDIA driver's library {name} was not found: {error}") from None


def _check_nvrtc(code: int) -> None:
    if code:
        text = _nvrtc().nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        raise Unavailable(f"NVRTC: {text(code).decode()}")


def _check_driver(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise Unavailable(f"{what}: {(text.value or b'CUDA error').decode()} ({code})")


def version() -> tuple[int, int]:
    """NVRTC's version. Raises: Unavailable."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check_nvrtc(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def _supported() -> list[int]:
    count = ctypes.c_int()
    _check_nvrtc(_nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    archs = (ctypes.c_int * count.value)()
    _check_nvrtc(_nvrtc().nvrtcGetSupportedArchs(archs))
    return list(archs)


def compile_source(source: str, macros: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """Machine code for a GPU of the capability, or PTX where this NVRTC is older than the GPU.

    Raises: Unavailable, with the compiler's messages.
    """
    wanted, known = capability[0] * 10 + capability[1], _supported()
    native = wanted in known
    arch = f"sm_{wanted}" if native else f"compute_{max([a for a in known if a <= wanted], default=known[0])}"
    options = [f"-arch={arch}", "-std=c++17", *(f"-D{name}={value}" for name, value in sorted(macros.items()))]
    key = hashlib.sha256("\0".join([source, *options, str(version())]).encode()).hexdigest()
    return _cached(key, lambda: _compile(source, options, native))


def _cached(key: str, make: Callable[[], bytes]) -> bytes:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(home) / "zerofit" / "kernels" / f"{key}.bin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    code = make()
    with contextlib.suppress(OSError):  # a folder that cannot be written costs the next process a compilation
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        Path(file.name).replace(path)  # whole or not at all, also with several ranks at once
    return code


def _compile(source: str, options: list[str], native: bool) -> bytes:
    lib, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    _check_nvrtc(lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"zerofit.cu", 0, None, None))
    try:
        argv = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        if lib.nvrtcCompileProgram(program, len(options), argv):
            _check_nvrtc(lib.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            _check_nvrtc(lib.nvrtcGetProgramLog(program, log))
            raise Unavailable(f"NVRTC could not compile: {log.value.decode(errors='replace')}")
        measure, read = (lib.nvrtcGetCUBINSize, lib.nvrtcGetCUBIN) if native else (lib.nvrtcGetPTXSize, lib.nvrtcGetPTX)
        _check_nvrtc(measure(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _check_nvrtc(read(program, code))
        return code.raw
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


class Module:
    """Compiled code, loaded into the current device's context on first use; kept for the process."""

    def __init__(self, source: str, macros: Mapping[str, int], device: torch.device) -> None:
        """Args: device: an NVIDIA GPU. Raises: Unavailable."""
        self.code = compile_source(source, macros, torch.cuda.get_device_capability(device))
        self.handle = ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes the context
            _check_driver(_driver().cuModuleLoadData(ctypes.byref(self.handle), self.code), "loading a kernel")
        self.functions: dict[str, ctypes.c_void_p] = {}

    def _function(self, name: str, shared_carveout: int | None) -> ctypes.c_void_p:
        if name not in self.functions:
            function = ctypes.c_void_p()
            _check_driver(
                _driver().cuModuleGetFunction(ctypes.byref(function), self.handle, name.encode()), f"kernel {name}"
            )
            if shared_carveout is not None:
                _check_driver(_driver().cuFuncSetAttribute(function, _CARVEOUT, shared_carveout), f"kernel {name}")
            self.functions[name] = function
        return self.functions[name]

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        threads: int,
        parameters: ctypes.Structure,
        *,
        stream: int,
        shared_carveout: int | None = None,
    ) -> None:
        """Start the kernel on the stream, in the current device's context; its one argument is passed by value.

        Safe under CUDA graph capture once it has run before (the first call loads code).

        Args: shared_carveout: percentage of the unified cache wanted as shared memory; None leaves it to the driver.

        Raises: Unavailable, with the driver's words.
        """
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        _check_driver(
            _driver().cuLaunchKernel(
                self._function(name, shared_carveout), *grid, threads, 1, 1, 0, ctypes.c_void_p(stream), pointer, None
            ),
            f"launching {name} on a grid of {grid}",
        )
