"""What planning remembers: traces of models and finished predictions. Imports torch only to trace.

Traces of the presets are shipped in ``traces/``; others are made once and kept in the user's cache folder
(``XDG_CACHE_HOME/zerofit``), as are predictions, so that a search repeated needs neither torch nor time. Both are
keyed by the source files that they follow from: a changed model or engine model makes its own.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..config.models import Recomputation
from ..config.schema import Precision
from .plan import Plan
from .template import FORMAT, Template, from_json

SHIPPED = Path(__file__).with_name("traces")
#: A traced model has at most so many blocks; see `trace.DEPTH`.
TRACED_DEPTH = 4
#: Templates of this process, by key.
_LOADED: dict[str, Template] = {}
_TRACERS = ("template.py", "trace.py", "trace_between.py", "trace_compiled.py")
#: Architecture -> files beside its own whose operators decide what its trace says.
_MORE_SOURCES = {
    "mamba": (
        "recompute.py",
        *(f"../kernels/{name}.py" for name in ("selective_scan", "selective_scan_torch", "causal_conv", "rms_norm")),
        "../kernels/head_loss.py",
    ),
    "resnet": ("batch_norm.py",),
    "timm": ("batch_norm.py", "classification.py", "timm_buffers.py"),
}
#: Architectures whose loss waits for the backward pass in fp16 (`kernels.head_loss`).
_FP16_DIFFERS = ("mamba",)


@dataclass(frozen=True)
class TraceKey:
    """What a trace depends on, torch aside.

    Attributes:
        model: the config, with no more blocks than are traced.
        element_bytes: of the compute type; bf16 and fp16 allocate the same but in architectures of `_FP16_DIFFERS`.
        recompute: the kind of blocks: what is recomputed in the backward pass; None keeps all activations.
        compiled: with `ModelSpec.compiled_units` compiled.
        device: ``cuda`` or ``cpu``.
        offloaded: inputs of recomputed blocks lie in host memory.
        every: every n-th block is recomputed, where blocks differ and are all traced (`ModelShape.blocks_alike`).
        frozen: with the head alone trained.
        fp16: with fp16's own order of events, see `_FP16_DIFFERS`.
        between: cut at its blocks where it is compiled as a whole: FSDP2, see `trace_between`.
    """

    model: Mapping[str, Any]
    element_bytes: int
    recompute: Recomputation | None
    compiled: bool
    device: str
    offloaded: bool = False
    every: int = 1
    frozen: bool = False
    fp16: bool = False
    between: bool = False

    @property
    def text(self) -> str:
        """Hexadecimal; the same for the same model source."""
        data = {**asdict(self), "format": FORMAT, "source": _sources(self.model["kind"])}
        for field in ("frozen", "fp16", "between"):
            if not data[field]:
                del data[field]
        return _hash(json.dumps(data, sort_keys=True))


def trace_key(plan: Plan, *, recompute: bool) -> TraceKey:
    """The trace that a plan needs for one kind of its blocks: those that are recomputed, or the others."""
    shallow = plan.model.with_depth(min(plan.model.depth, TRACED_DEPTH))
    weights = {"weights_from", "pretrained", "freeze_epochs"}  # where they come from changes no size
    return TraceKey(
        shallow.model_dump(mode="json", exclude=weights),
        2 if plan.mixed else 4,
        plan.recomputation if recompute else None,
        plan.compile,
        plan.device,
        offloaded=recompute and plan.activation_offload == "cpu" and plan.device == "cuda",
        every=plan.activation_checkpointing_every if recompute and not plan.model.blocks_alike else 1,
        frozen=plan.frozen,
        fp16=plan.precision == "fp16" and plan.model.kind in _FP16_DIFFERS,
        between=plan.compile and plan.strategy == "fsdp2" and not recompute and not plan.model.blocks_alike,
    )


def template(plan: Plan, *, recompute: bool) -> Template:
    """Shipped, cached, or traced now.

    Raises:
        TraceError: the model cannot be traced (and torch is imported by then).
    """
    key = trace_key(plan, recompute=recompute)
    text = key.text
    if text not in _LOADED:
        found = _shipped(text) or _cached(text)
        _LOADED[text] = from_json(found) if found is not None else _traced(plan, key)
    return _LOADED[text]


def trace_now(plan: Plan, key: TraceKey) -> Template:
    """Trace, whatever is stored. Imports torch.

    Raises:
        TraceError: see `trace.trace_template`.
    """
    from ..models import model_spec
    from .trace import trace_template

    precision: Precision = "fp16" if key.fp16 else "bf16" if key.element_bytes == 2 else "fp32"
    return trace_template(
        model_spec(plan.model.kind),
        plan.model,
        precision=precision,
        recompute=key.recompute,
        compiled=key.compiled,
        device=key.device,
        offloaded=key.offloaded,
        every=key.every,
        trained=plan.trained_shapes() if key.frozen else None,
        between=key.between,
    )


def _traced(plan: Plan, key: TraceKey) -> Template:
    made = trace_now(plan, key)
    _write(_cache_path(key.text), made.json())
    return made


@functools.cache
def _shipped_files() -> dict[str, Path]:
    """Key -> file. A file is named after its key."""
    return {path.stem.rpartition("-")[2]: path for path in SHIPPED.glob("*.json")}


def _shipped(text: str) -> Any:
    path = _shipped_files().get(text)
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))


def _cached(text: str) -> Any:
    try:
        return json.loads(_cache_path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, not readable, or torn: it is made again
        return None


def cache_folder() -> Path:
    """The user's; nothing in it is needed."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zerofit"


def remembered(what: str, data: Any, make: Callable[[], Any]) -> Any:
    """JSON data that follows from `data`: from the cache folder, or made now and kept there."""
    path = cache_folder() / f"{what}-{_hash(json.dumps(data, sort_keys=True, default=str))}.json"
    with suppress(OSError, ValueError):  # not there, not readable, or torn: it is made again
        return json.loads(path.read_text(encoding="utf-8"))
    made = make()
    _write(path, made)
    return made


def _cache_path(text: str) -> Path:
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = "none"
    return cache_folder() / f"trace-{text}-{torch_version}.json"


def _write(path: Path, data: Any) -> None:
    """Whole or not at all; a folder that cannot be written is no error."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")
        unfinished.replace(path)


def _sources(kind: str) -> str:
    """Hash of the files that decide what a trace says: the model's own, its base, its operators', and the tracer."""
    from ..models import MODELS

    model = importlib.util.find_spec(MODELS[kind].partition(":")[0])
    assert model is not None
    assert model.origin is not None
    home = Path(model.origin).parent
    files = [
        Path(model.origin),
        home / "base.py",
        home / "freezing.py",
        *(home / name for name in _MORE_SOURCES.get(kind, ())),
    ]
    return _hash_code(*files, *(Path(__file__).with_name(name) for name in _TRACERS))


@functools.cache
def _hash_code(*paths: Path) -> str:
    """Of what the files do: comments, docstrings and layout aside."""
    return _hash("".join(_hash(_code(path)) for path in paths))


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


@functools.cache
def _hash_files(*paths: Path) -> str:
    return _hash("".join(_hash(path.read_text(encoding="utf-8")) for path in paths))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class PredictionStore:
    """Finished predictions by plan, in one file of JSON lines in the user's cache folder.

    The file's name holds a hash of the sources of planning and models and of the torch version.
    """

    #: A larger file is started over.
    LIMIT_BYTES = 16 * 1024**2

    def __init__(self) -> None:
        package = Path(__file__).parent.parent
        sources = sorted([*package.glob("planning/*.py"), *package.glob("models/*.py")])
        name = _hash(_hash_files(*sources) + _cache_path("").name)
        self.path = cache_folder() / f"predictions-{name}.jsonl"
        self._known: dict[str, Any] | None = None

    def get(self, key: str) -> Any:
        """The stored prediction as JSON data, or None."""
        if self._known is None:
            self._known = self._read()
        return self._known.get(key)

    def put(self, key: str, data: Any) -> None:
        """Remember, here and for later processes. A folder that cannot be written is no error."""
        assert self._known is not None
        self._known[key] = data
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            mode = "w" if self.path.exists() and self.path.stat().st_size > self.LIMIT_BYTES else "a"
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(json.dumps([key, data], separators=(",", ":")) + "\n")

    def _read(self) -> dict[str, Any]:
        known = {}
        with suppress(OSError):
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # a line torn by a crash
                    key, data = json.loads(line)
                    known[key] = data
        return known


@functools.cache
def predictions() -> PredictionStore:
    """This process's store."""
    return PredictionStore()
