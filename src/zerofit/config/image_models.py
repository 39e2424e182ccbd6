"""Shapes of image classifiers. Plain pydantic: counting parameters needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from .shapes import ModelShape


class ImageModelShape(ModelShape):
    """A classifier of pictures."""

    task: ClassVar[str] = "image_classification"
    items: ClassVar[str] = "images"

    num_classes: Annotated[int, Field(ge=1)] | None = None
    """Classes; unset takes them from the prepared data."""
    input_size: Annotated[int, Field(ge=8)] | None = None
    """Height and width of the pictures that the model sees, in pixels; unset takes ``data.image_size``."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each training target that is spread over all classes (Szegedy et al. 2016); 0.1 is usual."""
    weights_from: Path | None = None
    """File or checkpoint whose weights a new run starts from: a state dict (.pt, .pth, .safetensors) with torchvision's
    names, or a run of zerofit. A head of another number of classes starts afresh."""
    pretrained: bool = False
    """Start from published ImageNet weights, fetched by name (needs the network once); else as ``weights_from``."""

    freeze_epochs: Annotated[int, Field(ge=0)] = 0
    """Train the head alone for so many epochs, then the whole network; 0: the whole network from the start. Wants
    weights to start from. The backbone runs as in evaluation meanwhile: its batch norms' statistics stay."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.pretrained and self.weights_from is not None:
            raise ValueError(
                f"model.pretrained and model.weights_from {self.weights_from} were both set, and weights come from one "
                f"place; leave one of them out"
            )
        return self

    @property
    def classes(self) -> int:
        """`num_classes` as a number.

        Raises:
            ValueError: it is still open.
        """
        if self.num_classes is None:
            raise ValueError("num_classes is not set: prepare the data first, or set model.num_classes")
        return self.num_classes

    @property
    def pixels(self) -> int:
        """`input_size` as a number.

        Raises:
            ValueError: it is still open.
        """
        if self.input_size is None:
            raise ValueError("input_size is not set: it comes from data.image_size, or set model.input_size")
        return self.input_size

    @property
    def logits_per_sample(self) -> int:
        return self.classes


@dataclass(frozen=True)
class Convolution:
    """One convolution of a ResNet; its parameters are named after it, and those of the batch norm after `norm`.

    Attributes:
        name, norm: of the modules.
        inputs, outputs: channels.
        kernel, stride: pixels.
        size: height and width of its output, pixels.
        block: 1 .. depth of the residual block; 0 for the stem.
    """

    name: str
    norm: str
    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int
    block: int

    @property
    def weights(self) -> int:
        """Parameters of the convolution."""
        return self.inputs * self.outputs * self.kernel**2

    @property
    def output_elements(self) -> int:
        """Of one sample."""
        return self.outputs * self.size**2

    @property
    def flops(self) -> int:
        """Of a forward pass of one sample; a multiplication and its addition count as two."""
        return 2 * self.weights * self.size**2


#: Blocks of the four stages, and whether a block is a bottleneck of three convolutions (He et al. 2016, table 1).
RESNET_STAGES: dict[int, tuple[tuple[int, int, int, int], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
}


#: Channels of a ResNet's first stage as published, and as torchvision builds them.
PUBLISHED_WIDTH = 64


class ResNetConfig(ImageModelShape):
    """ResNet (He et al. 2016), as torchvision has it: the stride of a bottleneck is in its 3 x 3 convolution."""

    depth_key: ClassVar[str] = "layers"
    blocks_alike: ClassVar[bool] = False

    kind: Literal["resnet"] = "resnet"
    layers: Literal[18, 34, 50] = 18
    """Layers with weights, as in ResNet-18."""
    base_width: Annotated[int, Field(ge=1)] = PUBLISHED_WIDTH
    """Channels of the first stage; each next one has twice as many. 64 is the published model."""
    zero_init_residual: bool = False
    """Start each block as the identity: the last batch norm's weight is 0 (Goyal et al. 2017)."""
    channels_last: bool = True
    """Keep activations in the layout that tensor cores want (NHWC); the results are the same up to rounding."""
    sync_batchnorm: bool = False
    """Batch statistics over all ranks' micro-batches instead of each rank's own."""

    @property
    def depth(self) -> int:
        """Residual blocks."""
        return sum(RESNET_STAGES[self.layers][0])

    def with_depth(self, depth: int) -> Self:
        """Itself: the blocks differ, so that none stands for another."""
        return self

    def head_parameters(self) -> frozenset[str]:
        return frozenset({"fc.weight", "fc.bias"})

    @property
    def features(self) -> int:
        """Channels before the head."""
        return 8 * self.base_width * (4 if RESNET_STAGES[self.layers][1] else 1)

    def convolutions(self, size: int | None = None) -> list[Convolution]:
        """All, in the order in which they are registered: a block's own, then that of its shortcut.

        Args:
            size: of the pictures; default `input_size`. Only sizes of outputs depend on it.
        """
        half = _halved(self.pixels if size is None else size)
        found = [Convolution("conv1", "bn1", 3, self.base_width, 7, 2, half, 0)]
        size, channels, number = _halved(half), self.base_width, 0  # after the max pooling
        stages, bottleneck = RESNET_STAGES[self.layers]
        for stage, blocks in enumerate(stages):
            width = self.base_width << stage
            for index in range(blocks):
                number += 1
                stride = 2 if stage and not index else 1
                block = _Block(f"layer{stage + 1}.{index}", channels, width, stride, size, number, bottleneck)
                found += block.convolutions()
                channels, size = block.outputs, block.size_after
        return found

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for conv in self.convolutions(size=224):
            shapes[f"{conv.name}.weight"] = (conv.outputs, conv.inputs, conv.kernel, conv.kernel)
            shapes[f"{conv.norm}.weight"] = shapes[f"{conv.norm}.bias"] = (conv.outputs,)
        shapes["fc.weight"], shapes["fc.bias"] = (self.classes, self.features), (self.classes,)
        return shapes

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for conv in self.convolutions(size=224):
            shapes[f"{conv.norm}.running_mean"] = shapes[f"{conv.norm}.running_var"] = (conv.outputs,)
            shapes[f"{conv.norm}.num_batches_tracked"] = ()
        return shapes

    def flops_per_item(self) -> int:
        """Three times the convolutions and the head: forward, and the gradients of inputs and of weights."""
        return 3 * (sum(conv.flops for conv in self.convolutions()) + 2 * self.features * self.classes)

    def block_inputs_per_sample(self) -> list[int]:
        pooled = self.base_width * _halved(_halved(self.pixels)) ** 2
        # A block's last convolution gives as many elements as the block.
        outputs = {conv.block: conv.output_elements for conv in self.convolutions() if conv.block}
        return [pooled, *list(outputs.values())[:-1]]

    def saved_elements_per_sample(self, every: int) -> int:
        """A convolution's output and its normalised, rectified one; of recomputed blocks their input alone."""
        convolutions = self.convolutions()
        kept, largest, boundary = 0, 0, 0
        for number in range(self.depth + 1):
            own = sum(2 * conv.output_elements for conv in convolutions if conv.block == number)
            recomputed = bool(every) and number > 0 and (number - 1) % every == 0
            kept += boundary if recomputed else own
            largest = max(largest, own if recomputed else 0)
            boundary = [conv.output_elements for conv in convolutions if conv.block == number][-1]
        return kept + largest


class TimmConfig(ImageModelShape):
    """Any image classifier that timm knows, by its name; timm must be installed (``zerofit[timm]``)."""

    blocks_alike: ClassVar[bool] = False
    inputs_to_host: ClassVar[bool] = False  # some blocks take several tensors, others the same one as their neighbours

    kind: Literal["timm"] = "timm"
    name: str
    """As ``timm.list_models()`` has it: ``resnet18``, ``convnext_tiny``, ``vit_small_patch16_224``."""
    drop_rate: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout before the head; null: the model's own default, mostly 0."""
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Stochastic depth (Huang et al. 2016), where the model has it; null: the model's own default (Swin: 0.1)."""
    channels_last: bool = True
    """Keep activations in the layout that tensor cores want (NHWC); the results are the same up to rounding."""
    sync_batchnorm: bool = False
    """Batch statistics over all ranks' micro-batches instead of each rank's own."""
    architecture: dict[str, Any] = Field(default_factory=dict, repr=False)
    """What timm builds: ``parameters`` and ``buffers`` (name -> shape), names of ``blocks``, of the ``head``'s
    parameters and of those with ``no_decay``; ``forward_flops``, ``saved_elements``, ``boundary_elements`` and
    ``largest_block_elements`` of one picture, and its ``work`` (`models.timm_work`). Read from timm when a plan is
    made."""

    def __hash__(self) -> int:
        return hash((self.name, self.num_classes, self.input_size, self.drop_rate, self.drop_path_rate))

    def _told(self, what: str) -> Any:
        if not self.architecture:
            raise ValueError(f"{self.name}: the model's parameters are not known yet")
        return self.architecture[what]

    @property
    def block_names(self) -> tuple[str, ...]:
        """Of the blocks, in the order in which they are called."""
        return tuple(self._told("blocks"))

    @property
    def depth(self) -> int:
        return len(self.block_names)

    def with_depth(self, depth: int) -> Self:
        """Itself: the blocks differ, so that none stands for another."""
        return self

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(shape) for name, shape in self._told("parameters").items()}

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(shape) for name, shape in self._told("buffers").items()}

    def head_parameters(self) -> frozenset[str]:
        return frozenset(self._told("head"))

    @property
    def work(self) -> dict[str, Any] | None:
        """What a forward pass computes, see `models.timm_work`; None in plans that were made before it was counted."""
        return self.architecture.get("work")

    def decaying(self) -> frozenset[str]:
        """Not what timm's author left out (positions, class tokens)."""
        return super().decaying() - frozenset(self._told("no_decay"))

    def flops_per_item(self) -> int:
        """Three times what one picture's forward pass counts in matrix products and convolutions."""
        return 3 * int(self._told("forward_flops"))

    def saved_elements_per_sample(self, every: int) -> int:
        """What every module returns; of recomputed blocks their output, and one block at a time."""
        everything, boundaries = int(self._told("saved_elements")), int(self._told("boundary_elements"))
        if not every:
            return everything
        largest = int(self._told("largest_block_elements"))
        return everything - (everything - boundaries) // every + largest


@dataclass(frozen=True)
class _Block:
    """A residual block: basic (two 3 x 3 convolutions) or a bottleneck (1 x 1, 3 x 3, 1 x 1)."""

    name: str
    inputs: int
    width: int
    stride: int
    size: int
    number: int
    bottleneck: bool

    @property
    def outputs(self) -> int:
        return self.width * (4 if self.bottleneck else 1)

    @property
    def size_after(self) -> int:
        return _halved(self.size) if self.stride == 2 else self.size

    def convolutions(self) -> list[Convolution]:
        if self.bottleneck:
            main = [(self.inputs, self.width, 1, 1), (self.width, self.width, 3, self.stride),
                    (self.width, self.outputs, 1, 1)]  # fmt: skip
        else:
            main = [(self.inputs, self.width, 3, self.stride), (self.width, self.width, 3, 1)]
        found, size = [], self.size
        for place, (inputs, outputs, kernel, stride) in enumerate(main, 1):
            size = self.size_after if stride == 2 else size
            name, norm = f"{self.name}.conv{place}", f"{self.name}.bn{place}"
            found.append(Convolution(name, norm, inputs, outputs, kernel, stride, size, self.number))
        if self.stride != 1 or self.inputs != self.outputs:
            name, norm = f"{self.name}.downsample.0", f"{self.name}.downsample.1"
            found.append(
                Convolution(name, norm, self.inputs, self.outputs, 1, self.stride, self.size_after, self.number)
            )
        return found


def _halved(size: int) -> int:
    """After a stride of 2 with the padding of a ResNet."""
    return (size + 1) // 2
