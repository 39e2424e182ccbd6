"""From a checkpoint to a plain module, and the reader of a fresh start."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from ..config.models import ModelConfig
from ..errors import CheckpointError
from ..models import model_spec
from ..models.base import ModelSpec, named_unique_parameters
from ..types import Reader
from .manifest import check_same_model
from .source import Source


def initial_reader(spec: ModelSpec[Any], config: Any, seed: int) -> Reader:
    """The reader of a fresh start: parameters and buffers computed from the seed, no moments.

    A tensor's random numbers come one after another (2.5 ns each), and a rank that holds a piece of every tensor needs
    all of them: so the tensors that follow are computed meanwhile, in as many threads as torch uses in this process.
    """
    values = _InitialValues(spec, config, seed, torch.get_num_threads())

    def read(name: str, role: str, start: int, stop: int) -> Tensor | None:
        return values(name)[start:stop] if role in ("parameter", "buffer") else None

    return read


class _InitialValues:
    """Flat initial values by name. The last tensor is kept, because engines read a tensor interval by interval.

    Computed ahead are large tensors, in the order in which the model names its parameters, as many as fit beside the
    one that is read into twice the bytes of the largest: what the plan counts for loading.
    """

    #: Elements of a tensor that is worth a thread.
    LARGE = 2**20
    #: Threads that one process uses at most, this one included.
    THREADS = 16

    def __init__(self, spec: ModelSpec[Any], config: Any, seed: int, threads: int) -> None:
        self._make: Callable[[str], Tensor] = lambda name: spec.init(config, name, seed).reshape(-1)
        sizes = {name: math.prod(shape) for name, shape in config.parameter_shapes().items()}
        self._room = max(sizes.values())
        self._sizes = {name: size for name, size in sizes.items() if size >= self.LARGE}
        self._places = {name: place for place, name in enumerate(self._sizes)}
        self._threads = min(threads, self.THREADS)
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[str, Future[Tensor]] = {}
        self._last: tuple[str, Tensor] | None = None

    def __call__(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None
            coming = self._ahead.pop(name, None)
            if name in self._places and self._threads > 1:
                self._look_ahead(name)
            self._last = name, self._make(name) if coming is None else coming.result()
        return self._last[1]

    def _look_ahead(self, name: str) -> None:
        """Start what follows, and forget what was passed over."""
        here = self._places[name]
        for passed in [other for other in self._ahead if self._places[other] < here]:
            self._ahead.pop(passed).cancel()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads - 1, thread_name_prefix="initial-values")
        room = self._room - sum(self._sizes[other] for other in self._ahead)
        for other in list(self._sizes)[here + 1 :]:
            if other in self._ahead:
                continue
            room -= self._sizes[other]
            if room < 0 or len(self._ahead) >= self._threads:
                break
            self._ahead[other] = self._pool.submit(self._make, other)


def parameters_only(read: Reader) -> Reader:
    """`read` without its moments."""
    wanted = ("parameter", "buffer")
    return lambda name, role, start, stop: read(name, role, start, stop) if role in wanted else None


def model_config(source: Source) -> ModelConfig:
    """The model's shape, as the checkpoint tells it.

    Raises:
        CheckpointError: it does not.
    """
    found = source.state.get("model")
    if found is None:
        raise CheckpointError(
            f"{source.folder} does not tell the shape of its model. Name a configuration with the model section."
        )
    config: ModelConfig = TypeAdapter[ModelConfig](ModelConfig).validate_python(found)
    return config


def load_model(
    source: Source, device: torch.device | str = "cpu", config: ModelConfig | None = None
) -> tuple[nn.Module, ModelConfig]:
    """The plain fp32 module in evaluation mode, and its config.

    Args:
        source: where the weights are.
        device: where they go.
        config: the shape; by default what the source tells.

    Raises:
        CheckpointError: the source holds another model, or not all of it.
    """
    config = config or model_config(source)
    check_same_model(source.folder, source.shapes(), config)
    model = model_spec(config.kind).build(config)
    with torch.no_grad():
        for name, parameter in named_unique_parameters(model).items():
            values = source.read(name, "parameter", 0, math.prod(parameter.shape))
            if values is None:
                raise CheckpointError(f"Checkpoint {source.folder} holds no parameter {name}.")
            parameter.copy_(values.view(parameter.shape))
        for name, shape in config.buffer_shapes().items():
            values = source.read(name, "buffer", 0, math.prod(shape))
            if values is None:
                raise CheckpointError(f"Checkpoint {source.folder} holds no buffer {name}.")
            model.get_buffer(name).copy_(values.view(shape))
    return model.to(device).eval(), config
