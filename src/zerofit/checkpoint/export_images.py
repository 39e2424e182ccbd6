"""Classifiers out of zerofit: a state dict with torchvision's names, safetensors, or ONNX.

Beside the file lies ``FILE.json`` with what its user has to know: the classes in their order, and how pictures are
resized, cropped and normalised. Both get their names when the file was read back and compared.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.image_models import PUBLISHED_WIDTH, ImageModelShape, ResNetConfig, TimmConfig
from ..data.augment import IMAGENET_MEAN, IMAGENET_STD
from ..errors import CheckpointError, MissingDependency, RequestError
from .export import Exported
from .manifest import make_durable
from .model import load_model
from .outgoing import DTYPES
from .source import Source

#: Of ONNX's operators; old enough for runtimes of some years.
OPSET = 18
#: What ONNX Runtime's results may differ by from PyTorch's, in fp32.
TOLERANCE = 1e-3


def export_classifier(
    saved: Source, model: ImageModelShape, out: Path, *, to: str, dtype: str, force: bool
) -> Exported:
    """Write `saved` to the file `out`.

    Args:
        to: a key of `WRITERS`.
        dtype: ``fp32``, ``bf16`` or ``fp16``: of the weights; running statistics stay fp32.

    Raises:
        RequestError: the format or its type is not for classifiers, or `out` is taken.
        MissingDependency: ONNX wants packages that are not installed.
        CheckpointError: the checkpoint is not whole, or what was written reads back otherwise.
    """
    if to not in WRITERS:
        raise RequestError(f"--to {to} is for language models. A classifier is exported {_either(sorted(WRITERS))}.")
    if to == "onnx" and dtype != "fp32":
        raise RequestError(f"--to onnx with --dtype {dtype}: ONNX is written in fp32; quantise it with its own tools.")
    beside = out.with_name(f"{out.name}.json")
    taken = next((path for path in (out, beside) if path.exists()), None)
    if out.is_dir() or (taken is not None and not force):
        raise RequestError(f"{taken} exists already. Choose another place, or replace a file with --force.")
    module, _ = load_model(saved)
    facts = _facts(saved, model)
    work = out.with_name(f".{out.name}.partial")
    work.parent.mkdir(parents=True, exist_ok=True)
    try:
        notes = WRITERS[to](module, model, facts, DTYPES[dtype], work)
        make_durable(work)
        beside.write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
        work.replace(out)
    finally:
        work.unlink(missing_ok=True)
    size = sum(path.stat().st_size for path in (out, beside))
    return Exported(
        out,
        to,
        dtype,
        (out.name, beside.name),
        size,
        model.parameter_count(),
        saved.step,
        (*notes, _two_lines(out, to, model)),
    )


def _facts(saved: Source, model: ImageModelShape) -> dict[str, Any]:
    return {
        "model": model.model_dump(mode="json", exclude={"weights_from", "pretrained", "freeze_epochs", "architecture"}),
        "step": saved.step,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        **(saved.state.get("facts") or {}),
    }


def _either(names: list[str]) -> str:
    return "as " + " or ".join(names)


def _two_lines(out: Path, to: str, model: ImageModelShape) -> str:
    if to == "onnx":
        return f"In Python: onnxruntime.InferenceSession({str(out)!r}).run(None, {{'images': pictures}})."
    load = f"torch.load({str(out)!r})" if to == "pt" else f"safetensors.torch.load_file({str(out)!r})"
    made = f"torchvision.models.resnet{getattr(model, 'layers', 18)}(num_classes={model.classes})"
    if isinstance(model, ResNetConfig) and model.base_width != PUBLISHED_WIDTH:
        shape = f"layers={model.layers}, base_width={model.base_width}, num_classes={model.classes}"
        return (
            f"In PyTorch: model = ResNet(ResNetConfig({shape})); model.load_state_dict({load}). ResNet is that of "
            f"zerofit.models.resnet and ResNetConfig of zerofit.config.image_models: torchvision's have base_width "
            f"{PUBLISHED_WIDTH}."
        )
    if isinstance(model, TimmConfig):
        made = f"timm.create_model({model.name!r}, num_classes={model.classes})"
    return f"In PyTorch: model = {made}; model.load_state_dict({load})."


def weights(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The module's state dict; parameters in `dtype`, buffers as they are."""
    parameters = dict(module.named_parameters())
    return {
        name: (tensor.to(dtype) if name in parameters else tensor).detach().contiguous()
        for name, tensor in module.state_dict().items()
    }


def _write_pt(module: nn.Module, model: ImageModelShape, facts: Any, dtype: torch.dtype, path: Path) -> list[str]:
    content = weights(module, dtype)
    torch.save(content, path)
    _compare(content, torch.load(path, weights_only=True))
    return []


def _write_safetensors(
    module: nn.Module, model: ImageModelShape, facts: Any, dtype: torch.dtype, path: Path
) -> list[str]:
    from safetensors.torch import load_file, save_file

    content = weights(module, dtype)
    save_file(content, path, {"format": "pt", "zerofit": json.dumps(facts)})
    _compare(content, load_file(path))
    return []


def _compare(written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    for name, tensor in written.items():
        if not torch.equal(tensor, read[name]):
            raise CheckpointError(f"What was written for {name} reads back with other values; nothing was left behind.")


def _write_onnx(module: nn.Module, model: ImageModelShape, facts: Any, dtype: torch.dtype, path: Path) -> list[str]:
    """Input ``images`` (batch, 3, S, S) fp32, normalised; output ``logits`` (batch, classes)."""
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch.onnx writes through it)
    except ImportError as error:
        raise MissingDependency("--to onnx needs onnx and onnxscript: run `pip install 'zerofit[onnx]'`.") from error
    images = torch.randn((2, 3, model.pixels, model.pixels), generator=torch.Generator().manual_seed(0))
    # It tells that torchvision's operators are not there, which no model here has.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own parts
        program = torch.onnx.export(
            module, (images,), dynamo=True, opset_version=OPSET, input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: "batch"},), verbose=False,
        )  # fmt: skip
    assert program is not None
    proto = program.model_proto
    for key in ("classes", "mean", "std", "image_size", "eval_resize"):
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, json.dumps(facts.get(key))
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())
    return [_compared_with_runtime(module, images, path)]


def _compared_with_runtime(module: nn.Module, images: Tensor, path: Path) -> str:
    """Run it where ONNX Runtime is installed.

    Raises:
        CheckpointError: it computes something else.
    """
    try:
        import onnxruntime
    except ImportError:
        return "ONNX's checker accepts the file; ONNX Runtime is not installed, so it was not run."
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        wanted = module(images)
    error = (found - wanted).abs().max().item() / max(wanted.abs().max().item(), 1e-6)
    if error > TOLERANCE:
        raise CheckpointError(f"ONNX Runtime's logits differ from PyTorch's by {error:.2g}; nothing was left behind.")
    return f"ONNX Runtime's logits differ from PyTorch's by {error:.1g} of the largest."


Writer = Callable[[nn.Module, ImageModelShape, Any, torch.dtype, Path], list[str]]
WRITERS: dict[str, Writer] = {"pt": _write_pt, "safetensors": _write_safetensors, "onnx": _write_onnx}
