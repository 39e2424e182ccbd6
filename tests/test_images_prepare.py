"""Pictures in folders: what is found, how they decode, what is written, and everything that is refused."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pictures import draw, write_folder
from zerofit.config.images import ImageDataConfig
from zerofit.data.images import decode as decode_module
from zerofit.data.images.decode import RESIZERS, BadPicture, Limits, decode, resized
from zerofit.data.images.discover import discover
from zerofit.data.images.store import ImageStore, check_images, images_fingerprint, read_files
from zerofit.data.images.work import decode_file
from zerofit.data.prepare import images as prepare_module
from zerofit.data.prepare.images import PreparedImages, prepare_images
from zerofit.data.prepare.lock import only_one
from zerofit.errors import DataError, MissingDependency

ANY = Limits(1, 10**9)


def _config(source: Path, out: Path, **settings: object) -> ImageDataConfig:
    given = {"cache_size": 16, **settings}
    return ImageDataConfig(kind="images", path=out, prepare=(str(source),), **given)  # type: ignore[arg-type]


def _prepare(source: Path, out: Path, **settings: object) -> PreparedImages:
    return prepare_images(_config(source, out, **settings), workers=1)


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _upright(data: bytes, size: int = 4096) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    found = decode(data, size, ANY)
    return found.pixels.transpose(1, 0, 2) if found.transposed else found.pixels


# Decoding


@pytest.mark.parametrize(("kind", "within"), [("PNG", 0), ("BMP", 0), ("JPEG", 20), ("WEBP", 25), ("GIF", 60)])
def test_formats(kind: str, within: int) -> None:
    picture = draw(40, 30, 1)
    found = _upright(_encoded(picture, kind, quality=95))
    assert np.abs(found.astype(int) - np.asarray(picture)).max() <= within


def test_several_pictures_in_a_jpeg_count_as_the_first() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    found = decode(_encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]), 4096, ANY)
    assert np.abs(found.pixels.astype(int) - [255, 0, 0]).max() < 6
    assert found.plain_jpeg


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue", "lime")]
    data = _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (_upright(data) == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
def test_exif_orientation(orientation: int, shape: tuple[int, int]) -> None:
    """Pillow's own rule, on a picture whose corners tell every turn apart."""
    from PIL import ImageOps

    picture = draw(*shape, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _encoded(picture, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert (_upright(data) == expected).all()
    assert decode(data, 4096, ANY).pixels.shape[:2] == (12, 24)  # the cache keeps it lying


def test_modes_become_rgb() -> None:
    grey = Image.new("L", (5, 4), 100)
    assert (_upright(_encoded(grey, "PNG")) == 100).all()
    deep = Image.fromarray(np.full((4, 5), 100 * 257, np.uint16))
    assert (_upright(_encoded(deep, "PNG")) == 100).all()
    assert (_upright(_encoded(Image.new("1", (5, 4), 1), "PNG")) == 255).all()
    red = Image.new("RGB", (5, 4), (200, 10, 20))
    assert (_upright(_encoded(red.convert("P", palette=Image.Palette.ADAPTIVE), "PNG")) == [200, 10, 20]).all()
    cmyk = _upright(_encoded(red.convert("CMYK"), "JPEG", quality=100)).astype(int)
    assert np.abs(cmyk - [200, 10, 20]).max() < 6


def test_transparency_lies_on_white() -> None:
    half = Image.new("RGBA", (5, 4), (0, 0, 0, 51))  # a fifth of black
    assert (_upright(_encoded(half, "PNG")) == 204).all()
    assert (_upright(_encoded(Image.new("LA", (5, 4), (0, 0)), "PNG")) == 255).all()
    palette = Image.new("P", (5, 4), 0)
    palette.putpalette([9, 9, 9] * 256)
    assert (_upright(_encoded(palette, "PNG", transparency=0)) == 255).all()


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (333, 333), (20, 10), (64, 65)])
def test_sizes_are_those_of_torchvisions_resize(width: int, height: int) -> None:
    if min(width, height) <= 64:
        assert resized(width, height, 64) == (width, height)  # never enlarged
    else:
        longer = int(64 * max(width, height) / min(width, height))
        assert sorted(resized(width, height, 64)) == [64, longer]


def test_pixels_are_pillows_resize() -> None:
    picture = draw(60, 45, 8)
    expected = np.asarray(picture.resize((26, 20), Image.Resampling.BILINEAR))
    assert resized(60, 45, 20) == (26, 20)
    assert (_upright(_encoded(picture, "PNG"), 20) == expected).all()


@pytest.mark.parametrize("shape", [(60, 45), (45, 60), (500, 375)])
@pytest.mark.parametrize("name", ["torch", "cykooz"])
def test_faster_ways_resize_as_pillow_does(name: str, shape: tuple[int, int]) -> None:
    if name == "cykooz":
        pytest.importorskip("cykooz_resizer")
    data = _encoded(draw(*shape, 9), "PNG")
    one, other = (decode(data, 30, ANY, RESIZERS[way]).pixels.astype(int) for way in ("pillow", name))
    assert np.abs(one - other).max() <= 2
    assert np.abs(one - other).mean() < 0.3


@pytest.mark.parametrize("name", ["pillow", "torch", "cykooz"])
def test_reading_a_file_gives_the_cache_s_pixels_whatever_resized_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "cykooz":
        pytest.importorskip("cykooz_resizer")
    monkeypatch.setattr(prepare_module, "find_spec", lambda _: True if name == "cykooz" else None)
    monkeypatch.setattr(prepare_module, "MANY_PICTURES", 1 if name == "torch" else 1 << 40)
    root = write_folder(tmp_path / "in")
    _prepare(root, tmp_path / "out")
    store = ImageStore(tmp_path / "out")
    assert store.meta["resize"] == name
    canvas = np.zeros((*store.canvas, 3), np.uint8)
    decode_file(store, 0, canvas)
    assert (canvas == store.pixels(0)).all()


def test_pixels_of_a_way_that_is_missing_are_not_made_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "find_spec", lambda _: None)
    with pytest.raises(MissingDependency, match=r"cykooz-resizer, which is not installed.*zerofit\[images-fast\]"):
        decode_module.find_resize("cykooz")
    assert decode_module.find_resize("pillow") is RESIZERS["pillow"]


FORKED = """
import os, sys
from pathlib import Path
import zerofit.data.prepare.images as module
from zerofit.config.images import ImageDataConfig
module.FEW_PICTURES, module.SHARD_PICTURES = 2, 4
config = ImageDataConfig(kind="images", path=Path(sys.argv[2]), prepare=(sys.argv[1],), cache_size=20)
module.prepare_images(config, workers=2)
print(module._context("pillow").get_start_method(), "torch" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes are not forked")
def test_processes_are_forked_where_nothing_forbids_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "in", each=10)
    command = [sys.executable, "-c", FORKED, str(root), str(tmp_path / "forked")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["fork", "False"], done.stderr
    here = ImageDataConfig(kind="images", path=tmp_path / "here", prepare=(str(root),), cache_size=20)
    prepare_images(here, workers=1)
    stores = [ImageStore(tmp_path / name) for name in ("forked", "here")]
    for number in range(len(stores[0].index)):
        assert (stores[0].pixels(number) == stores[1].pixels(number)).all()
    assert prepare_module._context("torch").get_start_method() == "forkserver"
    monkeypatch.setitem(sys.modules, "torch", object())
    assert prepare_module._context("pillow").get_start_method() == "forkserver"


def test_a_panorama_loses_its_ends() -> None:
    assert decode(_encoded(draw(200, 20, 1), "PNG"), 20, ANY).pixels.shape == (20, 40, 3)


def _bomb(width: int, height: int) -> bytes:
    """A PNG that says it is huge and holds nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


GOOD = _encoded(draw(40, 30, 1), "JPEG", quality=90)
BAD = {
    "nothing.jpg": (b"", "empty file"),
    "text.jpg": (b"hello, I am no picture", "not a picture"),
    "cut.jpg": (GOOD[: len(GOOD) // 2], "truncated"),
    "cut.png": (_encoded(draw(40, 30, 2), "PNG")[:700], "truncated"),
    "small.png": (_encoded(draw(3, 90, 2), "PNG"), "tiny: 3 x 90"),
    "bomb.png": (_bomb(60_000, 60_000), "decompression bomb"),
    "large.png": (_bomb(12_000, 9_000), "decompression bomb"),
    "tiff.jpg": (_encoded(draw(40, 30, 2), "TIFF"), "not a picture"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_told_apart(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(BadPicture, match=reason):
        decode(data, 16, Limits(8, 89_478_485))


# Folders


def test_a_folder_with_a_split_of_its_own(tmp_path: Path) -> None:
    write_folder(tmp_path / "in" / "train")
    write_folder(tmp_path / "in" / "val", each=2, size=(30, 41))
    prepared = _prepare(tmp_path / "in", tmp_path / "out")
    # The first two of each class differ in size from those that train, so nothing is a copy.
    assert prepared.classes == {"cat": {"train": 6, "val": 2}, "dog": {"train": 6, "val": 2}}
    store = ImageStore(tmp_path / "out")
    assert store.classes == ["cat", "dog"]
    assert store.canvas == (16, 21)
    assert store.meta["split"] == "folders"
    for number, row in enumerate(read_files(tmp_path / "out")):
        expected = decode(Path(row["path"]).read_bytes(), 16, ANY, RESIZERS[store.meta["resize"]])
        assert (store.pixels(number) == expected.pixels).all()
        assert bool(store.index[number]["transposed"]) == expected.transposed == (row["split"] == "val")


def test_two_folders_are_training_and_validation(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b", each=2, size=(20, 20))
    config = ImageDataConfig(
        kind="images", path=tmp_path / "out", prepare=(str(tmp_path / "a"), str(tmp_path / "b")), cache_size=16
    )
    assert prepare_images(config).samples == {"train": 12, "val": 4}


def test_one_folder_is_split_by_class_and_seed(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", each=10)
    prepared = _prepare(tmp_path / "in", tmp_path / "out", val_fraction=0.2)
    assert prepared.classes == {"cat": {"train": 8, "val": 2}, "dog": {"train": 8, "val": 2}}

    def validating(out: Path) -> set[str]:
        return {row["sha256"] for row in read_files(out) if row["split"] == "val"}

    _prepare(tmp_path / "in", tmp_path / "again", val_fraction=0.2)
    assert validating(tmp_path / "again") == validating(tmp_path / "out")
    _prepare(tmp_path / "in", tmp_path / "other", val_fraction=0.2, split_seed=7)
    assert validating(tmp_path / "other") != validating(tmp_path / "out")
    assert images_fingerprint(tmp_path / "again") == images_fingerprint(tmp_path / "out")
    assert images_fingerprint(tmp_path / "other") != images_fingerprint(tmp_path / "out")


def test_hidden_files_other_files_links_and_their_loops(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in", each=3)
    (root / "cat" / ".DS_Store.jpg").write_bytes(b"")
    (root / ".git").mkdir()
    (root / "__MACOSX").mkdir()
    (root / "cat" / "readme.txt").write_text("no picture")
    (root / "cat" / "more").mkdir()
    draw(20, 20, 99).save(root / "cat" / "more" / "deep.png")
    (root / "cat" / "more" / "up").symlink_to(root / "cat")
    draw(20, 20, 98).save(tmp_path / "elsewhere.bmp")
    (root / "dog" / "linked.bmp").symlink_to(tmp_path / "elsewhere.bmp")
    (root / "dog" / "dangling").symlink_to(tmp_path / "nowhere")
    found = discover([str(root)])
    assert found.classes == ("cat", "dog")
    assert [Path(p.path).name for p in found.pictures] == [
        "0.jpg", "1.jpg", "2.jpg", "deep.png", "0.jpg", "1.jpg", "2.jpg", "linked.bmp",
    ]  # fmt: skip
    assert found.others == {".txt": 1, "no suffix": 1}


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in", each=3)
    (root / "dog" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "dog" / "self.jpg").symlink_to(root / "dog" / "self.jpg")
    prepared = _prepare(root, tmp_path / "out", max_bad_fraction=0.5)
    reasons = {Path(row["path"]).name: row["reason"] for row in prepared.skipped}
    assert reasons.keys() == {"gone.jpg", "self.jpg"}
    assert "No such file" in reasons["gone.jpg"]
    assert "symbolic links" in reasons["self.jpg"]
    check_images(ImageDataConfig(kind="images", path=tmp_path / "out"))
    (root / "emu").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="emu is a link that leads nowhere"):
        discover([str(root)])


def test_pictures_beside_the_classes_are_told(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in")
    draw(20, 20, 99).save(root / "loose.png")
    assert any("1 pictures in" in notice for notice in _prepare(root, tmp_path / "out").notices)


@pytest.mark.parametrize("names", [("Train", "Val"), ("training", "VALIDATION"), ("train", "valid")])
def test_a_split_is_found_however_it_is_written(tmp_path: Path, names: tuple[str, str]) -> None:
    write_folder(tmp_path / "in" / names[0])
    write_folder(tmp_path / "in" / names[1], each=2, size=(20, 20))
    assert _prepare(tmp_path / "in", tmp_path / "out").samples == {"train": 12, "val": 4}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert discover([str(write_folder(tmp_path, classes=("plane", "train")))]).classes == ("plane", "train")


@pytest.mark.parametrize("broken", ["in", "in/cat"])
def test_folders_that_may_not_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    write_folder(tmp_path / "in")
    scandir = os.scandir

    def refusing(path: Path | str) -> object:
        if Path(path) == tmp_path / broken:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=rf"{broken} cannot be read \(Permission denied\)"):
        discover([str(tmp_path / "in")])


def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(self: Path, *arguments: object, **named: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    root = write_folder(tmp_path / "in")
    monkeypatch.setattr(Path, "mkdir", refusing)
    with pytest.raises(DataError, match=r"out cannot be written: .*out\.partial: Permission denied.*--out"):
        _prepare(root, tmp_path / "out")


def test_names_of_every_kind(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in", classes=("épée 🐈", "[bold]dog"), each=3)
    odd = os.fsdecode(b"\xff\n odd.jpg")
    (root / "[bold]dog" / "0.jpg").rename(root / "[bold]dog" / odd)
    _prepare(root, tmp_path / "out")
    assert ImageStore(tmp_path / "out").classes == ["[bold]dog", "épée 🐈"]
    assert sum(row["path"].endswith(odd) for row in read_files(tmp_path / "out")) == 1
    (root / "[bold]dog" / odd).write_bytes(b"")
    done = _command("data", "prepare", "images", str(root), "--out", str(tmp_path / "new"), "--max-bad-fraction", "0.5")
    assert (done.returncode, "empty file" in done.stdout, "[bold]dog" in done.stdout) == (0, True, True), done.stderr


def test_folders_beside_train_and_val_are_told(tmp_path: Path) -> None:
    for name, size in (("train", (40, 30)), ("val", (30, 30)), ("test", (20, 20))):
        write_folder(tmp_path / "in" / name, size=size)
    assert any("are not read: test" in notice for notice in _prepare(tmp_path / "in", tmp_path / "out").notices)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*job: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_module.shards, "check_shard", full)
    with pytest.raises(DataError, match=r"disk of .*out is full\. 12 pictures take up to"):
        _prepare(write_folder(tmp_path / "in"), tmp_path / "out")


def test_bad_files_are_left_out_by_name_up_to_a_limit(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in", each=10)
    for name, (data, _) in BAD.items():
        (root / "cat" / name).write_bytes(data)
    with pytest.raises(DataError, match=r"8 of 28 pictures cannot be used.*allows 1: .*bomb\.png.*--max-bad-fraction"):
        _prepare(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prepared = _prepare(root, tmp_path / "out", max_bad_fraction=0.3)
    assert {Path(row["path"]).name: row["reason"] for row in prepared.skipped}.keys() == BAD.keys()
    for row in prepared.skipped:
        assert BAD[Path(row["path"]).name][1] in row["reason"]
    assert sum(prepared.samples.values()) == 20


def test_copies_do_not_leak_into_training(tmp_path: Path) -> None:
    write_folder(tmp_path / "in" / "train", each=4)
    write_folder(tmp_path / "in" / "val", each=2, size=(20, 20))
    copy = (tmp_path / "in" / "val" / "dog" / "1.jpg").read_bytes()
    (tmp_path / "in" / "train" / "dog" / "copy.jpg").write_bytes(copy)
    (tmp_path / "in" / "train" / "cat" / "wrong.jpg").write_bytes(
        (tmp_path / "in" / "train" / "dog" / "0.jpg").read_bytes()
    )
    prepared = _prepare(tmp_path / "in", tmp_path / "out")
    assert prepared.classes == {"cat": {"train": 5, "val": 2}, "dog": {"train": 4, "val": 2}}
    (left_out,) = prepared.skipped
    assert left_out["path"].endswith("train/dog/copy.jpg")
    assert "val/dog/1.jpg" in left_out["reason"]
    assert any("more than one class" in notice for notice in prepared.notices)


def test_copies_stay_together_in_a_split_made_here(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in", each=5)
    for number in range(5):
        (root / "cat" / f"copy{number}.jpg").write_bytes((root / "cat" / f"{number}.jpg").read_bytes())
    prepared = _prepare(root, tmp_path / "out", val_fraction=0.4)
    splits: dict[str, set[str]] = {}
    for row in read_files(tmp_path / "out"):
        splits.setdefault(row["sha256"], set()).add(row["split"])
    assert all(len(those) == 1 for those in splits.values())
    assert prepared.classes["cat"] == {"train": 6, "val": 4}


def test_imbalance_is_told(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in", each=20)
    write_folder(root, classes=("eel",), each=3, size=(22, 22))
    prepared = _prepare(root, tmp_path / "out")
    assert prepared.imbalance == 9
    assert any("eel 2" in notice and "data.balanced" in notice for notice in prepared.notices)


def _empty_class(root: Path) -> None:
    (write_folder(root) / "emu").mkdir()


def _class_of_text(root: Path) -> None:
    (write_folder(root) / "emu").mkdir()
    (root / "emu" / "a.txt").write_text("emu")


def _one_class(root: Path) -> None:
    write_folder(root, classes=("cat",))


def _val_knows_more(root: Path) -> None:
    write_folder(root / "train")
    write_folder(root / "val", classes=("cat", "emu"), size=(20, 20))


def _no_pictures(root: Path) -> None:
    (root / "cat").mkdir(parents=True)
    (root / "cat" / "a.pdf").write_text("")
    (root / "b.txt").write_text("")


def _loose(root: Path) -> None:
    root.mkdir()
    draw(20, 20, 1).save(root / "a.jpg")


def _all_bad(root: Path) -> None:
    write_folder(root, each=30)
    write_folder(root, classes=("emu",), each=1)
    (root / "emu" / "0.jpg").write_bytes(b"x")


def _train_and_test(root: Path) -> None:
    write_folder(root / "train")
    write_folder(root / "Test")


def _val_alone(root: Path) -> None:
    write_folder(root / "val")


def _not_utf8(root: Path) -> None:
    write_folder(root, classes=("cat", os.fsdecode(b"caf\xe9")))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_train_and_test, r"holds Test, train and no val.*Rename"),
        (_val_alone, "holds val and no train"),
        (_not_utf8, r"not UTF-8 \(b'caf\\xe9'\)"),
        (_empty_class, "without pictures: emu"),
        (_class_of_text, "without pictures: emu"),
        (_one_class, "Only one class, 'cat'"),
        (_val_knows_more, "classes that train lacks: emu"),
        (_no_pictures, r"no pictures in folders of classes; found 1 \.pdf"),
        (_loose, "1 pictures and no folders of classes"),
        (_all_bad, r"No training picture of emu.*not a picture"),
        (lambda root: None, "no such folder"),
    ],
)
def test_unusable_folders_are_refused(tmp_path: Path, make: object, said: str) -> None:
    make(tmp_path / "in")  # type: ignore[operator]
    with pytest.raises(DataError, match=said):
        _prepare(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The prepared folder


def test_the_same_request_changes_nothing_and_another_is_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in")
    assert _prepare(root, tmp_path / "out").made_now
    before = (tmp_path / "out" / "meta.json").stat().st_mtime_ns
    assert not _prepare(root, tmp_path / "out").made_now
    assert (tmp_path / "out" / "meta.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="other cache_size"):
        _prepare(root, tmp_path / "out", cache_size=12)
    assert prepare_images(_config(root, tmp_path / "out", cache_size=12), force=True).made_now
    assert ImageStore(tmp_path / "out").canvas == (12, 16)
    assert not list(tmp_path.glob("out.*"))


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="holds no prepared pictures"):
        prepare_images(_config(root, tmp_path / "out"), force=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_changed_files_are_noticed(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in")
    _prepare(root, tmp_path / "out")
    config = _config(root, tmp_path / "out")
    check_images(config)
    os.utime(root / "cat" / "3.jpg", ns=(1, 1))
    (root / "dog" / "2.jpg").unlink()
    draw(30, 30, 5).save(root / "dog" / "new.png")
    with pytest.raises(DataError, match=r"1 changed \(.*3\.jpg\); 1 new \(.*new\.png\); 1 gone \(.*2\.jpg\).*--force"):
        check_images(config)


def test_the_cache_is_enough_without_the_files(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in")
    _prepare(root, tmp_path / "out")
    root.rename(tmp_path / "moved")
    check_images(_config(root, tmp_path / "out"))
    with pytest.raises(DataError, match="not there any more"):
        check_images(_config(root, tmp_path / "out", read="files"))


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in")
    _prepare(root, tmp_path / "out")
    config = _config(root, tmp_path / "out")
    pixels = tmp_path / "out" / "pixels-00000.bin"
    pixels.write_bytes(pixels.read_bytes()[:-1])
    with pytest.raises(DataError, match="not as long as it was written"):
        check_images(config)
    pixels.unlink()
    with pytest.raises(DataError, match="is missing"):
        check_images(config)
    (tmp_path / "out" / "index.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"index\.npy cannot be read"):
        check_images(config)
    (tmp_path / "out" / "index.npy").unlink()
    with pytest.raises(DataError, match=r"index\.npy cannot be read \(No such file"):
        check_images(config)
    (tmp_path / "out" / "meta.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        check_images(config)
    with pytest.raises(DataError, match="zerofit data prepare images"):
        check_images(_config(root, tmp_path / "nothing"))


def test_without_pixels_only_the_files_can_be_read(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in")
    assert _prepare(root, tmp_path / "out", read="files").cache_bytes == 0
    assert not list((tmp_path / "out").glob("pixels-*"))
    check_images(_config(root, tmp_path / "out", read="files"))
    with pytest.raises(DataError, match="without a pixel cache"):
        check_images(_config(root, tmp_path / "out"))


def test_an_interrupted_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_PICTURES", 4)
    root = write_folder(tmp_path / "in", each=6)
    real, done = prepare_module.shards.check_shard, []

    def failing(*job: object) -> int:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job[1])
        return real(*job)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare_module.shards, "check_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        _prepare(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / "pixels-00002.bin.4711").write_bytes(b"what a killed process had written")
    again: list[object] = []
    monkeypatch.setattr(prepare_module.shards, "check_shard", lambda *job: (again.append(job[1]), real(*job))[1])
    assert _prepare(root, tmp_path / "out").samples == {"train": 10, "val": 2}
    assert (done, again) == ([0, 1], [2])  # finished shards were kept
    assert not list((tmp_path / "out").glob("*.4711"))
    store = ImageStore(tmp_path / "out")
    for number, row in enumerate(read_files(tmp_path / "out")):
        assert (
            store.pixels(number)
            == decode(Path(row["path"]).read_bytes(), 16, ANY, RESIZERS[store.meta["resize"]]).pixels
        ).all()


KILLED = """
import multiprocessing, os, signal, sys
from pathlib import Path
import zerofit.data.prepare.images as module
from zerofit.config.images import ImageDataConfig
from zerofit.data.images.decode import Limits
from zerofit.data.images.discover import discover
jobs = [([picture], number, Path(sys.argv[2]), Limits(1, 10**6), 20, "pillow", True)
        for number, picture in enumerate(discover([sys.argv[1]]).pictures)]
if sys.argv[3] == "fork":
    assert module._context("pillow").get_start_method() == "fork"
else:
    module._context = lambda resize: multiprocessing.get_context("forkserver")
done = module._run_in_processes(jobs, "pillow", 2)
next(done)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("how", ["fork", "forkserver"])
def test_processes_end_when_the_command_is_killed(tmp_path: Path, how: str) -> None:
    root, work = write_folder(tmp_path / "in", each=10), tmp_path / "work"
    work.mkdir()
    # Into a file: processes that stayed would hold a pipe open, and the test would wait for it.
    with (tmp_path / "told").open("w") as told:
        subprocess.run([sys.executable, "-c", KILLED, str(root), str(work), how], stdout=told, timeout=60)
    children = [int(pid) for pid in (tmp_path / "told").read_text().split()]
    assert len(children) == 2
    until = time.monotonic() + 10
    while any(map(_running, children)) and time.monotonic() < until:
        time.sleep(0.05)
    left = [pid for pid in children if _running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def test_processes_write_what_one_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_PICTURES", 5)
    root = write_folder(tmp_path / "in", each=8)
    _prepare(root, tmp_path / "one")
    monkeypatch.setattr(prepare_module, "FEW_PICTURES", 0)
    seen: list[tuple[int, int]] = []
    prepare_images(_config(root, tmp_path / "two"), workers=2, progress=lambda *now: seen.append(now))
    assert seen[0] == (0, 16)
    assert seen[-1] == (16, 16)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


# The command


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zerofit.cli.main", *arguments], capture_output=True, text=True, timeout=60
    )


def test_command_line(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in", each=30)
    (root / "cat" / "bad.jpg").write_bytes(b"x")
    out = str(tmp_path / "out")
    done = _command("data", "prepare", "images", str(root), "--out", out, "--cache-size", "16", "--workers", "1")
    assert done.returncode == 0, done.stderr
    for said in ("cat", "54 train pictures, 6 val pictures, 2 classes", "1.0 to 1", "bad.jpg: not a picture"):
        assert said in done.stdout
    shown = json.loads(_command("data", "show", out, "--json").stdout)
    assert shown["samples"] == {"train": 54, "val": 6}
    assert {row["class"] for row in shown["shown"]} <= {"cat", "dog"}
    refused = _command("data", "prepare", "images", str(tmp_path / "nowhere"))
    assert (refused.returncode, "no such folder" in refused.stderr) == (2, True)


@pytest.mark.skipif(sys.platform == "win32", reason="files that are open cannot be replaced there anyway")
def test_one_preparation_of_a_folder_at_a_time(tmp_path: Path) -> None:
    config = ImageDataConfig(path=tmp_path / "out", prepare=(str(write_folder(tmp_path / "in")),), cache_size=16)
    with only_one(config.path), pytest.raises(DataError, match="being prepared by another process"):
        prepare_images(config)
    assert not (tmp_path / "out").exists()
    assert prepare_images(config).made_now
    assert not list(tmp_path.glob(".out*"))
