"""The CUDA source of the selective scan on a CPU: compiled by a C++ compiler, its lanes run as fibres (cuda_on_cpu.h).

The launcher is the product's own; only compiling, loading and launching are replaced. So indices, masks, reductions,
padding, chunks and the structure of parameters are checked where there is no GPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from test_kernels_selective_scan import NAMES, make
from zerofit.kernels import nvrtc, selective_scan_torch
from zerofit.kernels import selective_scan_cuda as cuda
from zerofit.kernels.selective_scan_cuda import Variant

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
ENTRY = """
extern "C" void run(const char *name, const Params *p, unsigned gx, unsigned gy, unsigned threads) {
  const struct { const char *name; void (*kernel)(const Params); } kernels[] = {
    {"scan_chunk_WAY", scan_chunk_WAY}, {"scan_chain_WAY", scan_chain_WAY}, {"scan_WAY", scan_WAY}};
  for (auto &k : kernels) if (!std::strcmp(k.name, name)) launch<Params>(k.kernel, *p, gx, gy, threads);
}
"""


class HostModule:
    """Takes the place of `nvrtc.Module`."""

    folder: Path
    libraries: dict[str, ctypes.CDLL] = {}  # noqa: RUF012

    def __init__(self, source: str, macros: Mapping[str, int], device: torch.device) -> None:
        name = "".join(f"-{value}" for value in macros.values())
        if name not in self.libraries:
            path = self.folder / f"kernel{name}.cpp"
            way = "backward" if macros["BACKWARD"] else "forward"
            path.write_text(f'#include "cuda_on_cpu.h"\n{source}\n{ENTRY.replace("WAY", way)}')
            flags = [f"-D{key}={value}" for key, value in macros.items()]
            options = [
                "-std=c++17",
                "-O1",
                "-fno-strict-aliasing",
                "-w",
                "-shared",
                "-fPIC",
                f"-I{Path(__file__).parent}",
            ]
            library = path.with_suffix(".so")
            subprocess.run([str(COMPILER), *options, *flags, str(path), "-o", str(library)], check=True)
            self.libraries[name] = ctypes.CDLL(str(library))
        self.library = self.libraries[name]

    def launch(
        self, name: str, grid: tuple[int, int, int], threads: int, parameters: ctypes.Structure, **_: Any
    ) -> None:
        self.library.run(name.encode(), ctypes.byref(parameters), grid[0], grid[1], threads)


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    HostModule.folder = tmp_path_factory.mktemp("kernels")

    class Guard:
        def __init__(self, _: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: Any) -> None: ...

    class Stream:
        cuda_stream = 0

    class Properties:
        multi_processor_count, shared_memory_per_multiprocessor = 132, 228 * 1024

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "Module", HostModule)
        patch.setattr(torch.cuda, "device", Guard)
        patch.setattr(torch.cuda, "current_stream", lambda *_: Stream)
        patch.setattr(torch.cuda, "get_device_properties", lambda *_: Properties)
        cuda._module.cache_clear()
        yield
        cuda._module.cache_clear()


def worst(
    inputs: dict[str, Any], front: Variant | None = None, back: Variant | None = None, fixed: bool = False
) -> float:
    """Largest relative error of the output and all gradients, against the blocked PyTorch path in float64."""
    args = [inputs[name] for name in NAMES]
    grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(3)).to(args[0].dtype)
    out, states = cuda.forward(*args, variant=front)
    found = [out, *cuda.backward(grad, *args, states, fixed, variant=back)]
    wide = [None if x is None else x.double() for x in args]
    true_out, true_states, _ = selective_scan_torch.forward(*wide)
    true: list[Tensor] = [true_out, *selective_scan_torch.backward(grad.double(), *wide, true_states)]
    torch.testing.assert_close(states.double(), true_states, rtol=1e-4, atol=1e-5)
    return max(float((x.double() - y).norm() / y.norm().clamp(min=1e-30)) for x, y in zip(found, true, strict=True))


LONG = [pytest.param(*shape, marks=pytest.mark.long) for shape in [(1, 33, 7, 8), (1, 21, 5, 64), (1, 1, 3, 10)]]


@pytest.mark.parametrize(("batch", "length", "width", "states"), [(2, 70, 40, 16), (1, 20, 9, 24), *LONG])
def test_shapes(batch: int, length: int, width: int, states: int) -> None:
    assert worst(make(batch, length, width, states)) < 2e-6


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
def test_half_types_without_a_gate(dtype: torch.dtype, limit: float) -> None:
    inputs: dict[str, Any] = make(1, 40, 32, 16, dtype)
    inputs["z"] = None
    assert worst(inputs, fixed=True) < limit


def test_chunks_of_time_and_a_fixed_order() -> None:
    inputs = make(2, 200, 40, 16, torch.bfloat16)
    wide, narrow, back = cuda.variants(16)
    assert worst(inputs, replace(wide, chunk=64), replace(back, chunk=64)) < 4e-3
    assert worst(inputs, replace(narrow, chunk=128), replace(back, chunk=128), fixed=True) < 4e-3


def test_the_kernels_for_few_units_and_for_small_shared_memory() -> None:
    _, narrow, back = cuda.variants(16, 100 * 1024)
    assert worst(make(1, 70, 24, 16), narrow, back) < 2e-6


def test_how_the_work_is_spread() -> None:
    """The three measured shapes get what measured fastest: see docs/kernels.md."""
    found = {}
    for shape in ((1, 4096, 9728), (4, 2048, 4096), (1, 4096, 1536), (1, 100, 64)):
        front, back = cuda.chosen(torch.empty(shape, device="meta"), torch.empty(shape[2], 16, device="meta"))
        found[shape] = [(v.channels, -(-shape[1] // v.chunk)) for v in (front, back)]
    assert found == {
        (1, 4096, 9728): [(1, 1), (2, 5)],
        (4, 2048, 4096): [(2, 1), (2, 1)],
        (1, 4096, 1536): [(2, 11), (2, 11)],
        (1, 100, 64): [(1, 1), (2, 1)],
    }
