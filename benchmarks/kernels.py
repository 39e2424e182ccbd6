"""The kernels on one GPU: errors against float64 first, then times, beside mamba_ssm's CUDA kernel in the same run.

    python benchmarks/kernels.py [--peer FOLDER] [--out FILE] [--groups check,scan,tune,parts]

``--peer`` names a folder with ``peer.so``: the other kernel behind C functions ``peer_forward`` and ``peer_backward``
(`_Shape`, `_Pointers` and a stream; channels first). Without it the other rows are measured all the same.
Every case runs in a process of its own with a time limit, so that one which fails costs
its own rows. Times are medians over CUDA events; data at the large shapes is several times the L2 cache.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zerofit.kernels import causal_conv, head_loss, nvrtc, rms_norm, selective_scan_cuda, selective_scan_torch
from zerofit.kernels.selective_scan_cuda import Variant

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias", "z")
#: batch, length, d_inner, d_state
SHAPES = {
    "B1 L4096 D9728": (1, 4096, 9728, 16),
    "B4 L2048 D4096": (4, 2048, 4096, 16),
    "B1 L4096 D1536": (1, 4096, 1536, 16),
}
CHECKS = [
    (2, 100, 32, 16), (1, 333, 40, 16), (3, 65, 7, 16), (1, 1, 5, 16), (2, 130, 36, 8), (1, 200, 24, 32),
    (2, 70, 20, 64), (1, 90, 12, 24), (1, 77, 17, 10), (1, 128, 64, 1), (2, 2048, 64, 16),
]  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Named f or b, then channels x states of a lane, tile, and unrolling or steps held in registers; p: B and C packed.
FORWARD = {
    f"f{c}x{s}t{t}u{u}{'p' if p else ''}": Variant(channels=c, states=s, tile=t, unroll=u, min_blocks=m, pack=p)
    for c, s, t, u, m, p in [
        (1, 4, 16, 4, 16, True), (1, 4, 32, 2, 16, True), (1, 4, 16, 2, 16, False), (2, 4, 16, 2, 12, False),
        (2, 4, 16, 2, 12, True), (2, 2, 32, 2, 16, True),
    ]
}  # fmt: skip
BACKWARD = {
    f"b{c}x{s}t{t}r{r}{'p' if p else ''}": Variant(channels=c, states=s, tile=t, span=r, min_blocks=m, unroll=u, pack=p)
    for c, s, t, r, m, u, p in [
        (2, 4, 16, 4, 8, 2, False), (2, 4, 16, 4, 8, 2, True), (1, 4, 16, 8, 12, 2, False), (2, 2, 16, 4, 12, 2, False),
    ]
}  # fmt: skip


def inputs(batch: int, length: int, width: int, states: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias, and a gradient; u and z halves of one tensor, B and C slices of another."""
    torch.manual_seed(seed)
    both = torch.randn(batch, length, 2 * width, device="cuda").to(dtype)
    projection = torch.randn(batch, length, 16 + 2 * states, device="cuda").to(dtype)
    delta = (0.5 * torch.randn(batch, length, width, device="cuda")).to(dtype)
    A = -2 * torch.rand(width, states, device="cuda") - 0.1
    D, bias = torch.randn(width, device="cuda"), 0.5 * torch.randn(width, device="cuda") - 1
    grad = torch.randn(batch, length, width, device="cuda").to(dtype)
    u, z = both[..., :width], both[..., width:]
    return [u, delta, A, projection[..., 16 : 16 + states], projection[..., 16 + states :], D, z, bias, grad]


def truth(given: list[Tensor]) -> list[Tensor]:
    """Output and gradients in float64, by the blocked PyTorch path (which the tests hold to the definition)."""
    u, delta, A, B, C, D, z, bias, grad = (x.double() for x in given)
    out, states, _ = selective_scan_torch.forward(u, delta, A, B, C, D, z, bias)
    return [out, *selective_scan_torch.backward(grad, u, delta, A, B, C, D, z, bias, states)]


def ours(
    given: list[Tensor], front: Variant | None = None, back: Variant | None = None, fixed: bool = False
) -> list[Tensor]:
    *a, grad = given
    out, states = selective_scan_cuda.forward(*a, variant=front)
    return [out, *selective_scan_cuda.backward(grad, *a, states, fixed, variant=back)]


def errors(found: list[Tensor], true: list[Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm, for the output and each gradient."""
    pairs = zip(("out", *NAMES), found, true, strict=True)
    return {n: float((x.double() - y).norm() / y.norm().clamp(min=1e-30)) for n, x, y in pairs}


def milliseconds(f: Callable[[], Any], repeats: int = 20) -> float:
    """Median over runs, after three to warm up."""
    for _ in range(3):
        f()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for first, last in events:
        first.record()
        f()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in events)


def replayed(f: Callable[[], Any]) -> float:
    """Milliseconds of GPU work alone: the call is captured into a CUDA graph, and its replays are timed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        f()
    return milliseconds(graph.replay)


CLOCKS = {"ms": milliseconds, "gpu_ms": replayed}


def rows_check(_: Any) -> Iterator[dict[str, Any]]:
    for shape in CHECKS:
        for name, dtype in DTYPES.items():
            given = inputs(*shape, dtype)
            found = errors(ours(given), truth(given))
            yield {"shape": shape, "dtype": name, "worst": max(found.values()), "errors": found}
    given = inputs(2, 300, 48, 16, torch.bfloat16)
    first, second = (ours(given, fixed=True) for _ in range(2))
    yield {"what": "deterministic", "equal": all(bool((x == y).all()) for x, y in zip(first, second, strict=True)),
           "worst": max(errors(first, truth(given)).values())}  # fmt: skip
    for name, index, value in [
        ("delta 60", 1, 60.0),
        ("delta -60", 1, -60.0),
        ("A -1e4", 2, -1e4),
        ("z -200", 6, -200.0),
    ]:
        given = inputs(2, 90, 48, 16, torch.float32)
        given[index] = torch.full_like(given[index], value)
        found, true = ours(given), truth(given)
        finite = all(bool(x.isfinite().all()) for x in found)
        worst = max(
            float((x - y).abs().max() / y.abs().max().clamp(min=1e-20)) for x, y in zip(found, true, strict=True)
        )
        yield {"what": name, "finite": finite, "worst": worst}
    for chunk in (64, 128):
        given = inputs(2, 300, 48, 16, torch.float32)
        wide, narrow, back = (replace(v, chunk=chunk) for v in selective_scan_cuda.variants(16))
        for front in (wide, narrow):
            worst = max(errors(ours(given, front, back), truth(given)).values())
            yield {"what": f"chunks of {chunk}, {front.channels} channels a lane forward", "worst": worst}


def rows_large(names: list[str]) -> Iterator[dict[str, Any]]:
    for name in names:
        given = inputs(*SHAPES[name], torch.bfloat16)
        found = errors(ours(given), truth(given))
        yield {"shape": name, "worst": max(found.values()), "errors": found}


def rows_scan(_: Any) -> Iterator[dict[str, Any]]:
    """The launcher as the operators call it, allocations included, and the GPU's work alone."""
    for name, shape in SHAPES.items():
        given = inputs(*shape, torch.bfloat16)
        *a, grad = given
        _, states = selective_scan_cuda.forward(*a)
        for fixed in (False, True):
            calls = {
                "forward": lambda a=a: selective_scan_cuda.forward(*a),
                "backward": lambda a=a, g=grad, s=states, d=fixed: selective_scan_cuda.backward(g, *a, s, d),
            }
            yield {
                "shape": name, "deterministic": fixed,
                **{f"{way}_{kind}": clock(f) for way, f in calls.items() for kind, clock in CLOCKS.items()},
            }  # fmt: skip


def rows_tune(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One variant at all shapes, in one to eleven chunks of time; GPU time alone."""
    variant: Variant = case["variant"]
    front, back = (variant, None) if case["way"] == "forward" else (None, variant)
    worst = 0.0
    for shape, dtype in (((2, 333, 40, 16), torch.float32), ((1, 200, 256, 16), torch.bfloat16)):
        given = inputs(*shape, dtype)
        found = errors(ours(given, front, back), truth(given))
        worst = max(worst, max(found.values()) / (4e-3 if dtype == torch.bfloat16 else 2e-6))
    for name, shape in SHAPES.items():
        given = inputs(*shape, torch.bfloat16)
        *a, grad = given
        _, states = selective_scan_cuda.forward(*a)
        intervals = shape[1] // selective_scan_torch.STATE_INTERVAL
        for parts in (1, 2, 3, 5, 7, 11):
            v = replace(variant, chunk=-(-intervals // parts) * selective_scan_torch.STATE_INTERVAL)
            if case["way"] == "forward":
                ms = replayed(lambda a=a, v=v: selective_scan_cuda.forward(*a, variant=v))
            else:
                ms = replayed(
                    lambda a=a, v=v, g=grad, s=states: selective_scan_cuda.backward(g, *a, s, False, variant=v)
                )
            yield {"shape": name, "parts": parts, "ms": ms, "error_over_limit": worst}


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("batch", "dim", "length", "states")]


class _Pointers(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in [
            "u",
            "delta",
            "A",
            "B",
            "C",
            "D",
            "bias",
            "z",
            "out",
            "x",
            "out_z",
            "dout",
            "du",
            "ddelta",
            "dA",
            "dB",
            "dC",
            "dD",
            "dbias",
            "dz",
        ]
    ]


def rows_peer(folder: str) -> Iterator[dict[str, Any]]:
    library = ctypes.CDLL(str(Path(folder) / "peer.so"))
    for name, (batch, length, width, n) in {"error": (2, 2048, 64, 16), **SHAPES}.items():
        given = inputs(batch, length, width, n, torch.bfloat16)
        turned = [x.transpose(1, 2).contiguous() if x.dim() == 3 else x for x in given]
        u, delta, A, B, C, D, z, bias, grad = turned
        held = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "bias": bias, "z": z, "dout": grad}
        held |= {key: torch.empty_like(u) for key in ("out", "out_z", "du", "ddelta", "dz")}
        held["x"] = torch.empty(batch, width, -(-length // 2048), 2 * n, device="cuda")
        sums = {"dA": A, "dB": B, "dC": C, "dD": D, "dbias": bias}
        held |= {key: torch.zeros_like(x, dtype=torch.float32) for key, x in sums.items()}
        pointers = _Pointers(**{key: x.data_ptr() for key, x in held.items()})
        shape, stream = _Shape(batch, width, length, n), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

        def call(which: str, held=held, shape=shape, pointers=pointers, stream=stream) -> None:
            if which == "peer_backward":  # as its operator does
                for key in ("dA", "dB", "dC", "dD", "dbias"):
                    held[key].zero_()
            if code := getattr(library, which)(shape, ctypes.byref(pointers), stream):
                raise RuntimeError(f"{which}: CUDA error {code}")

        call("peer_forward")
        call("peer_backward")
        if name == "error":
            keys = ("out_z", "du", "ddelta", "dA", "dB", "dC", "dD", "dbias", "dz")
            found = [held[k].transpose(1, 2) if held[k].dim() == 3 else held[k] for k in keys]
            mine, true = ours(given), truth(given)
            yield {"shape": name, "peer": errors(found, true), "ours": errors(mine, true)}
            continue
        yield {"shape": name, "forward_ms": milliseconds(lambda c=call: c("peer_forward")),
               "backward_ms": milliseconds(lambda c=call: c("peer_backward"))}  # fmt: skip


def rows_parts(_: Any) -> Iterator[dict[str, Any]]:
    """Convolution, norm and loss of the 7B's block: fused, and as separate PyTorch operations."""
    torch.manual_seed(0)
    warnings.simplefilter("default")  # autograd under graph capture warns of streams

    def both(f: Callable[..., Tensor], *x: Tensor) -> dict[str, float]:
        """Forward, and forward with backward: as called, and the GPU's work alone."""
        grad = torch.ones_like(f(*x))

        def trained() -> None:
            given = [t.detach().requires_grad_() for t in x]
            torch.autograd.grad(f(*given), given, grad)

        rows = {"forward": lambda: f(*x), "both": trained}
        return {f"{way}_{kind}": clock(g) for way, g in rows.items() for kind, clock in CLOCKS.items()}

    x = torch.randn(1, 4096, 2 * 9728, device="cuda", dtype=torch.bfloat16)[..., :9728]
    weight, bias = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((9728, 4), (9728,)))

    def separate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=9728)[..., :4096]
        return F.silu(y).transpose(1, 2)

    true = separate(x.double(), weight.double(), bias.double())
    found = causal_conv.causal_conv_silu(x, weight, bias)
    yield {"what": "conv+silu fused", "times": both(causal_conv.causal_conv_silu, x, weight, bias),
           "error": float((found - true).norm() / true.norm())}  # fmt: skip
    yield {"what": "conv+silu separate", "times": both(separate, x, weight, bias)}
    grad = torch.randn_like(found)
    dx, dw, db = torch.ops.zerofit.causal_conv_silu_backward(grad, x, weight, bias)
    tx, tw, tb = causal_conv.torch_backward(grad.double(), x.double(), weight.double(), bias.double())
    yield {
        "what": "conv gradients",
        "error": max(float((a - b).norm() / b.norm()) for a, b in ((dx, tx), (dw, tw), (db, tb))),
    }
    h, r = (torch.randn(1, 4096, 4864, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    w = torch.randn(4864, device="cuda", dtype=torch.bfloat16)
    exact = rms_norm.torch_forward((h + r).double(), w.double(), 1e-5, torch.float64)
    yield {"what": "add+norm fused", "times": both(lambda *t: rms_norm.add_rms_norm(*t, 1e-5)[0], h, r, w),
           "error": float((rms_norm.add_rms_norm(h, r, w, 1e-5)[0] - exact).norm() / exact.norm())}  # fmt: skip
    yield {"what": "add+norm separate", "times": both(lambda h, r, w: F.rms_norm(h + r, (4864,), w, 1e-5), h, r, w)}
    tokens, table = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((4096, 4864), (50304, 4864)))
    table = 0.02 * table
    targets = torch.randint(0, 50257, (4096,), device="cuda")

    def fused(tokens: Tensor, table: Tensor, chunk: int) -> tuple[float, float]:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        given = [t.detach().requires_grad_() for t in (tokens, table)]

        def run() -> None:
            loss = head_loss.linear_cross_entropy(*given, targets, vocab_size=50257, chunk_tokens=chunk)
            torch.autograd.grad(loss, given)

        return milliseconds(run, 8), (torch.cuda.max_memory_allocated() - before) / 2**20

    def plain() -> None:
        given = [t.detach().requires_grad_() for t in (tokens, table)]
        logits = F.linear(given[0], given[1])[:, :50257].float()
        torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), given)

    for chunk in (512, 1024, 2048, 4096):
        ms, mib = fused(tokens, table, chunk)
        yield {"what": f"head+loss, chunks of {chunk}", "ms": ms, "peak_mib": mib}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ms = milliseconds(plain, 8)
    yield {"what": "head+loss separate", "ms": ms, "peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
    mine = head_loss.linear_cross_entropy(tokens, table, targets, vocab_size=50257)
    whole = F.cross_entropy(F.linear(tokens, table)[:, :50257].float(), targets, reduction="sum")
    yield {"what": "head+loss difference", "error": float((mine - whole).abs() / whole)}


def _child(pipe: Any, rows: Callable[[Any], Iterator[dict[str, Any]]], argument: Any) -> None:
    try:
        for row in rows(argument):
            pipe.send(row)
    except Exception as error:
        pipe.send({"failed": f"{type(error).__name__}: {str(error)[:1500]}"})
    pipe.close()


def isolated(
    label: str, rows: Callable[[Any], Iterator[dict[str, Any]]], argument: Any, limit_s: float
) -> list[dict[str, Any]]:
    """The rows of one case from a process of its own (forked before CUDA is touched here); what it had at the limit."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(send, rows, argument))
    process.start()
    send.close()
    found, end = [], time.monotonic() + limit_s
    while True:
        if not receive.poll(max(0.0, end - time.monotonic())):
            found.append({"failed": f"no answer within {limit_s:.0f} s"})
            process.kill()
            break
        try:
            found.append({"case": label, **receive.recv()})
        except EOFError:
            break
    process.join()
    for row in found:
        print(json.dumps({k: v for k, v in row.items() if k not in ("errors",)}, default=str), flush=True)
    return found


def _compile(argument: tuple[Any, ...]) -> None:
    capability, dtype, n, variant, vector, back = argument
    try:
        nvrtc.compile_source(
            selective_scan_cuda.source(),
            selective_scan_cuda.macros(dtype, n, variant, vector, True, back, False),
            capability,
        )
    except nvrtc.Unavailable as error:
        print(variant, error, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="folder with peer.so")
    parser.add_argument("--out", type=Path, help="JSON file for all rows")
    parser.add_argument("--groups", default="check,scan,parts", help="of check, scan, tune, parts")
    parser.add_argument(
        "--tune", default="", help="only variants whose names start with one of these (comma-separated)"
    )
    options = parser.parse_args()
    groups, results = options.groups.split(","), []
    warnings.simplefilter("error")
    if "tune" in groups:
        wanted = [t for t in options.tune.split(",") if t]
        variants = {k: v for k, v in (FORWARD | BACKWARD).items() if not wanted or any(k.startswith(w) for w in wanted)}
        work = [
            ((9, 0), dtype, 16, v, True, name.startswith("b"))
            for name, v in variants.items()
            for dtype in (torch.bfloat16, torch.float32)
        ]
        with multiprocessing.get_context("fork").Pool(16) as pool:
            pool.map(_compile, work, chunksize=1)
    if "check" in groups:
        results += isolated("check", rows_check, None, 120)
        results += isolated("large", rows_large, list(SHAPES), 60)
    if "scan" in groups:
        if options.peer:
            results += isolated("peer", rows_peer, options.peer, 180)
        results += isolated("scan", rows_scan, None, 60)
    if "tune" in groups:
        for name, variant in variants.items():
            case = {"variant": variant, "way": "forward" if name.startswith("f") else "backward"}
            results += isolated(name, rows_tune, case, 25)
    if "parts" in groups:
        results += isolated("parts", rows_parts, None, 60)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1, default=str))


if __name__ == "__main__":
    main()
