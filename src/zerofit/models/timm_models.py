"""Any image classifier of timm (https://github.com/huggingface/pytorch-image-models), with timm's names.

The module is timm's own with four changes: its forward pass takes targets too, its batch norms are `batch_norm`'s, its
rotary positions are fp32 under every precision (`timm_buffers`), and its blocks can be recomputed. Its blocks are what
its lists of modules hold, in the order in which they are called.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.checkpoint import checkpoint

from ..config.image_models import TimmConfig
from ..config.shapes import Recomputation
from ..errors import ConfigError, MissingDependency
from .base import named_unique_parameters
from .batch_norm import batch_norm, recomputation_contexts
from .classification import classification_sums
from .timm_buffers import keep_exact
from .timm_work import watch

#: torchvision's operators that its own import looks for.
_OPERATORS = ("nms", "qnms")
#: Keeps what was registered.
_REGISTERED: list[torch.library.Library] = []


@functools.cache
def import_timm() -> ModuleType:
    """timm.

    timm imports torchvision and uses none of its operators. Where torchvision was built for another PyTorch (the
    registry's beside a CPU build of torch) its import ends at a missing operator; so their names are registered before.

    Raises:
        MissingDependency: it is not installed, or cannot be imported.
    """
    try:
        return _imported()
    except ImportError as reason:
        raise MissingDependency(
            f"model.kind timm builds its model with timm, which cannot be imported here ({reason}). Run `pip install "
            f"'zerofit[timm]'`, or use model.kind resnet, which needs nothing more."
        ) from reason
    except (RuntimeError, AttributeError) as reason:
        raise MissingDependency(
            f"model.kind timm: the installed timm or torchvision does not go with PyTorch {torch.__version__} "
            f"({type(reason).__name__}: {reason}). Install the torchvision that belongs to it "
            f"(https://pytorch.org/get-started), or use model.kind resnet."
        ) from reason


def _imported() -> ModuleType:
    if "torchvision" not in sys.modules and not _torchvision_loads():
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in _OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _REGISTERED.append(library)
    import timm

    module: ModuleType = timm
    return module


def _torchvision_loads() -> bool:
    """Whether torchvision's operators are of this PyTorch; True where there is no torchvision to say so."""
    found = importlib.util.find_spec("torchvision")
    places = list(found.submodule_search_locations or ()) if found is not None else []
    try:
        for library in (path for place in places for path in Path(place).glob("_C*")):
            torch.ops.load_library(library)
    except OSError:
        return False
    return True


def create(config: TimmConfig, **more: Any) -> Any:
    """timm's module, with timm's initial values unless a context keeps it from making them.

    Raises:
        MissingDependency: timm is not there.
        ConfigError: timm has no such model, or refuses these settings.
    """
    timm = import_timm()
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), 1)
        raise ConfigError(
            f"model.name {config.name}: timm {timm.__version__} has no such model."
            f"{f' Did you mean {near[0]}?' if near else ''} `timm.list_models()` lists them."
        )
    settings: dict[str, Any] = {"num_classes": config.classes, **more}
    asked = {name: getattr(config, name) for name in ("drop_rate", "drop_path_rate")}
    settings |= {name: value for name, value in asked.items() if value is not None}
    published = timm.get_pretrained_cfg(config.name)
    if published is not None and published.fixed_input_size:
        settings["img_size"] = config.pixels
    try:
        return timm.create_model(config.name, **settings)
    except (TypeError, ValueError, AssertionError, RuntimeError) as reason:
        dtype = torch.get_default_dtype()
        if dtype is not torch.float32:  # it was built in fp32 before, when it was described
            raise ConfigError(
                f"model.name {config.name}: timm cannot build it in {str(dtype).removeprefix('torch.')} "
                f"({type(reason).__name__}: {reason}), as precision bf16 and fp16 want it. Set precision fp32."
            ) from reason
        raise ConfigError(
            f"model.name {config.name} with input_size {config.pixels}, drop_rate {config.drop_rate} and "
            f"drop_path_rate {config.drop_path_rate}: timm refuses ({type(reason).__name__}: {reason}). Pictures of "
            f"another data.image_size, or drop_rate and drop_path_rate null, may suit this model."
        ) from reason


def _with_targets(model: Any, config: TimmConfig) -> None:
    """``forward(images, targets)`` -> sums, see `classification_sums`; ``forward(images)`` -> logits."""
    logits_of, dtype = model.forward, torch.get_default_dtype()
    layout = torch.channels_last if config.channels_last else torch.contiguous_format

    def forward(images: Tensor, targets: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        logits: Tensor = logits_of(images.to(dtype).contiguous(memory_format=layout))
        if targets is None:
            return logits
        smoothing = config.label_smoothing if model.training else 0.0
        return classification_sums(logits, targets, smoothing, model.training)

    model.forward = forward


def _with_our_batch_norms(model: nn.Module, sync: bool) -> None:
    """Replace what batch norms compute; an activation that timm has put into one stays."""
    for module in model.modules():
        if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) or module.weight is None:
            continue
        after = [part for name in ("drop", "act") if isinstance(part := getattr(module, name, None), nn.Module)]
        known = type(module).forward in (nn.BatchNorm1d.forward, nn.BatchNorm2d.forward)
        if (known or after) and module.momentum is not None and module.track_running_stats:
            vars(module)["forward"] = functools.partial(_normalised, module, tuple(after), sync)


def _normalised(module: Any, after: Sequence[nn.Module], sync: bool, x: Tensor) -> Tensor:
    x = batch_norm(module, x, sync)
    for part in after:
        x = part(x)
    return x


def _recompute(block: nn.Module) -> None:
    """Recompute the block's activations in the backward pass. Around its call: what is compiled lies inside."""
    kind = type(block)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner = functools.partial(kind.__call__, self)
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        return checkpoint(inner, *args, use_reentrant=False, context_fn=recomputation_contexts, **kwargs)

    block.__class__ = type(f"Recomputed{kind.__name__}", (kind,), {"__call__": call})


def blocks_in(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the blocks: entries of the model's lists of modules; of a stage, which is a module with such a list, the
    list's. Single layers are none."""
    for name, child in model.named_children():
        full = f"{prefix}{name}"
        if isinstance(child, nn.Sequential | nn.ModuleList):
            for number, entry in child.named_children():
                inside = list(blocks_in(nn.ModuleDict({number: entry}), f"{full}."))
                if inside:
                    yield from inside
                elif any(part.ndim > 1 for child in entry.children() for part in child.parameters()):
                    yield f"{full}.{number}"
        elif _has_list_of_blocks(child):
            yield from blocks_in(child, f"{full}.")


def parts_in(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of what a model without lists of blocks is made of: modules of several layers, of those that hold such
    modules these."""
    for name, child in model.named_children():
        if any(part.ndim > 1 for layer in child.children() for part in layer.parameters()):
            inside = list(parts_in(child, f"{prefix}{name}.")) if not prefix else []
            yield from inside if len(inside) > 1 else [f"{prefix}{name}"]


def _has_list_of_blocks(module: nn.Module) -> bool:
    return next(blocks_in(module), None) is not None


def describe(config: TimmConfig) -> dict[str, Any]:
    """What a plan needs of the model, JSON-ready: see `config.image_models.TimmConfig.architecture`.

    Raises:
        MissingDependency, ConfigError: as `create`.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = create(config)
    names_of_blocks = list(blocks_in(model)) or list(parts_in(model))
    blocks, sizes = _watched(model, names_of_blocks)
    counted = watch(model, names_of_blocks, samples=2)
    images = torch.zeros(2, 3, config.pixels, config.pixels, device="meta")
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(images)
    except (RuntimeError, AssertionError, ValueError) as reason:
        raise ConfigError(
            f"model.name {config.name} does not take pictures of {config.pixels} x {config.pixels} "
            f"({type(reason).__name__}: {str(reason)[:200]}). Set data.image_size to a size that it does take."
        ) from reason
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    head = [model.get_classifier()] if isinstance(model.get_classifier(), nn.Module) else list(model.get_classifier())
    head_names = [names[id(parameter)] for module in head for parameter in module.parameters()]
    called = [
        name
        for name, count in blocks.items()
        if count == 1 and not any(parameter.startswith(f"{name}.") for parameter in head_names)
    ]
    if not called or not head_names:
        raise ConfigError(
            f"model.name {config.name}: no {'blocks' if head_names else 'head'} can be told apart in what timm builds, "
            f"and plans and strategies need them. Choose another model."
        )
    return {
        "parameters": {name: list(p.shape) for name, p in named_unique_parameters(model).items()},
        "buffers": {name: list(buffer.shape) for name, buffer in _persistent(model)},
        "blocks": called,
        "head": head_names,
        "no_decay": sorted(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else [],
        "forward_flops": counter.get_total_flops() // 2,
        "saved_elements": sizes["all"] // 2,
        "largest_block_elements": sizes["largest"] // 2,
        "boundary_elements": sizes["boundaries"] // 2,
        "work": counted(counter, called),
    }


def _persistent(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    known = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in known)


def _watched(model: nn.Module, names: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Hooks that fill in, during a forward pass of two samples: block -> times called, in order; and elements of what
    modules without children return (``all``), of the block with most of it, and of what blocks return."""
    called: dict[str, int] = {}
    sizes, inside = {"all": 0, "largest": 0, "boundaries": 0}, [0]

    def leaf(module: nn.Module, args: Any, output: Any) -> None:
        elements = output.numel() if isinstance(output, Tensor) else 0
        sizes["all"] += elements
        inside[0] += elements

    def enter(module: nn.Module, args: Any) -> None:
        inside[0] = 0

    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        called[name] = called.get(name, 0) + 1
        sizes["largest"] = max(sizes["largest"], inside[0])
        sizes["boundaries"] += output.numel() if isinstance(output, Tensor) else 0

    for module in model.modules():
        if next(module.children(), None) is None:
            module.register_forward_hook(leaf)
    for name in names:
        block = model.get_submodule(name)
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(functools.partial(leave, name))
    return called, sizes


@functools.lru_cache(maxsize=1)
def _initial(config: TimmConfig, seed: int) -> dict[str, Tensor]:
    """timm's own initial values: a function of the seed, the settings and timm's version."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            held: dict[str, Tensor] = create(config).state_dict()
        finally:
            torch.set_default_dtype(before)
    return held


def published_weights(config: TimmConfig) -> dict[str, Tensor]:
    """timm's pretrained weights of a model, with its own head; from the hub or its cache.

    Raises:
        MissingDependency, ConfigError: timm is not there, has no weights for it, or they cannot be fetched.
    """
    timm = import_timm()
    published = timm.get_pretrained_cfg(config.name) if timm.is_model(config.name) else None
    classes = published.num_classes if published is not None else config.classes
    whole = config.model_copy(update={"num_classes": classes, "drop_rate": None, "drop_path_rate": None})
    try:
        held: dict[str, Tensor] = create(whole, pretrained=True).state_dict()
    except ConfigError:
        raise
    except Exception as reason:  # the hub's library lets whatever its download raised through
        raise ConfigError(
            f"model.pretrained true: timm's weights of {config.name} could not be fetched ({type(reason).__name__}: "
            f"{str(reason)[:200]}). Fetch them where there is a network, and name the file with model.weights_from."
        ) from reason
    return held


def _created(config: TimmConfig) -> nn.Module:
    """The module as the surrounding contexts want it. Some constructors read numbers back from tensors, which fake
    tensors do not have: then it is built without storage first."""
    model: nn.Module
    if detect_fake_mode() is None:
        model = create(config)
        return model
    with unset_fake_temporarily(), torch.device("meta"):
        model = create(config)
    return model.to_empty(device="cpu")


def _created_in_fp32(config: TimmConfig) -> nn.Module:
    """On the CPU; whether values are made of parameters is the surrounding contexts' to say."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            model: nn.Module = create(config)
    finally:
        torch.set_default_dtype(before)
    return model


class TimmSpec:
    """The recipe; see `zerofit.models.base.ModelSpec`."""

    #: timm's constructors look at the shapes of parameters that exist already: ZeRO-3 partitions the finished model.
    partitioned_when_built = True

    def build(
        self, config: TimmConfig, *, checkpoint_every: int = 0, recomputation: Recomputation = "full"
    ) -> nn.Module:
        model = _created(config)
        shapes = {name: tuple(parameter.shape) for name, parameter in named_unique_parameters(model).items()}
        if shapes != config.parameter_shapes():
            differing = sorted(shapes.items() ^ config.parameter_shapes().items())
            raise ConfigError(
                f"model.name {config.name}: the installed timm builds it with other parameters than this run was "
                f"planned or saved with ({differing[0][0]}, for one). Install the timm of then (environment.json of "
                f"the run tells it)."
            )
        keep_exact(model, lambda: _created_in_fp32(config))
        _with_our_batch_norms(model, config.sync_batchnorm)
        _with_targets(model, config)
        vars(model)["zerofit_checkpoint_every"] = checkpoint_every
        vars(model)["zerofit_blocks"] = config.block_names
        for index, block in enumerate(self.blocks(model)):
            if checkpoint_every and index % checkpoint_every == 0:
                _recompute(block)
        return model

    def init(self, config: TimmConfig, name: str, seed: int) -> Tensor:
        """As timm's own: of a model that is built with this seed."""
        return _initial(config, seed)[name].float()

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        names: Sequence[str] = vars(model)["zerofit_blocks"]
        return [model.get_submodule(name) for name in names]

    def compiled_units(self, model: nn.Module) -> Sequence[nn.Module]:
        """As a ResNet's."""
        return self.blocks(model) if vars(model)["zerofit_checkpoint_every"] else [model]

    def example_inputs(self, config: TimmConfig, samples: int) -> dict[str, Tensor]:
        images = torch.zeros(samples, 3, config.pixels, config.pixels, dtype=torch.float32)
        return {"images": images, "targets": torch.zeros(samples, dtype=torch.int64)}

    def decays(self, config: TimmConfig, name: str) -> bool:
        return name in config.decaying()

    def flops_per_item(self, config: TimmConfig) -> int:
        return config.flops_per_item()


SPEC: Any = TimmSpec()
