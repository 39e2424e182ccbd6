"""Corpora of every form, tokenizers, interruptions, and folders that other scripts wrote."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerofit.config.load import load_config
from zerofit.config.models import GPT2Config
from zerofit.config.schema import DataConfig
from zerofit.data.metadata import infer_width, read_meta, read_plain_pickle
from zerofit.data.prepare import Prepared, encode, openwebtext, pieces, prepare
from zerofit.data.prepare.openwebtext import DOCUMENTS
from zerofit.data.prepare.pieces import Piece, Tally, cut
from zerofit.data.tokenizers import ByteTokenizer, CharTokenizer, load_tokenizer
from zerofit.data.tokens import check_data, describe_inferred, open_tokens, vocabulary_size
from zerofit.errors import DataError
from zerofit.training.preset_data import _target, refuse_presets_data

LINES = [f"document {i}: to be or not to be, é\n" for i in range(60)]
JSONL = "".join(json.dumps({"text": line, "id": i}) + "\n" for i, line in enumerate(LINES)).encode()


def _prepare(out: Path, *sources: Path | str, workers: int = 1, force: bool = False, **settings: Any) -> Prepared:
    config = DataConfig(path=out, prepare=tuple(map(str, sources)), **({"tokenizer": "bytes"} | settings))
    return prepare(config, workers=workers, force=force)


def _documents(out: Path, split: str) -> list[str]:
    """The documents of a split, cut at the starts in its index."""
    tokens = open_tokens(out, split)
    starts = np.fromfile(out / f"{split}_documents.bin", dtype="<u8").tolist()
    tokenizer = load_tokenizer(out)
    assert tokenizer is not None
    assert starts[0] == 0
    return [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]


def _files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "scan.json"}


def _zstd(data: bytes) -> bytes:
    compressor = pytest.importorskip("zstandard").ZstdCompressor()
    return bytes(compressor.compress(data[:100]) + compressor.compress(data[100:]))  # two frames


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd,
}  # fmt: skip


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_give_the_same_documents(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACKERS[suffix](JSONL))
    done = _prepare(tmp_path / "out", tmp_path, val_fraction=0.01)
    assert done.documents is not None
    assert sum(done.documents.values()) >= 60
    assert _documents(tmp_path / "out", "train")[:59] == LINES[:59]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACKERS[suffix](os.urandom(3000).hex().encode())[:-20])
    with pytest.raises(DataError, match="cut off"):
        _prepare(tmp_path / "out", path)
    assert not (tmp_path / "out").exists()


def test_parquet_and_its_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": [*LINES, "", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has no column 'text'; it has body.*--text-key"):
        _prepare(tmp_path / "out", tmp_path / "a.parquet")
    done = _prepare(tmp_path / "out", tmp_path / "a.parquet", text_key="body")
    assert "2 empty documents" in done.notes[0]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="Parquet"):
        _prepare(tmp_path / "bad", tmp_path / "bad.parquet")


def test_documents_are_drawn_from_everywhere(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    _prepare(tmp_path / "out", tmp_path / "a.jsonl", split="documents", val_fraction=0.3)
    train, val = (_documents(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(LINES)
    assert 8 <= len(val) <= 28
    assert int(val[0].split()[1][:-1]) < 30  # not the tail
    ends = open_tokens(tmp_path / "out", "train")
    assert (ends == 256).sum() == len(train)  # an end after each document


@pytest.mark.parametrize("split", ["tail", "documents"])
def test_the_result_does_not_depend_on_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", 100)
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    results = []
    for workers in (1, 2):
        _prepare(tmp_path / f"out{workers}", tmp_path / "a.jsonl", workers=workers, split=split)
        results.append(_files(tmp_path / f"out{workers}"))
    assert results[0] == results[1]


@pytest.mark.parametrize("split", ["tail", "documents"])
@pytest.mark.parametrize("after", [0, 1, 7, 10, "cut"])
def test_an_interrupted_preparation_goes_on_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int | str, split: str
) -> None:
    """Stopped after any chunk, or between the journal's last line and the cut: every byte is the same."""
    from zerofit.data.prepare import shards

    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", 150)
    monkeypatch.setattr(shards, "RECORD_SECONDS", -1.0 if after != 10 else 1e9)  # at 10 nothing was recorded
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    _prepare(tmp_path / "whole", tmp_path / "a.jsonl", split=split)

    class Killed(BaseException):
        pass

    if after == "cut":
        monkeypatch.setattr("zerofit.data.prepare._write_meta", _raising(Killed))
    else:
        add, count = shards.Shards.add, iter(range(100))

        def stop(self: Any, chunk: Any, encoded: Any) -> None:
            if next(count) == after:
                self._files["train.bin"].write(b"torn")
                raise Killed
            add(self, chunk, encoded)

        monkeypatch.setattr(shards.Shards, "add", stop)
    with pytest.raises(Killed):
        _prepare(tmp_path / "out", tmp_path / "a.jsonl", split=split)
    monkeypatch.undo()
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", 150)
    assert not (tmp_path / "out").exists()
    done = _prepare(tmp_path / "out", tmp_path / "a.jsonl", split=split)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")
    assert ("were kept" in " ".join(done.notes)) == (after not in (0, 10))


def _raising(error: type[BaseException]) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def test_a_killed_process_loses_no_finished_work(tmp_path: Path) -> None:
    """SIGKILL while two processes tokenise; the same command again gives what an undisturbed one gives."""
    text = ("".join(LINES) * 40 + "\n") * 20  # 1.8 MB a file
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(text + str(i))
    code = (
        "import sys; from pathlib import Path\n"
        "from zerofit.config.schema import DataConfig\n"
        "from zerofit.data.prepare import prepare, shards\n"
        "shards.RECORD_SECONDS = 0.0\n"
        "if len(sys.argv) > 3:\n"  # slow enough to be killed half-way
        "    import time; add = shards.Shards.add\n"
        "    shards.Shards.add = lambda *a: (add(*a), time.sleep(0.5))\n"
        "print(prepare(DataConfig(path=Path(sys.argv[2]), prepare=(sys.argv[1],), tokenizer='bytes'), workers=2)"
        ".describe())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "*.txt")]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen(
        [*command, str(tmp_path / "out"), "slow"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    journal = tmp_path / "out.partial" / "journal.json"
    deadline = time.monotonic() + 60
    while not journal.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    workers = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers or not Path("/proc/self/stat").exists()
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)  # none is left behind
    assert not (tmp_path / "out").exists()
    again = subprocess.run([*command, str(tmp_path / "out")], check=True, capture_output=True, text=True)
    assert "chunks were kept" in again.stdout
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def _children(pid: int) -> list[int]:
    """Processes that a process has started, as Linux tells."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found += [int(path.parent.name)] if int(state[1]) == pid else []
    return found


def test_text_that_changed_since_the_kill_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", 150)
    source = tmp_path / "a.jsonl"
    source.write_bytes(JSONL)
    with monkeypatch.context() as patch:
        patch.setattr("zerofit.data.prepare._write_meta", _raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _prepare(tmp_path / "out", source)
    stat = source.stat()
    source.write_bytes(JSONL.replace(b"document 0", b"Document 0"))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=r"changed since.*--force"):
        _prepare(tmp_path / "out", source)
    os.utime(source)  # by its time it is another file: the work is begun anew, and said to be
    assert "discarded" in _prepare(tmp_path / "out", source).notes[0]


def test_a_folder_that_is_being_prepared_is_refused(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "a.jsonl").write_bytes(JSONL)
    with (tmp_path / ".out.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process"):
            _prepare(tmp_path / "out", tmp_path / "a.jsonl")


@settings(max_examples=40, deadline=None)
@given(text=st.text("ab \n\u3000é", max_size=300), size=st.integers(4, 40))
def test_long_documents_are_cut_and_lose_nothing(text: str, size: int) -> None:
    before, pieces.PIECE_CHARACTERS = pieces.PIECE_CHARACTERS, size
    try:
        found = list(cut(text, tally := Tally()))
    finally:
        pieces.PIECE_CHARACTERS = before
    assert "".join(piece.text for piece in found) == text
    assert all(0 < len(piece.text) <= size for piece in found) or text == ""
    assert [piece.starts for piece in found] == [True] + [False] * (len(found) - 1)
    assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]
    words = sum(not a.text[-1:].isspace() and not b.text[:1].isspace() for a, b in pairwise(found))
    assert words <= tally.cut_words


def test_a_text_without_lines_is_cut_and_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 2_500_000)
    done = _prepare(tmp_path / "out", tmp_path / "a.txt")
    assert "2 cuts inside a word" in done.notes[0]
    assert done.documents == {"train": 1, "val": 1}
    assert sum(done.tokens.values()) == 2_500_001


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"caf\xc3\xa9\nna\xefve\n", "line 2, byte 3"),
        ("a.txt", b"x\n" * 600_000 + b"\xff", "line 600001, byte 1 "),
        ("a.txt", b"caf\xc3", "line 1, byte 4"),
        ("a.txt.gz", gzip.compress(b"fine\n\xe9\n"), "line 2, byte 1"),
        ("a.jsonl", b'{"text": "\xe9"}\n', "line 1, byte 11"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogate"),
        ("a.jsonl", b'{"text": 3}\n', "--text-key"),
        ("a.jsonl", b"\n\n{]\n", "line 3: not JSON"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n', "2 empty documents"),
        ("a.csv", b"a,b\n", "Convert it, rename it"),
        ("a.txt.gz", b"no gzip", r"no \.gz file"),
    ],
)
def test_bad_text_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        _prepare(tmp_path / "out", tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_invalid_utf8_can_be_replaced_and_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"na\xefve " * 10)
    done = _prepare(tmp_path / "out", tmp_path / "a.txt", errors="replace")
    assert "10 characters" in done.notes[0]


@pytest.mark.parametrize(("subset", "kept"), [("5", list(range(5))), ("10%", [9, 19, 29, 39, 49, 59])])
def test_a_subset(tmp_path: Path, subset: str, kept: list[int]) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    _prepare(tmp_path / "out", tmp_path / "a.jsonl", subset=subset, val_fraction=0.02)
    assert "".join(_documents(tmp_path / "out", "train")).startswith("".join(LINES[i] for i in kept[:-1]))
    with pytest.raises(DataError, match="subset '-3'"):
        _prepare(tmp_path / "other", tmp_path / "a.jsonl", subset="-3")


def test_openwebtext_is_read_by_the_library_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's datasets on a folder with Parquet files in the place of the hub's: streamed in part, and whole."""
    datasets = pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"document {number} of the web" for number in range(40)]
    (tmp_path / "hub").mkdir()
    for part in range(2):
        table = pyarrow.table({"text": texts[20 * part : 20 * (part + 1)]})
        parquet.write_table(table, tmp_path / "hub" / f"train-{part:05d}-of-00002.parquet")
    monkeypatch.setattr(openwebtext, "REPOSITORY", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    assert list(openwebtext.openwebtext(None, 7.5 / DOCUMENTS, 1)()) == texts[:7]
    assert list(openwebtext.openwebtext(23, 1.0, 1)()) == texts[:23]
    assert not list((tmp_path / "cache").rglob("*.arrow"))  # a part is streamed
    assert list(openwebtext.openwebtext(None, 1.0, 2)()) == texts
    assert list((tmp_path / "cache").rglob("*.arrow"))
    monkeypatch.setattr(openwebtext, "REPOSITORY", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"could not be read from the Hugging Face hub.*\.parquet files elsewhere"):
        list(openwebtext.openwebtext(None, 1.0, 1)())


def test_openwebtext_asks_the_hub_for_no_more_than_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset itself is 13 GB; a stand-in notes what is asked for."""
    asked: list[Any] = []

    class Rows(list[dict[str, str]]):
        def take(self, count: int) -> Iterator[dict[str, str]]:
            asked.append(count)
            return iter(self[:10])

    def load_dataset(name: str, **options: Any) -> Rows:
        asked.append((name, options))
        return Rows({"text": line} for line in LINES)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    _prepare(tmp_path / "part", "openwebtext", subset="1%", val_fraction=0.05)
    assert asked[0] == ("Skylion007/openwebtext", {"split": "train", "streaming": True})
    assert asked[1] == DOCUMENTS // 100
    asked.clear()
    _prepare(tmp_path / "all", "openwebtext", workers=3)
    assert asked[0] == ("Skylion007/openwebtext", {"split": "train", "num_proc": 3})


def _tokenizer_folder(folder: Path) -> Path:
    """A small byte-pair tokenizer as the tokenizers library saves it."""
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(LINES, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return folder


def test_any_tokenizer_of_the_tokenizers_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", 200)
    folder = _tokenizer_folder(tmp_path / "tok")
    (tmp_path / "a.jsonl").write_bytes(JSONL + json.dumps({"text": "a </s> b"}).encode())
    results = []
    for number, spelled in enumerate((folder, folder / "tokenizer.json")):
        out = tmp_path / f"out{number}"
        _prepare(out, tmp_path / "a.jsonl", tokenizer=str(spelled), workers=number + 1, val_fraction=0.2)
        results.append(open_tokens(out, "train").tolist())
        tokenizer = load_tokenizer(out)
        assert tokenizer is not None
        assert vocabulary_size(out) == tokenizer.vocab_size == read_meta(out)["vocab_size"]
        # The end of a document is the token that the tokenizer names; the same letters in a text are not that token.
        assert tokenizer.end_of_text == 1
        assert (open_tokens(out, "val") == 1).sum() == len(_documents(out, "val"))
        assert _documents(out, "val")[-1] == "a </s> b</s>"
    assert results[0] == results[1]


def test_the_tokenizer_goes_along_with_an_export(tmp_path: Path) -> None:
    """transformers reads the exported folder's tokenizer as the corpus was made with."""
    from types import SimpleNamespace

    transformers = pytest.importorskip("transformers")
    from zerofit.checkpoint.export_formats import _write_tokenizer

    (tmp_path / "a.jsonl").write_bytes(JSONL)
    out = tmp_path / "out"
    _prepare(out, tmp_path / "a.jsonl", tokenizer=str(_tokenizer_folder(tmp_path / "tok")))
    job: Any = SimpleNamespace(
        source=SimpleNamespace(state={"data_path": str(out)}), model=SimpleNamespace(items_per_sample=64)
    )
    (tmp_path / "export").mkdir()
    assert "was written" in _write_tokenizer(job, tmp_path / "export")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    mine = load_tokenizer(out)
    assert mine is not None
    assert theirs.encode(LINES[3]) == mine.encode(LINES[3]).tolist()
    assert theirs.eos_token_id == mine.end_of_text


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        _prepare(tmp_path / "out", tmp_path / "a.jsonl", tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no file"):
        _prepare(tmp_path / "out", tmp_path / "a.jsonl", tokenizer="./nowhere")


@given(text=st.text(max_size=50))
def test_bytes_and_characters_round_trip(text: str) -> None:
    assert ByteTokenizer().decode(ByteTokenizer().encode(text).tolist()) == text
    characters = CharTokenizer.of_text(text + "x")
    assert characters.decode(characters.encode(text).tolist()) == text


# Folders of nanoGPT and of others


def _nanogpt(folder: Path, meta: object) -> None:
    ids = np.arange(400) % 4
    for split in ("train", "val"):
        ids.astype(np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def test_nanogpt_folders_work_as_they_are(tmp_path: Path) -> None:
    alphabet = "zebr"  # not in the order of code points: the ids are the file's
    _nanogpt(
        tmp_path, {"vocab_size": 5, "itos": dict(enumerate(alphabet)), "stoi": {c: i for i, c in enumerate(alphabet)}}
    )
    assert vocabulary_size(tmp_path) == 5
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("bez").tolist() == [2, 1, 0]
    assert tokenizer.decode([0, 1, 2, 3]) == alphabet
    said = describe_inferred(tmp_path)
    assert said is not None
    assert "uint16" in said
    assert "largest id is 3" in said


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch hacked",))


@pytest.mark.parametrize("meta", [_Hostile(), {"vocab_size": _Hostile()}, {"stoi": np.arange(3)}, {"a": Path("x")}])
def test_a_pickle_that_names_code_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meta: object
) -> None:
    monkeypatch.chdir(tmp_path)
    _nanogpt(tmp_path, meta)
    with pytest.raises(DataError, match=r"names (posix\.system|numpy|pathlib).*not loaded"):
        vocabulary_size(tmp_path)
    assert not (tmp_path / "hacked").exists()


def test_a_torn_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3})[:-5])
    with pytest.raises(DataError, match=r"meta\.pkl"):
        read_plain_pickle(tmp_path / "meta.pkl")


def test_what_prepare_writes_holds_plain_values_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    _prepare(tmp_path / "out", tmp_path / "a.jsonl", tokenizer="char")
    meta = read_plain_pickle(tmp_path / "out" / "meta.pkl")
    assert meta["stoi"][meta["itos"][3]] == 3
    _prepare(tmp_path / "bytes", tmp_path / "a.jsonl")
    assert read_plain_pickle(tmp_path / "bytes" / "meta.pkl") == {"vocab_size": 257}


@settings(max_examples=60, deadline=None)
@given(
    vocabulary=st.sampled_from([3, 65, 257, 5000, 50_257, 65_536, 128_256, 250_000]),
    length=st.integers(200, 5000),
    seed=st.integers(0, 1000),
)
def test_the_width_of_tokens_is_told_by_the_bytes(
    tmp_path_factory: pytest.TempPathFactory, vocabulary: int, length: int, seed: int
) -> None:
    """Ids drawn as words are: a few often, most of them rarely."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.zipf(1.1, length), vocabulary) - 1
    ids[:2] = (vocabulary - 1, 1)
    for dtype in (np.uint16, np.uint32):
        if vocabulary - 1 <= np.iinfo(dtype).max:
            path = tmp_path_factory.mktemp("width") / "train.bin"
            ids.astype(dtype).tofile(path)
            assert infer_width(path).dtype == dtype


def test_files_are_read_for_their_largest_id_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zerofit.data import metadata

    _nanogpt(tmp_path, {"vocab_size": 4})
    model = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=4, block_size=4)
    check_data(tmp_path, model)
    scans: list[str] = []
    real = metadata.largest_token
    monkeypatch.setattr(metadata, "largest_token", lambda path, dtype: scans.append(path.name) or real(path, dtype))
    check_data(tmp_path, model)
    assert scans == []
    np.full(400, 9, dtype=np.uint16).tofile(tmp_path / "val.bin")
    with pytest.raises(DataError, match="token 9"):
        check_data(tmp_path, model)
    assert scans == ["val.bin"]


def test_chunks_hold_bounded_text() -> None:
    found = list(encode.chunks(Piece("x" * 400_000) for _ in range(10)))
    assert [len(chunk.pieces) for chunk in found] == [3, 3, 3, 1]


@pytest.mark.parametrize("indexed", [True, False])
def test_show_marks_where_documents_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, indexed: bool
) -> None:
    from zerofit.cli.data import show

    (tmp_path / "a.jsonl").write_bytes(JSONL)
    out = tmp_path / "out"
    _prepare(out, tmp_path / "a.jsonl")
    if not indexed:  # as in a folder of another script: the end-of-text tokens tell
        (out / "train_documents.bin").unlink()
    monkeypatch.setenv("COLUMNS", "200")
    show(out, "train", 2, 100, 1337, False)
    shown = capsys.readouterr().out
    marks = [line for line in shown.splitlines() if "[document" in line]
    assert marks
    for line in marks:
        number, text = line.split("[document")[1].split("]", 1)
        assert text.startswith(f"document {number.strip()}"[: len(text)] if indexed else "docu")
    assert "é" in shown
    show(out, "train", 2, 100, 1337, True)
    told = json.loads(capsys.readouterr().out)
    for places, window in zip(told["document_starts"], told["samples"], strict=True):
        assert [place for place in places if place] == [i for i in range(1, 101) if window[i - 1] == 256]


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        (".", "here-prepared"),
        ("..", "above-prepared"),
        ("../.hidden", "../.hidden-prepared"),
        ("../a.b", "../a-prepared"),
    ],
)
def test_where_prepared_data_goes_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, found: str
) -> None:
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    for folder in (here, here.parent / ".hidden", here.parent / "a.b"):
        folder.mkdir(exist_ok=True)
        (folder / "text.txt").write_text("text")
    monkeypatch.chdir(here)
    named = _target(Path(typed))
    assert named.name == Path(found).name
    assert not named.exists()
    assert named.parent.resolve() == Path(typed).resolve().parent


def test_a_folder_that_may_not_be_read_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def closed(self: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "mine").mkdir()
    monkeypatch.setattr("zerofit.training.preset_data.is_prepared", lambda path: closed(path))
    resolved = load_config(None, "shakespeare_char", [("data.path", str(tmp_path / "mine"))])
    with pytest.raises(DataError, match=r"mine cannot be read \(Permission denied.*name another folder"):
        refuse_presets_data(resolved)
