"""Speed of zerofit's picture pipeline beside torchvision's ImageFolder and DataLoader, on the same files and cores.

    python benchmarks/images_data.py photos --out /data/photos --files 20000
    python benchmarks/images.py --data /data/photos --scratch /data/scratch --out images.json

Every case runs in a process of its own under a time limit; figures are images/s over the last seconds of a case, after
the first `--warmup`. Files and cache are in the page cache (they were just written), as in every epoch after the first.

    build             check, split and write the cache; `again`: recognise that nothing has changed
    cached            ImageLoader from the cache to the device, and the same with random crop, flip and normalisation
    files             ImageLoader from the files: nvJPEG on a GPU where torchvision works, else Pillow in processes
    files_pillow      the same with Pillow in processes
    torchvision       ImageFolder, RandomResizedCrop, flip, ToTensor, Normalize, DataLoader, to the device
    augment           milliseconds of the augmentation alone for a batch that is on the device
    launches          what the loader costs a thread that starts small operations: milliseconds it loses a batch, at
                      `--batches-a-second` from the cache (the interpreter's lock, cores, memory bandwidth)
    train_random      torchvision's ResNet-18 on a batch that stays on the device: AMP, channels-last, compiled
    train_cached, train_files, train_torchvision    the same step fed by each pipeline

``--small`` shrinks batch, pictures and model for a dry run on CPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from datetime import date
from pathlib import Path
from typing import Any

CASES = (
    "build", "cached", "files", "files_pillow", "torchvision", "augment",
    "train_random", "train_cached", "train_files", "train_torchvision", "launches",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/zerofit-images"))
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--out", type=Path, default=Path("images.json"))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--warmup", type=float, default=5)
    parser.add_argument("--limit-seconds", type=float, default=150)
    parser.add_argument("--workers", type=int, help="data.num_workers; chosen by default")
    parser.add_argument("--batches-a-second", type=float, default=60)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--case", default="")
    args = parser.parse_args()
    if args.case:
        run_case(args)
    else:
        run_all(args)


def run_all(args: argparse.Namespace) -> None:
    """Run the cases one after another, print each, write all as JSON."""
    from zerofit.launch.trials import Trial, run_trial

    args.scratch.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"date": date.today().isoformat(), "cores": args.cores, "batch": args.batch, "cases": {}}
    for name in args.cases.split(","):
        arguments = ["--case", name, *(["--small"] if args.small else [])]
        arguments += [] if args.workers is None else ["--workers", str(args.workers)]
        for option in ("data", "scratch", "batch", "cores", "seconds", "warmup", "batches_a_second"):
            arguments += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
        outcome = run_trial(Trial(Path(__file__), arguments, 1, args.limit_seconds))
        results["cases"][name] = {"status": outcome.status, **(outcome.result or {"log": outcome.log_tail[-3000:]})}
        print(name, json.dumps(results["cases"][name]), flush=True)
        args.out.write_text(json.dumps(results, indent=1))


def run_case(args: argparse.Namespace) -> None:
    """One case, in its own process."""
    from zerofit.launch.trials import write_result

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    cases: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "build": build, "augment": augment_alone, "train_random": train_random, "launches": launches,
        **dict.fromkeys(("cached", "files", "files_pillow", "torchvision"), pipeline_alone),
        **dict.fromkeys(("train_cached", "train_files", "train_torchvision"), train_fed),
    }  # fmt: skip
    write_result({**cases[args.case](args), **facts()})


def facts() -> dict[str, Any]:
    import PIL
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "pillow": PIL.__version__}
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    with contextlib.suppress(ImportError, RuntimeError):
        import torchvision

        found["torchvision"] = torchvision.__version__
    return found


def settings(args: argparse.Namespace) -> Any:
    from zerofit.config.images import ImageDataConfig

    sizes = {"cache_size": 64, "image_size": 56, "eval_resize": 64} if args.small else {}
    return ImageDataConfig(
        kind="images", path=args.scratch / "cache", prepare=(str(args.data),), val_fraction=0.02, **sizes
    )


def build(args: argparse.Namespace) -> dict[str, Any]:
    from zerofit.data.prepare.images import prepare_images

    config = settings(args)
    shutil.rmtree(config.path, ignore_errors=True)
    started = time.perf_counter()
    prepared = prepare_images(config, workers=args.cores)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    assert not prepare_images(config).made_now
    pictures = sum(prepared.samples.values())
    return {
        "images": pictures, "seconds": seconds, "images_per_second": pictures / seconds,
        "resize": json.loads((config.path / "meta.json").read_text())["resize"],
        "cache_bytes": prepared.cache_bytes, "skipped": len(prepared.skipped),
        "again_seconds": time.perf_counter() - started,
    }  # fmt: skip


def device() -> Any:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def open_loader(args: argparse.Namespace, read: str) -> tuple[Any, str]:
    """zerofit's loader, and what decodes."""
    from zerofit.data.images import loader as module
    from zerofit.data.images.dataset import open_images
    from zerofit.data.loader import Share

    if read == "files_pillow":
        module.nvjpeg = lambda _: None  # type: ignore[assignment]
    gpu = device().type == "cuda"
    plan = module.ReadPlan(
        "cache" if read == "cached" else "files", device() if gpu else None, args.workers, pin_memory=gpu
    )
    loader = module.ImageLoader(open_images(args.scratch / "cache", "train", 1), Share(args.batch, 1, 0, 1), plan)
    return loader, type(loader._reader).__name__


def zerofit_batches(
    args: argparse.Namespace, read: str, *, augment: bool
) -> tuple[Generator[Any, None, None], str, list[tuple[float, float]]]:
    """Endless (images, targets); what decodes; and, as it goes, the seconds that each batch was waited for and that
    its augmentation took to start."""
    from zerofit.data.augment import Augment

    loader, decoder = open_loader(args, read)
    transform = Augment(settings(args), train=True, channels_last=True)
    times: list[tuple[float, float]] = []

    def batches() -> Generator[Any, None, None]:
        try:
            for step in itertools.count():
                asked = time.perf_counter()
                (batch,) = loader.window(step)
                came = time.perf_counter()
                inputs = transform(batch.inputs) if augment else batch.inputs
                times.append((came - asked, time.perf_counter() - came))
                yield inputs["images"], inputs["targets"]
        finally:
            loader.close()

    return batches(), decoder, times


def median_milliseconds(times: list[tuple[float, float]]) -> dict[str, float]:
    """Of the later half of the batches: how long the consuming thread waited, and started the augmentation."""
    late = times[len(times) // 2 :]
    names = ("wait_milliseconds", "augment_host_milliseconds")
    return {name: 1e3 * statistics.median(column) for name, column in zip(names, zip(*late, strict=True), strict=True)}


def torchvision_batches(args: argparse.Namespace) -> Iterator[Any]:
    """Endless (images, targets) of the usual pipeline."""
    import torch
    from torchvision import datasets, transforms

    size = settings(args).image_size
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(args.data, chain), args.batch, shuffle=True, num_workers=args.cores, pin_memory=True,
        drop_last=True, persistent_workers=True,
    )  # fmt: skip
    while True:
        for images, targets in loader:
            yield (
                images.to(device(), non_blocking=True, memory_format=torch.channels_last),
                targets.to(device(), non_blocking=True),
            )


def measure(args: argparse.Namespace, step: Callable[[], object]) -> dict[str, Any]:
    """Images/s of `step`, a batch each, over `--seconds` after `--warmup`. Synchronised at both ends alone."""
    started = time.perf_counter()
    step()
    first = time.perf_counter() - started
    while time.perf_counter() - started < first + args.warmup:
        step()
    synchronize()
    begun, steps, times = time.perf_counter(), 0, []
    while time.perf_counter() - begun < args.seconds:
        before = time.perf_counter()
        step()
        times.append(time.perf_counter() - before)
        steps += 1
    synchronize()
    seconds = time.perf_counter() - begun
    return {
        "images_per_second": steps * args.batch / seconds, "steps": steps, "first_batch_seconds": first,
        "longest_step_seconds": max(times),
    }  # fmt: skip


def pipeline_alone(args: argparse.Namespace) -> dict[str, Any]:
    """A pipeline with nothing behind it; zerofit's with and without its augmentation."""
    if args.case == "torchvision":
        source = torchvision_batches(args)
        return measure(args, lambda: next(source))
    found: dict[str, Any] = {}
    for name, augment in (("read", False), ("read_and_augment", True)):
        source, found["reader"], times = zerofit_batches(args, args.case, augment=augment)
        found[name] = measure(args, lambda source=source: next(source))  # type: ignore[misc]
        found[name] |= median_milliseconds(times)
        source.close()
    found["images_per_second"] = found["read_and_augment"]["images_per_second"]
    return found


def augment_alone(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a batch of the random crop, flip and normalisation; compiled; and the evaluation transform."""
    from zerofit.data.augment import Augment

    loader, _ = open_loader(args, "cached")
    (batch,) = loader.window(0)
    loader.close()
    config = settings(args)
    colourful = config.model_copy(update={"augment": config.augment.model_copy(update={
        "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1})})  # fmt: skip
    randaugment = config.model_copy(update={"augment": config.augment.model_copy(update={"randaugment_ops": 2})})
    mixing = config.model_copy(
        update={"augment": config.augment.model_copy(update={"mixup_alpha": 0.2, "cutmix_alpha": 1.0})}
    )
    forms: dict[str, tuple[Any, dict[str, Any]]] = {
        "train": (config, {"train": True}), "train_compiled": (config, {"train": True, "compile": True}),
        "evaluate": (config, {"train": False}), "mixup_and_cutmix": (mixing, {"train": True, "num_classes": 10}),
        "colour_jitter": (colourful, {"train": True}), "randaugment": (randaugment, {"train": True}),
    }  # fmt: skip
    found = {}
    for name, (form, options) in forms.items():
        try:
            found[f"{name}_milliseconds"] = milliseconds(Augment(form, channels_last=True, **options), batch.inputs)
        except Exception as error:  # kornia or a compiler may be missing: the other figures still count
            found[f"{name}_error"] = str(error)[:300]
    return found


def milliseconds(transform: Callable[[Any], object], inputs: Any) -> float:
    """Median of 20 calls, each synchronised."""
    times = []
    for _ in range(25):
        synchronize()
        started = time.perf_counter()
        transform(inputs)
        synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[5:])


def launches(args: argparse.Namespace) -> dict[str, Any]:
    """Small operations started in this thread, alone and beside the loader; one batch is taken every so often."""
    import torch

    small = torch.zeros(8, device=device())

    def seconds_of(operations: int) -> float:
        started = time.perf_counter()
        for _ in range(operations):
            torch.add(small, small)
        return time.perf_counter() - started

    for _ in range(20):
        seconds_of(1000)
    alone = statistics.median(seconds_of(1000) for _ in range(100)) / 1000
    loader, reader = open_loader(args, "cached")
    for step in range(5):
        loader.window(step)
    slices, batches, begun = [], 0, time.perf_counter()
    while (now := time.perf_counter() - begun) < args.seconds:
        slices.append(seconds_of(100))
        if now * args.batches_a_second > batches:
            loader.window(5 + batches)
            batches += 1
    loader.close()
    lost = sum(slices) - 100 * len(slices) * alone
    return {
        "reader": reader, "batches_a_second": batches / args.seconds, "microseconds_alone": 1e6 * alone,
        "microseconds_beside": 1e4 * statistics.mean(slices), "lost_milliseconds_a_batch": 1e3 * lost / max(batches, 1),
    }  # fmt: skip


def train_step(args: argparse.Namespace) -> Callable[[Any, Any], object]:
    """A step of torchvision's ResNet-18 (a small convolution with ``--small``): AMP, channels-last, compiled."""
    import torch

    if args.small:
        model: Any = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 7, 4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
            torch.nn.Linear(8, 1000),
        )  # fmt: skip
    else:
        from torchvision.models import resnet18

        model = resnet18()
    model = model.to(device(), memory_format=torch.channels_last)
    on_gpu = device().type == "cuda"
    run = torch.compile(model) if on_gpu else model
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scaler = torch.amp.GradScaler(enabled=on_gpu)

    def step(images: Any, targets: Any) -> object:
        with torch.autocast(device().type, dtype=torch.float16, enabled=on_gpu):
            loss = torch.nn.functional.cross_entropy(run(images), targets)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    return step


def train_random(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    size = settings(args).image_size
    images = torch.randn(args.batch, 3, size, size, device=device()).to(memory_format=torch.channels_last)
    targets = torch.randint(0, 1000, (args.batch,), device=device())
    step = train_step(args)
    return measure(args, lambda: step(images, targets)) | gpu_timeline(lambda: step(images, targets))


def gpu_timeline(step: Callable[[], object]) -> dict[str, Any]:
    """What the GPU does during 10 more steps, each under the profiler's own cost on the host."""
    if device().type != "cuda":
        return {}
    from timeline import profiled

    return profiled(step, 10)


def train_fed(args: argparse.Namespace) -> dict[str, Any]:
    step = train_step(args)
    if args.case == "train_torchvision":
        usual = torchvision_batches(args)
        return {"reader": "torchvision", **measure(args, lambda: step(*next(usual)))}
    stages = timed_stages()
    source, decoder, times = zerofit_batches(args, args.case.removeprefix("train_"), augment=True)
    found = measure(args, lambda: step(*next(source)))
    found |= gpu_timeline(lambda: step(*next(source)))
    source.close()
    medians = {name: 1e3 * statistics.median(taken[len(taken) // 2 :]) for name, taken in stages.items() if taken}
    return {"reader": decoder, **found, **median_milliseconds(times), "stage_milliseconds": medians}


def timed_stages() -> dict[str, list[float]]:
    """Seconds of each call of what the loader's thread does, as they come; by name."""
    from zerofit.data.images.gpu_files import GpuFilesReader
    from zerofit.data.images.processes import Processes

    def timed(call: Callable[..., Any], taken: list[float]) -> Callable[..., Any]:
        def measured(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                taken.append(time.perf_counter() - started)

        return measured

    found: dict[str, list[float]] = {}
    for owner, name in (
        (Processes, "_take"), (Processes, "_ask"), (GpuFilesReader, "_copied"), (GpuFilesReader, "_decode_jpegs"),
        (GpuFilesReader, "_laid_out"),
    ):  # fmt: skip
        taken = found.setdefault(f"{owner.__name__}.{name}", [])
        setattr(owner, name, timed(getattr(owner, name), taken))
    return found


if __name__ == "__main__":
    main()
