"""A micro-step's forward and backward pass, recorded once as a CUDA graph and replayed with one launch.

What a small model's step waits for is the host, which launches some hundreds of short kernels. A recording has fixed
addresses: inputs are copied to where the recording reads them, and gradients lie where it writes them. Random numbers
(dropout) stay a function of the seed that is set before each step: PyTorch hands seed and offset to every replay.

Two graphs share one memory pool: the first micro-step of a window writes the gradients, the later ones add to them, in
the order of eager accumulation. So a replayed run is the eager run bit for bit, as far as its kernels repeat.

Source: Gray 2021, "Accelerating PyTorch with CUDA Graphs" (PyTorch's documentation, "Whole-network capture").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..errors import TrainingFailed

#: Steps that run eagerly first: what is compiled, tuned or loaded at its first use cannot be recorded.
EAGER_STEPS = 3
#: From inputs and the factor on the loss to the loss (detached), with gradients accumulated in the parameters.
Passes = Callable[[dict[str, Tensor], Tensor], Tensor]


class RecordedPasses:
    """Runs `passes` eagerly for `EAGER_STEPS` steps, then from recordings. For one process without a process group.

    Args:
        passes: what is recorded. It must not wait for the device.
        parameters: whose gradients it makes.
    """

    def __init__(self, passes: Passes, parameters: Mapping[str, nn.Parameter]) -> None:
        self.passes, self.parameters = passes, list(parameters.values())
        self._steps = 0
        #: The graphs of a window's first micro-step, and of those after it.
        self._graphs: list[_Recording] = []
        self._gradients: list[Tensor | None] = []
        #: In this window the gradients lie where the graphs have them.
        self._in_place = False

    def __call__(self, inputs: dict[str, Tensor], factor: Tensor, index: int) -> Tensor:
        """One micro-step.

        Args:
            inputs: of the model, on the device.
            factor: on the loss before the backward pass; scalar fp32.
            index: of the micro-step in its window; 0 begins a step, before which all gradients are None.

        Returns:
            The loss: a scalar that stays as it is until the next call.

        Raises:
            TrainingFailed: something in the passes cannot be recorded.
        """
        if index == 0:
            self._steps += 1
            self._in_place = self._steps > EAGER_STEPS and (not self._graphs or self._graphs[0].takes(inputs))
        if not self._in_place:
            return self.passes(inputs, factor)
        which = min(index, 1)
        if which == len(self._graphs):
            self._record(inputs, factor)
        recording = self._graphs[which]
        if not recording.takes(inputs):
            return self.passes(inputs, factor)  # adds to the gradients, wherever they lie
        loss = recording.replay(inputs, factor)
        if which == 0:
            for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
                parameter.grad = gradient
        return loss

    def _record(self, inputs: dict[str, Tensor], factor: Tensor) -> None:
        """Record the passes as they are now: writing gradients that are None, adding to those that are there."""
        before = self._graphs[0] if self._graphs else None
        try:
            self._graphs.append(_Recording(self.passes, inputs, factor, before))
        except RuntimeError as reason:
            # Ending a recording that went wrong raises an error of its own, which says less than the first one.
            first = reason.__context__ if isinstance(reason.__context__, RuntimeError) else reason
            usual = "Something in the model waits for the device, or allocates in a way that cannot be replayed"
            if isinstance(first, torch.OutOfMemoryError):
                usual = "Its recording has memory of its own, and the GPU is full"
            raise TrainingFailed(
                f"The plan records a micro-step as a CUDA graph, and that could not be done ({first}). {usual}. Use "
                f"cuda_graphs false, which runs the same steps without; with --resume from the last checkpoint, if "
                f"there is one."
            ) from reason
        if before is None:
            self._gradients = [parameter.grad for parameter in self.parameters]

    def gradient_bytes(self) -> int:
        """Of the gradients that stay between steps."""
        return sum(gradient.nbytes for gradient in self._gradients if gradient is not None)


class _Recording:
    """One graph, and the tensors that it reads and writes."""

    def __init__(self, passes: Passes, inputs: dict[str, Tensor], factor: Tensor, before: _Recording | None) -> None:
        """Record.

        Args:
            before: a recording whose inputs and memory this one shares.
        """
        if before is None:
            self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            self.factor = factor.clone()
        else:
            self.inputs, self.factor = before.inputs, before.factor
        self.graph = torch.cuda.CUDAGraph()
        pool = None if before is None else before.graph.pool()
        # Other threads go on pinning batches and copying checkpoints meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.loss = passes(self.inputs, self.factor)

    def takes(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether the inputs have the shapes and types that were recorded."""
        return inputs.keys() == self.inputs.keys() and all(
            tensor.shape == self.inputs[name].shape and tensor.dtype == self.inputs[name].dtype
            for name, tensor in inputs.items()
        )

    def replay(self, inputs: Mapping[str, Tensor], factor: Tensor) -> Tensor:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.factor.copy_(factor)
        self.graph.replay()
        return self.loss
