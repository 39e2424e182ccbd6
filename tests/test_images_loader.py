"""Batches of pictures: the same for every number of ranks, for every reader, and after a jump."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pictures import draw, write_animals, write_folder
from zerofit.config.images import ImageDataConfig
from zerofit.data.images import loader as loader_module
from zerofit.data.images import readers
from zerofit.data.images.ahead import Ahead
from zerofit.data.images.dataset import ImageDataset, open_images
from zerofit.data.images.gpu_files import GpuFilesReader, nvjpeg
from zerofit.data.images.loader import ImageEvaluation, ImageLoader, ReadPlan
from zerofit.data.images.processes import Processes
from zerofit.data.images.readers import CanvasReader
from zerofit.data.images.store import ImageStore
from zerofit.data.images.work import Canvases, WholeFiles
from zerofit.data.loader import IGNORE, Share
from zerofit.data.prepare.images import prepare_images
from zerofit.errors import DataError, ZerofitError
from zerofit.types import Batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of unequal size; lying, standing and square pictures, one of them a PNG, one turned by EXIF."""
    folder = tmp_path_factory.mktemp("pictures")
    root = write_folder(folder / "in", classes=("cat",), each=20)
    write_folder(root, classes=("dog",), each=10, size=(24, 33))
    write_folder(root, classes=("eel",), each=5, size=(50, 50))
    draw(35, 28, 500).save(root / "eel" / "p.png")
    exif = __import__("PIL.Image").Image.Exif()
    exif[0x0112] = 6
    draw(35, 28, 501).save(root / "eel" / "t.jpg", quality=95, exif=exif)
    config = ImageDataConfig(kind="images", path=folder / "out", prepare=(str(root),), cache_size=24, val_fraction=0.2)
    prepare_images(config, workers=1)
    return folder / "out"


def _dataset(prepared: Path, split: str = "train", seed: int = 5, *, balanced: bool = False) -> ImageDataset:
    return open_images(prepared, split, seed, balanced=balanced)


def _rows(batch: Batch) -> list[tuple[object, ...]]:
    """A batch's samples as comparable values; only the filled part of a canvas counts."""
    inputs = batch.inputs
    rows = []
    for image, (h, w, t), target, seed in zip(
        inputs["images"], inputs["sizes"].tolist(), inputs["targets"].tolist(), inputs["seeds"].tolist(), strict=True
    ):
        rows.append((image[:, :h, :w].numpy().tobytes(), h, w, t, target, seed))
    return rows


def _step(prepared: Path, step: int, world: int, micro: int, accumulation: int, **plan: object) -> list[object]:
    """A step's samples, micro-step by micro-step and rank by rank."""
    loaders = [
        ImageLoader(_dataset(prepared), Share(micro, accumulation, rank, world), ReadPlan(**plan))  # type: ignore[arg-type]
        for rank in range(world)
    ]
    windows = [loader.window(step) for loader in loaders]
    for loader in loaders:
        loader.close()
    return [row for m in range(accumulation) for window in windows for row in _rows(window[m])]


@pytest.mark.parametrize("step", [0, 1, 17])
def test_samples_do_not_depend_on_the_number_of_ranks(prepared: Path, step: int) -> None:
    alone = _step(prepared, step, 1, 12, 1)
    assert len(set(alone)) == 12
    for world, micro, accumulation in ((2, 6, 1), (2, 2, 3), (3, 4, 1), (4, 1, 3)):
        assert _step(prepared, step, world, micro, accumulation) == alone


def test_windows_in_any_order(prepared: Path) -> None:
    loader = ImageLoader(_dataset(prepared), Share(3, 2, 0, 1))
    walked = [_rows(loader.window(step)[1]) for step in range(5)]
    assert _rows(loader.window(3)[1]) == walked[3]
    assert _rows(loader.window(1)[1]) == walked[1]
    assert _rows(loader.window(2)[1]) == walked[2]
    (first, _) = loader.window(0)
    assert first.weight == 3
    assert first.inputs["images"].shape == (3, 3, 24, 33)
    assert first.inputs["images"].is_contiguous(memory_format=torch.channels_last)
    assert loader.epoch_of_step(100) == 600 // loader.dataset.samples
    loader.close()


def test_an_epoch_sees_every_picture_once_and_keys_never_repeat(prepared: Path) -> None:
    dataset = _dataset(prepared)
    assert sorted(dataset.sample_indices(dataset.samples, dataset.samples).tolist()) == list(range(dataset.samples))
    assert dataset.sample_indices(0, 9).tolist() != dataset.sample_indices(dataset.samples, 9).tolist()
    keys = dataset.sample_keys(0, 3 * dataset.samples)
    assert len(set(keys.tolist())) == 3 * dataset.samples
    assert dataset.sample_keys(7, 1)[0] == keys[7]
    assert _dataset(prepared, seed=6).sample_keys(7, 1)[0] != keys[7]


def test_balanced_epochs(prepared: Path) -> None:
    dataset = _dataset(prepared, balanced=True)
    plain = Counter(dataset.labels.tolist())
    assert len(set(plain.values())) == 3
    places = dataset.sample_indices(0, dataset.samples)
    assert set(Counter(dataset.labels[places].tolist()).values()) == {dataset.samples // 3}
    assert dataset.sample_indices(5, 3).tolist() == places[5:8].tolist()
    # Small classes repeat evenly, and large ones are seen whole over the epochs.
    seen = Counter(dataset.sample_indices(0, 3 * dataset.samples).tolist())
    assert set(seen) == set(range(len(dataset.labels)))
    of_eel = [count for place, count in seen.items() if dataset.labels[place] == 2]
    assert max(of_eel) - min(of_eel) <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_files_give_the_cache_s_pixels(prepared: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "DECODED_TOGETHER", 4)
    assert _step(prepared, 1, 1, 6, 2, read="files", num_workers=workers) == _step(prepared, 1, 1, 6, 2)


def _with_pillow(encoded: list[torch.Tensor]) -> list[torch.Tensor]:
    """What a GPU's decoder gives: pixels as they lie in the file."""
    import io

    from PIL import Image

    opened = [Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB") for data in encoded]
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in opened]


def test_a_gpu_s_decoder_gives_upright_pictures_in_full_size(prepared: Path) -> None:
    dataset = _dataset(prepared)
    reader = GpuFilesReader(dataset.store, CPU, _with_pillow, workers=0)
    ((canvas, sizes),) = reader.batches([dataset.numbers])
    reader.close()
    assert canvas.shape == (len(dataset.numbers), 30, 40, 3)  # 50 x 50 is above twice 24, and was shrunk
    for number, pixels, (height, width, transposed) in zip(dataset.numbers, canvas, sizes.tolist(), strict=True):
        record = dataset.store.index[number]
        assert transposed == record["transposed"]
        kept = torch.from_numpy(dataset.store.pixels(int(number)).copy()).permute(2, 0, 1)[None].float()
        full = pixels[:height, :width].permute(2, 0, 1)[None].float()
        small = torch.nn.functional.interpolate(full, kept.shape[2:], mode="bilinear", antialias=True)
        # 50 x 50 was decoded at half its size for the cache. A wrong turn differs by 30 and more.
        assert (small - kept).abs().mean() < 3


def test_large_files_are_shrunk_and_bad_ones_go_to_pillow(prepared: Path) -> None:
    dataset = _dataset(prepared)
    dataset.store.meta["request"]["cache_size"] = 10
    reader = GpuFilesReader(dataset.store, CPU, _with_pillow, workers=1)
    ((_, sizes),) = reader.batches([dataset.numbers[dataset.labels < 2]])
    assert set(sizes[:, 0].tolist()) == {10}
    dataset.store.meta["request"]["cache_size"] = 24

    def cannot(encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError("unsupported")

    reader.decoder = cannot
    reader.size = 24
    ((canvas, sizes),) = reader.batches([dataset.numbers])
    reader.close()
    for number, pixels, (height, width, _) in zip(dataset.numbers, canvas, sizes.tolist(), strict=True):
        assert (pixels[:height, :width].numpy() == dataset.store.pixels(int(number))).all()


def test_bytes_stay_while_they_are_decoded(prepared: Path) -> None:
    """Whoever takes files from the processes works ahead, and must not write over what is being decoded."""
    dataset = _dataset(prepared)

    def slow(encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        time.sleep(0.05)
        return _with_pillow(encoded)

    alone = GpuFilesReader(dataset.store, CPU, _with_pillow, workers=0)
    reader = GpuFilesReader(dataset.store, CPU, slow, workers=2)
    batches = [np.roll(dataset.numbers, -3 * turn)[:3] for turn in range(8)]
    for numbers, (canvas, sizes) in zip(batches, reader.batches(batches), strict=True):
        ((true, true_sizes),) = alone.batches([numbers])
        assert sizes.tolist() == true_sizes.tolist()
        for found, wanted, (height, width, _) in zip(canvas, true, sizes.tolist(), strict=True):
            assert torch.equal(found[:height, :width], wanted[:height, :width])
    reader.close()
    alone.close()


def _files(store: ImageStore, workers: int, piece_bytes: int) -> Processes:
    return Processes(WholeFiles(store), workers, 2, piece_bytes)


def _read(files: Processes, parts: list[np.ndarray]) -> list[bytes]:  # type: ignore[type-arg]
    """Every file's bytes, in order."""
    found = []
    for data, lengths in files.pieces(iter(parts)):
        assert len(data) == sum(lengths)
        ends = np.cumsum(lengths)
        found += [data[end - length : end].tobytes() for end, length in zip(ends.tolist(), lengths, strict=True)]
    return found


@pytest.mark.parametrize("piece_bytes", [1 << 20, 10])  # in shared memory, and through the pipe
def test_processes_read_files_in_order_again_and_after_a_break(prepared: Path, piece_bytes: int) -> None:
    store = _dataset(prepared).store
    parts = [np.arange(first, min(first + 3, len(store.index))) for first in range(0, len(store.index), 3)]
    true = [
        Path(path).read_bytes() if record["plain_jpeg"] else store.pixels(number).tobytes()
        for number, (path, record) in enumerate(zip(store.paths, store.index, strict=True))
    ]
    assert _read(_files(store, 0, piece_bytes), parts) == true
    files = _files(store, 2, piece_bytes)
    assert _read(files, parts) == true
    broken_off = files.pieces(iter(parts))
    next(broken_off)
    broken_off.close()
    assert _read(files, parts[::-1]) == [data for part in parts[::-1] for data in (true[n] for n in part)]
    processes = [process for process, _ in files._started]
    files.close()
    assert [process.exitcode for process in processes] == [0, 0]


def test_a_process_that_cannot_read_or_dies_is_told(prepared: Path, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in", each=4)
    config = ImageDataConfig(kind="images", path=tmp_path / "out", prepare=(str(root),), cache_size=16)
    prepare_images(config, workers=1)
    store = _dataset(tmp_path / "out").store
    gone = Path(store.paths[1])
    gone.unlink()
    files = _files(store, 1, 1 << 20)
    with pytest.raises(DataError, match=r"jpg cannot be read any more \(No such file"):
        _read(files, [np.array([0]), np.array([1]), np.array([2])])
    assert len(_read(files, [np.array([0]), np.array([2])])) == 2
    pieces = files.pieces(iter([np.array([0])] * 9))
    next(pieces)
    files._started[0][0].kill()
    with pytest.raises(ZerofitError, match=r"A process that reads pictures died .*Lower data\.num_workers"):
        list(pieces)
    files.close()


SPY = """
import sys
from zerofit.data.images.work import Filled

def spy(numbers, memory):
    return Filled([int("torch" in sys.modules)])
"""
SCRIPT = """
import numpy as np
import torch
from spy import spy
from zerofit.data.images.processes import Processes

print("script")
processes = Processes(spy, 2, 1, 8)
print([lengths for _, lengths in processes.pieces(iter([np.arange(1)] * 4))])
processes.close()
"""


def test_processes_neither_run_the_script_again_nor_import_torch(tmp_path: Path) -> None:
    (tmp_path / "spy.py").write_text(SPY)
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stdout == "script\n[[0], [0], [0], [0]]\n", done.stderr


@pytest.mark.parametrize("code", [0, 801])
def test_memory_that_cannot_be_page_locked_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    asked = []

    class Runtime:
        @staticmethod
        def cudaHostRegister(address: int, size: int, flags: int) -> int:  # noqa: N802
            asked.append((address, size, flags))
            return code

    def reports_the_failed_call(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: operation not supported")

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch, "zeros", reports_the_failed_call)
    memory = np.zeros(4096, np.uint8)
    assert readers.page_lock(memory) is (code == 0)
    assert asked == [(memory.ctypes.data, 4096, 0)]
    assert ("could not be page-locked (CUDA error 801)" in caplog.text) is (code != 0)


def test_nvjpeg_is_none_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert nvjpeg(torch.device("cuda")) is None


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batches", [None, 1])
def test_evaluation_counts_each_picture_once(prepared: Path, world: int, batches: int | None) -> None:
    dataset = _dataset(prepared)
    seen, lengths = [], set()
    for rank in range(world):
        window = ImageEvaluation(dataset, Share(12 // world, 1, rank, world), batches=batches)
        found = list(window)
        lengths.add((len(window), len(found)))
        for batch in found:
            valid = batch.inputs["targets"] != IGNORE
            assert batch.weight == int(valid.sum())
            assert len(batch.inputs["images"]) == 12 // world
            seen += [row for row, good in zip(_rows(batch), valid.tolist(), strict=True) if good]
        assert _rows(window[0]) == _rows(found[0])
    assert len(lengths) == 1  # equally many collectives on every rank
    expected = dataset.spread_indices(12 if batches else len(dataset.numbers))
    kept = {dataset.store.pixels(int(n)).transpose(2, 0, 1).tobytes() for n in dataset.numbers[expected]}
    assert {row[0] for row in seen} == kept
    assert len(seen) == len(expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_changed_file_stops_the_loader(tmp_path: Path, workers: int) -> None:
    root = write_folder(tmp_path / "in", each=3)
    config = ImageDataConfig(kind="images", path=tmp_path / "out", prepare=(str(root),), cache_size=16)
    prepare_images(config, workers=1)
    for path in root.glob("*/*.jpg"):
        path.write_bytes(b"")
    loader = ImageLoader(_dataset(tmp_path / "out"), Share(2, 1, 0, 1), ReadPlan(read="files", num_workers=workers))
    with pytest.raises(DataError, match=r"^\S+jpg cannot be read any more \(empty file\)[^\n]*$"):
        loader.window(0)
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("decoded", [False, True])
def test_canvases_of_every_shape_in_pieces(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, workers: int, decoded: bool
) -> None:
    """Batches that pieces do not divide, kept by whoever reads them while the next ones are made."""
    monkeypatch.setattr(readers, "COPIED_TOGETHER", 4)
    monkeypatch.setattr(readers, "DECODED_TOGETHER", 5)
    dataset = _dataset(prepared)
    work = Canvases(dataset.store, decoded=decoded)
    reader = CanvasReader(work, workers, 14, prefetch_factor=2, device=None, pin=False)
    batches = [dataset.numbers[:14], dataset.numbers[14:15], dataset.numbers[::-1][:14]]
    for _ in range(2):  # the second time after a break
        read = reader.batches(batches * 2)
        found = [next(read) for _ in range(4)]
        read.close()  # type: ignore[attr-defined]
        for numbers, (canvas, sizes) in zip(batches * 2, found, strict=False):
            assert canvas.shape == (len(numbers), *dataset.store.canvas, 3)
            for number, pixels, size in zip(numbers.tolist(), canvas.numpy(), sizes.tolist(), strict=True):
                kept = dataset.store.pixels(number)
                assert size == [*kept.shape[:2], dataset.store.index[number]["transposed"]]
                assert (pixels[: kept.shape[0], : kept.shape[1]] == kept).all()
    reader.close()
    assert len({dataset.store.pixels(number).shape for number in dataset.numbers.tolist()}) > 2


def test_default_workers_are_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert ReadPlan("cache", device=CPU).workers(Share(1, 1, 0, 2)) == loader_module.MAX_CACHE_PROCESSES
    assert ReadPlan("cache").workers(Share(1, 1, 0, 2)) == 0
    assert ReadPlan("files").workers(Share(1, 1, 0, 2)) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert ReadPlan("files").workers(Share(1, 1, 0, 2)) == 32
    assert ReadPlan("files", num_workers=3).workers(Share(1, 1, 0, 2)) == 3


def test_working_ahead_is_bounded_and_ends() -> None:
    made = []

    def items() -> object:
        for number in range(100):
            made.append(number)
            yield number

    ahead = Ahead(items(), depth=2)  # type: ignore[arg-type]
    assert [next(ahead), next(ahead)] == [0, 1]
    ahead.close()
    assert len(made) <= 6
    assert list(Ahead(iter("abc"), depth=1)) == ["a", "b", "c"]


@pytest.mark.network
def test_animals_from_a_package(tmp_path: Path) -> None:
    root = write_animals(tmp_path, tmp_path / "in", each=20)
    config = ImageDataConfig(kind="images", path=tmp_path / "out", prepare=(str(root),), cache_size=28)
    result = prepare_images(config, workers=1)
    assert len(result.classes) == 10
    assert result.samples["val"] >= 10
    store = open_images(tmp_path / "out", "train", 1).store
    assert store.canvas == (28, 28)


@pytest.mark.skipif(sys.platform == "win32", reason="no server that starts processes there")
def test_a_rank_that_leaves_takes_the_folder_of_its_processes_along(tmp_path: Path) -> None:
    """A rank ends without Python's clean-up, which is what removes multiprocessing's folder in /tmp."""
    script = (
        "from zerofit.data.images.processes import Processes\n"
        "from zerofit.engines.world import leave\n"
        "from pathlib import Path\n"
        "import sys\n"
        "processes = Processes(print, 1, 1, 4096)\n"
        "there = len(list(Path(sys.argv[1]).iterdir()))\n"
        "processes.close()\n"
        "leave(0 if there else 1)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(command, env={**os.environ, "TMPDIR": str(tmp_path)}, timeout=60).returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no server that starts processes there")
def test_processes_of_a_rank_that_died_end_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "from zerofit.data.images.work import Filled\n"
        "def work(numbers, memory):\n"
        "    time.sleep(0.3)\n"
        "    return Filled([0])\n"
    )
    script = (
        "import os, slow\n"
        "from zerofit.data.images.processes import Processes\n"
        "pieces = Processes(slow.work, 2, 2, 4096).pieces(iter([[number] for number in range(9)]))\n"
        "next(pieces)\n"
        "os._exit(0)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60,  # until all have let go of stderr
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": path},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_pictures_that_were_prepared_anew_are_not_taken_for_those_of_the_run(tmp_path: Path) -> None:
    """Processes open the folder again at every evaluation; a number stands for another picture then."""
    config = ImageDataConfig(path=tmp_path / "out", prepare=(str(write_folder(tmp_path / "in")),), cache_size=16)
    prepare_images(config)
    work = Canvases(ImageStore(tmp_path / "out"))
    prepare_images(config.model_copy(update={"split_seed": 7}), force=True)
    processes = Processes(work, 1, 1, work.bytes_each)
    with pytest.raises(DataError, match="was prepared anew while this run reads it"):
        next(processes.pieces(iter([np.array([0])])))
    processes.close()
