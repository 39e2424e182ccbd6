"""Stand-ins for a model that is compiled as a whole under FSDP2: its blocks, and the stretches between them.

FSDP2's hooks around a block are not compiled, so that ``torch.compile`` ends a graph where a block begins: each block
is a graph, and so is what lies before the first, between two and after the last (seen for ResNet-18: the stem with its
pooling, eight blocks, pooling and head). The stretches are found by tracing the forward pass with blocks that are one
operator each, and cutting it there; each is then differentiated and partitioned as `trace_compiled` does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.split_module import split_module
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from .trace_compiled import in_graphs, like, stand_in


@dataclass
class _Call:
    """How a block is called, and what it returns.

    Attributes:
        arguments: its arguments flattened, with None in place of tensors.
        spec: what they were flattened from.
        shapes: tensors that are like those it returns.
        result: what these were flattened from.
    """

    arguments: list[Any]
    spec: TreeSpec
    shapes: list[Tensor]
    result: TreeSpec


#: Calls of the model that is being traced, by the number of the block.
_CALLS: dict[int, _Call] = {}


@torch.library.custom_op("zerofit_trace::block", mutates_args=())
def _block(inputs: list[Tensor], number: int) -> list[Tensor]:
    raise NotImplementedError("it stands for a block while graphs are traced")


@_block.register_fake
def _(inputs: list[Tensor], number: int) -> list[Tensor]:
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in _CALLS[number].shapes]


def stand_in_between(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    gpu_extra: Callable[[Any, Any], int],
    unrecorded: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Replace the forward functions of the blocks and of the model around them; see `trace_compiled.stand_in`.

    A block must be called once, and return tensors of which the next stretches make all that they need.
    """
    written, forward = [block.forward for block in blocks], model.forward
    stand_in(blocks, gpu_extra, unrecorded)

    def replay(**inputs: Tensor) -> Any:
        with unrecorded():
            cut = _cut(model, forward, blocks, written, inputs)
            player = _Player(cut.graph, blocks, gpu_extra, unrecorded)
        return tree_unflatten(list(player.run(*cut.held, *inputs.values())), cut.result)

    model.forward = replay


@dataclass(frozen=True)
class _Cut:
    """The forward pass in pieces.

    Attributes:
        graph: of modules: a stretch each, or one block's operator.
        held: parameters and buffers outside the blocks, its first arguments.
        result: what its outputs were flattened from.
    """

    graph: fx.GraphModule
    held: list[Tensor]
    result: TreeSpec


def _cut(
    model: nn.Module, forward: Any, blocks: Sequence[nn.Module], written: Sequence[Any], inputs: Mapping[str, Tensor]
) -> _Cut:
    with _called(blocks, [_noting(number, inner) for number, inner in enumerate(written)]), torch.no_grad():
        forward(**inputs)
    inside = {id(tensor) for block in blocks for tensor in (*block.parameters(), *block.buffers())}
    held = {
        name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers()) if id(tensor) not in inside
    }
    specs: list[TreeSpec] = []

    def functional(*tensors: Tensor) -> list[Any]:
        own, given = tensors[: len(held)], tensors[len(held) :]
        with _reparametrize_module(model, dict(zip(held, own, strict=True))):
            leaves, spec = tree_flatten(forward(**dict(zip(inputs, given, strict=True))))
        specs.append(spec)
        return leaves

    with _called(blocks, [_standing_for(number) for number in range(len(blocks))]):
        whole = make_fx(functional)(*held.values(), *(like(tensor) for tensor in inputs.values()))
    return _Cut(_split(whole), list(held.values()), specs[-1])


@contextmanager
def _called(blocks: Sequence[nn.Module], instead: Sequence[Any]) -> Any:
    """Inside, calling a block calls the function in its place, and none of its hooks."""
    for block, function in zip(blocks, instead, strict=True):
        block._compiled_call_impl = function
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def _noting(number: int, inner: Any) -> Any:
    """The block itself, of whose call everything is noted."""

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        returned = inner(*args, **kwargs)
        shapes, result = tree_flatten(returned)
        without = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        _CALLS[number] = _Call(without, spec, [like(tensor) for tensor in shapes], result)
        return returned

    return call


def _standing_for(number: int) -> Any:
    """The operator that stands for a block."""

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, _ = tree_flatten((args, kwargs))
        returned = _block([leaf for leaf in leaves if isinstance(leaf, Tensor)], number)
        return tree_unflatten(list(returned), _CALLS[number].result)

    return call


def _is_block(node: fx.Node) -> bool:
    return node.op == "call_function" and "zerofit_trace.block" in str(node.target)


def _split(whole: fx.GraphModule) -> fx.GraphModule:
    """Pieces in order: even ones stretches, odd ones blocks."""
    pieces: dict[fx.Node, int] = {}
    piece = 0
    for node in whole.graph.nodes:
        if _is_block(node):
            piece += 1
        pieces[node] = piece
        piece += _is_block(node)
    return split_module(whole, whole, lambda node: pieces[node], keep_original_order=True)


class _Player(fx.Interpreter):
    """Runs the pieces: blocks as they are, hooks and all; stretches as their compiled code would. A value goes when the
    last piece that reads it is done."""

    def __init__(self, graph: fx.GraphModule, blocks: Sequence[nn.Module], gpu_extra: Any, unrecorded: Any) -> None:
        super().__init__(graph)
        self.blocks, self.gpu_extra, self.unrecorded = blocks, gpu_extra, unrecorded

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        piece: Any = self.module.get_submodule(str(target))
        number = next((node.args[1] for node in piece.graph.nodes if _is_block(node)), None)
        if number is not None:
            call = _CALLS[number]
            tensors = iter(args)
            leaves = [next(tensors) if part is None else part for part in call.arguments]
            block_args, block_kwargs = tree_unflatten(leaves, call.spec)
            return tree_flatten(self.blocks[number](*block_args, **block_kwargs))[0]
        function = in_graphs(piece, self.gpu_extra)
        with self.unrecorded():
            function(*(arg if isinstance(arg, nn.Parameter) else tree_map(like, arg) for arg in args))
        return function(*args)
