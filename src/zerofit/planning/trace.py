"""Tracing a real model without a GPU: one micro-step on fake tensors, with every storage's birth and death.

The model is built under the compute dtype in a FakeTensorMode (shapes and storages, no data), and a dispatch mode
notes each new storage and, through a finaliser, the moment in which Python and autograd let go of it. Two points in
the batch give slope and offset of every size, four blocks give first, middle and last; `template` composes any size.
Where blocks differ (`ModelShape.blocks_alike`) all of them are traced.

The fake device is the CPU, because a fake GPU needs a CUDA build of PyTorch. Where GPU kernels differ, the trace
follows the GPU: attention with dropout stays fused, dropout keeps one byte an element, and what kernels allocate for
themselves is added (`_kernel_bytes`). A plan for the CPU is traced as the CPU works.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config.models import Recomputation
from ..config.schema import Precision
from ..models.base import ModelSpec
from ..models.freezing import freeze
from ..models.offload import TracedOffload
from .template import BACKWARD, FORWARD, Event, Template, name_of
from .trace_between import stand_in_between
from .trace_compiled import stand_in

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Blocks of a traced model: first, two middle ones (which must be alike) and last.
DEPTH = 4
#: Channels of a group in the deterministic backward pass of the selective scan.
SCAN_COLUMN = 16
#: Samples of the traced points; the third must lie on the line through the first two. Some operators take another way
#: for a single sample (matrix products of a batch of one): then lines start at two. What is saved for the backward pass
#: of a compiled classifier's small maps depends on whether they are smaller than its weights: then lines start at 16.
SAMPLES = ((1, 2, 5), (2, 3, 6), (16, 17, 32))


class TraceError(Exception):
    """The model does not follow the assumptions of `template`, or does not run on fake tensors."""


def trace_template(
    spec: ModelSpec[Any],
    config: Any,
    *,
    precision: Precision,
    recompute: Recomputation | None,
    compiled: bool,
    device: str,
    offloaded: bool = False,
    every: int = 1,
    trained: Collection[str] | None = None,
    between: bool = False,
) -> Template:
    """Trace one kind of blocks.

    Args:
        spec, config: the model.
        precision: of the compute copy.
        recompute: what every block recomputes of its activations (of blocks that differ, every `every`-th); None keeps
            them.
        compiled: with `ModelSpec.compiled_units` compiled; no module events then.
        device: ``cuda`` or ``cpu``, whose kernels the trace follows.
        offloaded: with the blocks' inputs in host memory.
        trained: names of the parameters that are trained while the others are frozen (`models.freezing`); None: all.
        between: a model that is compiled as a whole is cut at its blocks, as under FSDP2 (`trace_between`).

    Raises:
        TraceError: sizes are not linear in the batch, or the middle blocks differ.
    """
    build = functools.partial(
        _Recording,
        spec,
        shallow(config, DEPTH),
        DTYPES[precision],
        every if recompute is not None else 0,
        device=device,
        compiled=compiled,
        recomputation=recompute or "full",
        offloaded=offloaded,
        trained=trained,
        between=between,
    )
    failure = None
    for samples in SAMPLES:
        try:
            template = _merged([build(samples=count).segments() for count in samples], samples)
            if config.blocks_alike:
                _check_middle(template)
        except TraceError as reason:
            failure = failure or reason
        except Exception as reason:  # whatever a model does that fake tensors cannot, or with a single sample
            failure = failure or TraceError(f"{type(reason).__name__}: {reason}")
        else:
            return template
    assert failure is not None
    raise failure


def shallow(config: Any, depth: int) -> Any:
    """The same architecture with at most `depth` blocks."""
    return config.with_depth(depth) if config.depth > depth else config


def direct_events(
    spec: ModelSpec[Any],
    config: Any,
    *,
    precision: Precision,
    every: int,
    samples: int,
    device: str,
    compiled: bool,
    recomputation: Recomputation = "full",
    offloaded: bool = False,
    between: bool = False,
) -> tuple[int, int, int]:
    """Trace the whole model at one size: (bytes saved at the end of forward, forward peak, backward peak).

    What composing templates must equal; for tests. Parameter gradients are freed as they are finished.
    """
    record = _Recording(
        spec, config, DTYPES[precision], every, samples, device, compiled, recomputation, offloaded, between=between
    )
    live = peak = saved = forward_peak = 0
    sizes: dict[int, int] = {}
    for event in record.events:
        if event[0] == "+":
            sizes[event[1]] = event[2]
            live += event[2]
        elif event[0] == "-":
            live -= sizes[event[1]]
        elif event[0] == "s" and event[1] == BACKWARD and not forward_peak:
            saved, forward_peak, peak = live, peak, 0
        peak = max(peak, live)
    return saved, forward_peak, peak


class _Storages(TorchDispatchMode):
    """Notes storages as they come and go, in `events`: ``("+", id, bytes, item, op)`` and ``("-", id)``."""

    def __init__(self, gpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpu = gpu
        self.events: list[tuple[Any, ...]] = []
        self.item = "activations"
        #: Called before the next allocation or module event, once.
        self.before_next: Callable[[], None] | None = None
        self._ids: dict[int, int] = {}
        self._count = 0
        self._recording = True

    def ignore(self, tensor: Tensor) -> None:
        self._ids[tensor.untyped_storage()._cdata] = 0

    def id_of(self, tensor: Tensor) -> int:
        """The allocation that holds `tensor`; 0 for what was ignored."""
        return self._ids[tensor.untyped_storage()._cdata]

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Inside, nothing is noted."""
        before, self._recording = self._recording, False
        try:
            yield
        finally:
            self._recording = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._recording:
            return out
        fresh = [self._note(tensor, func) for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        if self.gpu and any(fresh):
            extra = _kernel_bytes(func, args)
            if extra:
                self._count += 1
                self.events += [("+", self._count, extra, "temporaries"), ("-", self._count)]
        return out

    def _note(self, tensor: Tensor, func: Any) -> bool:
        storage = tensor.untyped_storage()
        if storage._cdata in self._ids or tensor.device.type == "meta":
            return False
        self.next()
        self._count += 1
        self._ids[storage._cdata] = self._count
        weakref.finalize(storage, self._gone, storage._cdata, self._count)
        self.events.append(("+", self._count, storage.nbytes(), self.item))
        return True

    def next(self) -> None:
        """Something is about to be noted that is no free."""
        if self.before_next is not None:
            tell, self.before_next = self.before_next, None
            tell()

    def _gone(self, address: int, number: int) -> None:
        self._ids.pop(address, None)
        self.events.append(("-", number))


def _kernel_bytes(func: Any, args: Any) -> int:
    """What the CUDA kernel behind an operator allocates for itself, freed when it is launched.

    Convolutions (cuDNN): assumed, until it is measured, that the gradient of the weights is summed in an fp32 copy of
    them, and that a forward pass and the gradient of the input need no more than that.

    Attention backward (FlashAttention 2, ``flash_api.cpp``): the query's gradient accumulates in fp32, rows padded to
    128, and one fp32 number a row. Embedding backward (``Embedding.cu``): sorted indices, and fp32 partial sums of
    segments of ten (not for up to 3072 indices; counted there too, so that sizes stay linear). Head with its loss
    (`kernels.head_loss`): the logits of one chunk of tokens. Scan backward (`kernels.selective_scan_cuda`): sums of A,
    D and the bias for each sample, those of B and C in fp32; deterministic: once a group of channels.
    """
    name = func.__name__
    if "scaled_dot_product" in name and "backward" in name:
        batch, heads, tokens, size = args[1].shape
        rows = batch * heads * (-(-tokens // 128) * 128)
        return int(4 * rows * (-(-size // 32) * 32) + 4 * rows)
    if name.startswith("convolution"):
        weight = args[2] if "backward" in name else args[1]
        return int(4 * weight.numel())
    if name.startswith("embedding_dense_backward"):
        row_bytes = 4 * args[0].shape[-1]
        return int(args[1].numel() * (4 * 8 + row_bytes + -(-row_bytes // 10)))
    if name.startswith("selective_scan_backward"):
        batch, length, channels = args[1].shape
        states, copies = args[3].shape[1], -(-channels // SCAN_COLUMN) if args[10] else 1
        return int(4 * batch * (channels * (states + 2) + copies * length * 2 * states))
    if name.startswith("linear_cross_entropy"):
        x, weight, chunk_tokens = args[0], args[1], args[4]
        return int(min(chunk_tokens, x.shape[0]) * weight.shape[0] * x.element_size())
    return 0


@contextmanager
def _as_on_gpu() -> Iterator[None]:
    """Dropout as CUDA does it: fused attention keeps none of its mask, dropout keeps a mask of one byte an element.

    The functions are replaced in their module, because modes do not reach what is recomputed in a backward pass.
    """
    attention, dropout = F.scaled_dot_product_attention, F.dropout

    def fused(*args: Any, **kwargs: Any) -> Tensor:
        return attention(*args, **{**kwargs, "dropout_p": 0.0})

    def masked(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p else x

    vars(F).update(scaled_dot_product_attention=fused, dropout=masked)
    try:
        yield
    finally:
        vars(F).update(scaled_dot_product_attention=attention, dropout=dropout)


class _Tell(torch.autograd.Function):
    """The identity; calls `tell` in the backward pass, as DeepSpeed's hooks on a module's input and output do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tell: Any) -> Tensor:
        ctx.tell = tell
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.tell()
        return gradients[0], None


def _wrapped(argument: Any, tell: Any) -> Any:
    """`argument` (each of several), calling `tell` when its gradient passes."""
    if isinstance(argument, tuple):
        return tuple(_wrapped(part, tell) for part in argument)
    if not isinstance(argument, Tensor) or not argument.requires_grad:
        return argument
    return _Tell.apply(argument, tell)  # type: ignore[no-untyped-call]


class _Recording:
    """One micro-step of one model at one size.

    `events` are those of `_Storages`, with ``("s", pass, position)`` where a segment begins, ``("g", id, name)``,
    ``("m", when, names)`` and ``("o", pass, position, id)`` naming a block's output or its input's gradient.
    """

    def __init__(
        self,
        spec: ModelSpec[Any],
        config: Any,
        dtype: torch.dtype,
        every: int,
        samples: int,
        device: str,
        compiled: bool = False,
        recomputation: Recomputation = "full",
        offloaded: bool = False,
        trained: Collection[str] | None = None,
        between: bool = False,
    ) -> None:
        self.mode = _Storages(device == "cuda")
        self.events = self.mode.events
        with _default_dtype(dtype), FakeTensorMode(allow_non_fake_inputs=True):
            model = spec.build(config, checkpoint_every=every, recomputation=recomputation)
            if trained is not None:
                freeze(model, trained)
            inputs = spec.example_inputs(config, samples)
            self.input_bytes = [tensor.nbytes for tensor in inputs.values()]
            self.blocks = list(spec.blocks(model))
            if offloaded:
                offload = TracedOffload(self.mode.unrecorded)
                for block in self.blocks:
                    vars(block)["input_offload"] = offload
            self.block_name = _block_name(model, self.blocks, config.blocks_alike)
            self._names = {parameter: name for name, parameter in model.named_parameters()}
            for tensor in (*model.parameters(), *model.buffers(), *inputs.values()):
                self.mode.ignore(tensor)
            units = spec.compiled_units(model) if compiled else []
            # Of a model that is compiled as a whole no block begins or ends: all of it lies around the blocks.
            cut = between and any(unit is model for unit in units)
            self.whole = any(unit is model for unit in units) and not cut
            self._hook(model)
            if cut:
                stand_in_between(model, self.blocks, self._kernel_bytes, self.mode.unrecorded)
            elif compiled:
                stand_in(units, self._kernel_bytes, self.mode.unrecorded)
            else:
                self._hook_modules(model)
            with self.mode, _as_on_gpu() if device == "cuda" else nullcontext():
                self._run(model, inputs)

    def _run(self, model: nn.Module, inputs: Any) -> None:
        self._begin(FORWARD, 0)
        loss = model(**inputs)["loss"]
        self.mode.next()
        self._begin(BACKWARD, len(self.blocks) + 1)
        loss.backward()
        del loss

    def _begin(self, which: int, position: int) -> None:
        self.events.append(("s", which, position))
        self._in_backward = which == BACKWARD
        # After the blocks come the head and its loss.
        after = position == len(self.blocks) + 1
        own = "temporaries" if which == BACKWARD else "activations"
        self.mode.item = "logits" if after and not self.whole else own

    def _hook(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._gradient)
        self._in_backward = False
        for index, block in enumerate([] if self.whole else self.blocks):
            self._hook_block(block, index + 1)

    def _kernel_bytes(self, func: Any, args: Any) -> int:
        return _kernel_bytes(func, args) if self.mode.gpu else 0

    def _hook_modules(self, model: nn.Module) -> None:
        for module in model.modules():
            names = [self._names[p] for p in module.parameters(recurse=False)]
            if names:
                self._hook_module(module, names)

    def _hook_block(self, block: nn.Module, position: int) -> None:
        """Segment boundaries: where the block is called, and where gradients of its output and input are finished."""

        def before(module: nn.Module, args: Any) -> None:
            if self._in_backward:  # recomputed
                self.mode.item = "activations"
                return
            self._begin(FORWARD, position)
            if position == 1 and _first(args).requires_grad:
                _first(args).register_hook(lambda gradient: self._enter(0, gradient, 1))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if self._in_backward:
                self.mode.item = "temporaries"
                return
            tensor = _first(output)
            self.events.append(("o", FORWARD, position, self.mode.id_of(tensor)))
            if tensor.requires_grad:  # of frozen blocks there is no backward pass
                tensor.register_hook(lambda gradient: self._enter(position, gradient, position + 1))
            if position == len(self.blocks):
                # Not yet: the caller lets go of the block's input first, if the block did not keep it.
                self.mode.before_next = lambda: self._begin(FORWARD, position + 1)

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)

    def _enter(self, position: int, gradient: Tensor, made_at: int) -> None:
        """The gradient of a block's output (of the first block's input at position 0) is finished."""
        self.events.append(("o", BACKWARD, made_at, self.mode.id_of(gradient)))
        self._begin(BACKWARD, position)

    def _hook_module(self, module: nn.Module, names: Sequence[str]) -> None:
        """DeepSpeed's four moments of a module: it gathers and lets go of parameters there."""

        def tell(when: str) -> Any:
            def note() -> None:
                self.mode.next()
                self.events.append(("m", when, tuple(names)))

            return note

        def once(when: str) -> Any:
            """Of several outputs the first whose gradient arrives."""
            left = iter([tell(when)])
            return lambda: next(left, lambda: None)()

        def before(module: nn.Module, args: Any) -> Any:
            tell("f+")()
            if not any(isinstance(a, Tensor) and a.requires_grad for a in args):
                return None
            return tuple(_wrapped(a, tell("b-")) for a in args)

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            tell("f-")()
            return _wrapped(output, once("b+"))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _gradient(self, parameter: Any) -> None:
        self.events.append(("g", self.mode.id_of(parameter.grad), self._names[parameter]))
        parameter.grad = None

    def segments(self) -> tuple[tuple[list[Any], list[Any]], list[int], str]:
        """Events by pass and position with relative references; bytes of inputs; the blocks' name."""
        return _Cutter(self.events, len(self.blocks), self.block_name).cut(), self.input_bytes, self.block_name


def _first(value: Any) -> Tensor:
    tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]
    if not tensors:
        raise TraceError("a block takes or returns no floating-point tensor")
    return tensors[0]


def _block_name(model: nn.Module, blocks: Sequence[nn.Module], alike: bool) -> str:
    """With ``{}`` for the number; where blocks differ all names, see `template.name_of`."""
    names = {module: name for name, module in model.named_modules()}
    if not alike:
        return "|".join(names[block] for block in blocks)
    pattern = re.sub(r"\d+$", "{}", names[blocks[0]])
    if any(names[block] != pattern.format(index) for index, block in enumerate(blocks)):
        raise TraceError("the blocks' names do not count from 0")
    return pattern


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Cutter:
    """Cuts a recording into segments, and makes references relative, see `template`."""

    def __init__(self, events: Sequence[tuple[Any, ...]], depth: int, block_name: str) -> None:
        self.events, self.depth, self.block_name = events, depth, block_name
        self.home: dict[int, tuple[int, int, int]] = {}
        # Storages of blocks' outputs and of their inputs' gradients have the number 0.
        self.outputs = {event[3]: (event[1], event[2]) for event in events if event[0] == "o"}

    def cut(self) -> tuple[list[list[Event]], list[list[Event]]]:
        passes: tuple[list[list[Event]], ...] = tuple([[] for _ in range(self.depth + 2)] for _ in range(2))
        which = position = number = 0
        for event in self.events:
            if event[0] == "s":
                _, which, position = event
                number = 0
                continue
            segment = passes[which][position]
            if event[0] == "+":
                named = self.outputs.get(event[1]) == (which, position)
                number += not named
                self.home[event[1]] = (which, position, 0 if named else number)
                segment.append(["+", 0 if named else number, event[2], event[3]])
            elif event[0] == "-":
                segment.append(["-", *self._relative(event[1], position)])
            elif event[0] == "g":
                segment.append(["g", *self._relative(event[1], position), self._general(event[2], position)])
            elif event[0] == "m":
                segment.append(["m", event[1], [self._general(name, position) for name in event[2]]])
        return passes[FORWARD], passes[BACKWARD]

    def _relative(self, storage: int, position: int) -> tuple[int, int, int, int]:
        which, home, number = self.home[storage]
        if home == 0 and position != 0:
            return which, 0, 0, number
        if home == self.depth + 1 and position != home:
            return which, 1, 0, number
        return which, 2, home - position, number

    def _general(self, name: str, position: int) -> str:
        prefix = name_of(self.block_name, position) + "."
        return "@." + name.removeprefix(prefix) if name.startswith(prefix) else name


def _merged(points: Sequence[Any], samples: Sequence[int]) -> Template:
    """Of traces at several sizes: bytes become (slope, offset); everything else must be the same."""
    passes, inputs, names = zip(*points, strict=True)
    depth = len(passes[0][0]) - 2
    merged = []
    for which in (FORWARD, BACKWARD):
        segments = []
        for position in range(depth + 2):
            columns = [point[which][position] for point in passes]
            if len({len(column) for column in columns}) > 1:
                raise TraceError(f"the events at position {position} depend on the batch size")
            segments.append([_merge(events, samples) for events in zip(*columns, strict=True)])
        merged.append(segments)
    lines = [_line(sizes, samples) for sizes in zip(*inputs, strict=True)]
    return Template(depth, merged[0], merged[1], lines, names[0])


def _merge(events: Sequence[Event], samples: Sequence[int]) -> Event:
    first = events[0]
    if first[0] == "+" and all(event[:2] == first[:2] and event[3] == first[3] for event in events):
        return ["+", first[1], *_line([event[2] for event in events], samples), first[3]]
    if any(event != first for event in events):
        raise TraceError("the order of events depends on the batch size")
    return first


def _line(sizes: Sequence[int], samples: Sequence[int]) -> tuple[int, int]:
    """(slope, offset) through sizes at `samples`."""
    (x0, x1, *_), (y0, y1, *_) = samples, sizes
    slope = (y1 - y0) // (x1 - x0)
    offset = y0 - slope * x0
    if any(slope * x + offset != y for x, y in zip(samples, sizes, strict=True)):
        raise TraceError(f"a size is not linear in the batch: {list(sizes)} bytes at {list(samples)} samples")
    return slope, offset


def _check_middle(template: Template) -> None:
    if template.depth == DEPTH and (
        template.forward[2] != template.forward[3] or template.backward[2] != template.backward[3]
    ):
        raise TraceError("blocks differ from one another")
