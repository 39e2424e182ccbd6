"""Stand-ins for units that ``torch.compile`` compiles: they allocate what inductor's code would, on fake tensors.

A unit's forward and backward graphs are traced by AOTAutograd with inductor's decompositions, and split by the same
min-cut partitioner, so that what is saved between them is exact. Inside a graph a fusion model says which values exist
in memory: results of matrix multiplications, attention and reductions, what those read, and the graph's outputs;
everything else is fused into its readers. A fused result takes the place of an operand of its size that it is the last
to read, as inductor's in-place reuse does. Inductor computes convolutions in NHWC: their weights are copied to that
layout, and the copies are what the backward graph gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._inductor.lowering  # pooling's decomposition refers to it, and does not import it
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_leaves, tree_map

#: Operators that stay calls into libraries: their operands and results exist in memory. Not scatter: into a constant
#: (the loss's gradient) it is fused.
_CALLS = (
    *("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "scaled_dot_product"),
    *("index_put", "sort", "topk"),
)
#: Namespace of this project's own kernels, which the compiler calls too.
KERNELS = "zerofit"
#: Operators that hand on an operand's memory.
_VIEWS = frozenset(
    """alias as_strided detach expand getitem permute reshape select slice split split_with_sizes squeeze t transpose
    unbind unsqueeze view _unsafe_view""".split()  # noqa: SIM905
)
_REDUCTIONS = ("sum", "mean", "amax", "amin", "var", "var_mean", "logsumexp", "prod", "any", "all", "scatter_add")
#: Operators that read a value many times over: it exists in memory.
_WINDOWS = ("_low_memory_max_pool_with_offsets", "max_pool2d_with_indices", "avg_pool2d")
#: A value with several readers that reads more operands than this is computed once (``realize_reads_threshold``).
READS_THRESHOLD = 4


def stand_in(
    units: Sequence[nn.Module],
    gpu_extra: Callable[[Any, Any], int],
    unrecorded: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Replace the units' forward functions. Units that are alike, and are called with arguments of
    the same shapes, share one pair of graphs.

    Args:
        units: modules on fake tensors, inside their FakeTensorMode.
        gpu_extra: (operator, arguments) -> bytes that its kernel takes for itself while it runs.
        unrecorded: a context in which the recording stands still: graphs are traced in it, at a unit's first call.
    """
    compiled: dict[Any, Any] = {}
    for unit in units:
        unit.forward = _caller(unit, compiled, gpu_extra, unrecorded)


def _caller(unit: nn.Module, compiled: dict[Any, Any], gpu_extra: Any, unrecorded: Any) -> Any:
    original = _compiled(unit, gpu_extra)
    what = repr(unit)  # kernels, strides

    def forward(*args: Any, **kwargs: Any) -> Any:
        # A batch norm's statistics are changed: they go in as arguments, as the parameters do.
        held = dict(unit.named_parameters()) | dict(unit.named_buffers())
        shapes = [(tuple(t.shape), t.requires_grad) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        key = (type(unit), what, tuple((name, tuple(t.shape)) for name, t in held.items()), tuple(shapes))
        function = compiled.setdefault(key, original)
        with unrecorded():  # the graphs keep what they were traced with
            function(held, *tree_map(like, args), **tree_map(like, kwargs))
        return function(held, *args, **kwargs)

    return forward


def like(argument: Any) -> Any:
    """A tensor of its own with the argument's shape and layout; anything else as it is."""
    if not isinstance(argument, Tensor):
        return argument
    return torch.empty_like(argument).requires_grad_(argument.requires_grad)


def _compiled(unit: nn.Module, gpu_extra: Callable[[Any, Any], int]) -> Any:
    """The unit's forward function of its parameters and buffers by name, and of its arguments."""
    original = unit.forward

    def functional(held: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        with _reparametrize_module(unit, held):
            return original(*args, **kwargs)

    return in_graphs(functional, gpu_extra)


def in_graphs(function: Callable[..., Any], gpu_extra: Callable[[Any, Any], int]) -> Any:
    """The function with its forward and backward graph played."""
    return aot_function(
        function,
        fw_compiler=lambda graph, inputs: _Player(graph, gpu_extra, backward=False).boxed(),
        bw_compiler=lambda graph, inputs: _Player(graph, gpu_extra, backward=True).boxed(),
        partition_fn=lambda *args, **kwargs: min_cut_rematerialization_partition(
            *args, **{**kwargs, "compiler": "inductor"}
        ),
        decompositions=select_decomp_table(),
    )


def _name(node: fx.Node) -> str:
    target = node.target
    return getattr(target, "__name__", str(target)).split(".")[0]


class _Player:
    """Plays one graph: allocates and frees what the fusion model says, and returns outputs of the right shapes."""

    def __init__(self, graph: fx.GraphModule, gpu_extra: Callable[[Any, Any], int], backward: bool) -> None:
        self.nodes = list(graph.graph.nodes)
        self.gpu_extra, self.backward = gpu_extra, backward
        self.inputs = [node for node in self.nodes if node.op == "placeholder"]
        self.result = self.nodes[-1].args[0]
        self.outputs = {node for node in fx.node.map_aggregate(self.result, lambda n: n) or () if node is not None}
        self.real = self._realized()
        self.reads = {node: self._operands(node, self.real) for node in self.nodes if node in self.real}
        self.last_use = self._last_uses()
        self.copied = {} if backward else _copied_weights(self.nodes)

    def boxed(self) -> Any:
        """The function that AOTAutograd calls; it empties its list of arguments, so that they can be freed early."""

        def run(args: list[Any]) -> Any:
            return self.play(args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def _is_view(self, node: fx.Node) -> bool:
        return node.op == "call_function" and _name(node) in _VIEWS

    def _is_call(self, node: fx.Node) -> bool:
        name = _name(node)
        if getattr(node.target, "namespace", "") == KERNELS:
            return True
        return node.op == "call_function" and any(name == call or name.startswith(f"_{call}") for call in _CALLS)

    def _base(self, node: fx.Node) -> fx.Node:
        """Behind views, the value whose memory a node is."""
        while self._is_view(node):
            behind: Any = node.args[0]
            if _name(node) == "getitem" and not self._is_view(behind):  # one of several results
                return node
            node = behind
        return node

    def _realized(self) -> set[fx.Node]:
        real: set[fx.Node] = set()
        for node in self.nodes:
            if node.op != "call_function" or self._is_view(node):
                continue
            if self._is_call(node) or _name(node) in _REDUCTIONS:
                real.add(node)
            if self._is_call(node) or _name(node) in _WINDOWS:
                real.update(self._base(n) for n in node.all_input_nodes)
        real.update(self._base(node) for node in self.outputs)
        real = {node for node in real if node.op == "call_function"}
        real |= {node.args[0] for node in real if _name(node) == "getitem" and isinstance(node.args[0], fx.Node)}
        for node in self.nodes:
            fused = node.op == "call_function" and node not in real and not self._is_view(node)
            if fused and len(node.users) > 1 and len(self._operands(node, real)) > READS_THRESHOLD:
                real.add(node)
        return real

    def _operands(self, node: fx.Node, real: set[fx.Node]) -> dict[fx.Node, None]:
        """Values in memory that a fused value reads, in a fixed order."""
        found: dict[fx.Node, None] = {}
        stack = [self._base(n) for n in node.all_input_nodes]
        while stack:
            operand = stack.pop()
            source = operand.args[0] if operand.op == "call_function" and _name(operand) == "getitem" else operand
            if operand.op == "placeholder" or operand in real or source in real:
                found[operand] = None
            elif operand.op == "call_function":
                stack += [self._base(n) for n in operand.all_input_nodes]
        return found

    def _last_uses(self) -> dict[fx.Node, fx.Node]:
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            for operand in self.reads.get(node, ()):
                last[operand] = node
        kept = {self._base(node) for node in self.outputs}
        return {operand: node for operand, node in last.items() if operand not in kept}

    def play(self, args: list[Any]) -> Any:
        memory: dict[fx.Node, Any] = dict(zip(self.inputs, args, strict=True))
        args.clear()
        used = set(self.last_use) | {self._base(node) for node in self.outputs}
        for node in self.inputs:
            if node not in used:
                del memory[node]
        ends: dict[fx.Node, list[fx.Node]] = {}
        for operand, node in self.last_use.items():
            ends.setdefault(node, []).append(operand)
        for node in self.nodes:
            if node in self.copied:
                memory[self.copied[node]] = _empty(self.copied[node].meta["val"])
            if node in self.real and _name(node) != "getitem":
                self._place(node, memory, ends.get(node, ()))
            for operand in ends.get(node, ()):
                memory.pop(operand, None)
        return fx.node.map_aggregate(self.result, lambda n: self._value(n, memory) if isinstance(n, fx.Node) else n)

    def _place(self, node: fx.Node, memory: dict[fx.Node, Any], ending: Sequence[fx.Node]) -> None:
        """Allocate a value (each of several), or take over the memory of an operand that ends here."""
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            for user in node.users:
                part = value[user.args[1]]
                if isinstance(part, Tensor):
                    memory[user] = _empty(part)
        elif not self._is_call(node) and (donor := self._donor(value, memory, ending)) is not None:
            memory[node] = donor.as_strided(value.shape, value.stride())
        else:
            memory[node] = _empty(value)
        held = node.args[2] if _name(node) == "convolution_backward" else None
        if isinstance(held, fx.Node) and held.meta["val"].ndim > 2:
            _ = _empty(held.meta["val"])  # the weights' gradient comes in NHWC, and is copied to their own layout
            del _
        extra = self.gpu_extra(node.target, [n.meta["val"] if isinstance(n, fx.Node) else n for n in node.args])
        if extra:
            _ = torch.empty(extra, dtype=torch.uint8)
            del _

    def _donor(self, value: Tensor, memory: dict[fx.Node, Any], ending: Sequence[fx.Node]) -> Tensor | None:
        for operand in ending:
            held = memory.get(operand)
            own = operand.op != "placeholder" or (
                self.backward and not operand.name.startswith(("primals", "tangents"))
            )
            if own and isinstance(held, Tensor) and held.dtype == value.dtype and held.numel() == value.numel():
                return held
        return None

    def _value(self, node: fx.Node, memory: dict[fx.Node, Any]) -> Any:
        """An output: what lies in memory, seen through its views."""
        if node in memory:
            return memory[node]
        assert self._is_view(node), node
        args = fx.node.map_aggregate(node.args, lambda n: self._value(n, memory) if isinstance(n, fx.Node) else n)
        return node.target(*args, **node.kwargs)  # type: ignore[operator]


def _copied_weights(nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Convolution -> its weights, where inductor copies them to NHWC: not if any is grouped (`decide_layout_opt`), and
    not where the layouts are one."""
    found: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op == "call_function" and _name(node) == "convolution":
            weight: Any = node.args[1]
            shape, groups = weight.meta["val"].shape, node.args[-1]
            if groups != 1 and shape[1] > 1:
                return {}
            if weight.op == "placeholder" and shape[1] > 1 and math.prod(shape[2:]) > 1:
                found[node] = weight
    return found


def _empty(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
