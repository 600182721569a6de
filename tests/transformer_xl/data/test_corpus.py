"""Opening a corpus: encoded once, reused while its files are the same; damage and bad input."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from transformer_xl.config import DataConfig
from transformer_xl.data import Corpus, OrderedBatches, corpus, datasets, encoding, open_corpus

Opened = Callable[..., Corpus]
SplitFiles = Callable[..., Path]


@pytest.fixture
def text(split_files: SplitFiles) -> Path:
    return split_files("{}.txt", "one two\n" * 9, "three\n", "four\n")


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders encoded in this test, in order."""
    done: list[Path] = []

    def counted(recipe: object, splits: object, folder: Path) -> object:
        done.append(folder)
        return encode(recipe, splits, folder)

    encode = encoding.encode
    monkeypatch.setattr(corpus, "encode", counted)
    return done


def test_splits_are_read_only_memory_maps(opened: Opened, text: Path) -> None:
    tokens = opened("text", text).split("train")
    assert isinstance(tokens, np.memmap)
    assert not tokens.flags.writeable
    assert bytes(tokens) == b"one two\n" * 9


def test_it_is_encoded_once(opened: Opened, text: Path, encodings: list[Path]) -> None:
    first, second = opened("text", text), opened("text", text)
    assert encodings == [first.folder]
    assert second.fingerprint == first.fingerprint
    names = sorted(file.name for file in first.folder.iterdir())
    assert names == ["record.json", "test.bin", "train.bin", "valid.bin", "vocabulary.json"]
    assert list(first.folder.parent.iterdir()) == [first.folder]


def test_a_touched_file_is_not_encoded_again(
    opened: Opened, text: Path, encodings: list[Path]
) -> None:
    opened("text", text)
    os.utime(text / "train.txt", ns=(1, 1))
    opened("text", text)
    assert len(encodings) == 1


@pytest.mark.parametrize("content", ["six six\n" * 9, "shorter\n"])
def test_a_changed_file_is_encoded_again(
    content: str, opened: Opened, text: Path, encodings: list[Path]
) -> None:
    before = opened("text", text)
    (text / "train.txt").write_text(content)
    os.utime(text / "train.txt", ns=(1, 1))
    after = opened("text", text)
    assert encodings == [before.folder, after.folder]
    assert before.folder == after.folder
    assert after.vocab.decode(after.split("train")) == content
    assert bytes(before.split("train")) == b"one two\n" * 9  # the old map still reads the old file
    assert after.fingerprint != before.fingerprint


def test_other_recipes_have_other_folders(opened: Opened, text: Path) -> None:
    folders = {
        opened("text", text, **fields).folder
        for fields in (
            {},
            {"tokenizer": "char"},
            {"tokenizer": "bpe", "bpe_size": 256},
            {"tokenizer": "bpe", "bpe_size": 257},
        )
    }
    assert len(folders) == 4


def test_the_fingerprint_is_of_the_content_alone(opened: Opened, text: Path) -> None:
    here = opened("text", text)
    moved = text.rename(text.with_name("moved"))
    assert opened("text", moved).fingerprint == here.fingerprint
    assert opened("text", moved, tokenizer="char").fingerprint != here.fingerprint


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("train.bin", "expected 72 bytes, found 71"),
        ("vocabulary.json", "its sha256 is not the recorded one"),
        ("record.json", "it is not JSON"),
    ],
)
def test_a_truncated_file_is_reported(name: str, reason: str, opened: Opened, text: Path) -> None:
    damaged = opened("text", text).folder / name
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{name} is damaged: {reason}.*; delete .* to encode"):
        opened("text", text)


def test_a_missing_token_file_is_reported(opened: Opened, text: Path) -> None:
    (opened("text", text).folder / "valid.bin").unlink()
    with pytest.raises(ValueError, match=r"valid.bin is damaged: expected 6 bytes, found 0"):
        opened("text", text)


def test_a_changed_token_is_reported(opened: Opened, text: Path) -> None:
    damaged = opened("text", text).folder / "train.bin"
    damaged.write_bytes(b"O" + damaged.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"train.bin is damaged: its sha256 is not the recorded"):
        opened("text", text)


@pytest.mark.parametrize("failing", [(encoding.TokenFile, "write"), (Path, "rename")])
def test_an_encoding_that_fails_leaves_nothing(
    failing: tuple[object, str],
    opened: Opened,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened("text", text)
    (text / "train.txt").write_text("changed\n")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(*failing, full_disk)
        with pytest.raises(OSError, match="No space left"):
            opened("text", text)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert opened("text", text).vocab.decode(opened("text", text).split("train")) == "changed\n"


@pytest.mark.parametrize("moment", [(encoding, "build_vocabulary"), (Path, "rename")])
def test_two_processes_that_encode_at_once_both_succeed(
    moment: tuple[object, str],
    opened: Opened,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = getattr(*moment)

    def overtaken(*arguments: object) -> object:
        monkeypatch.setattr(*moment, step)
        opened("text", text)  # another process is quicker
        return step(*arguments)

    monkeypatch.setattr(*moment, overtaken)
    assert bytes(opened("text", text).split("test")) == b"four\n"
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_new_file_of_the_library_is_read(
    opened: Opened, tmp_path: Path, encodings: list[Path]
) -> None:
    (tmp_path / "lib").mkdir()
    for i in range(40):
        (tmp_path / "lib" / f"module{i}.py").write_text("x = 1\n")
    opened("stdlib", tmp_path / "lib")
    (tmp_path / "lib" / "new.py").write_text("y = 2\n")
    found = opened("stdlib", tmp_path / "lib")
    assert len(encodings) == 2
    assert "246 bytes in 41 files" in found.summary()


def test_batches_follow_the_protocol(opened: Opened, text: Path) -> None:
    read = opened("text", text).batches("train", 2, 4, rows=(1, 2))
    assert isinstance(read, OrderedBatches)
    assert read.rows == (1, 2)


def test_the_summary_tells_size_protocol_and_hash(opened: Opened, text: Path) -> None:
    found = opened("text", text)
    assert found.summary().splitlines() == [
        "text (standard: bytes), V = 256",
        "83 bytes in 3 files; train / valid / test: 72 / 6 / 5 tokens",
        f"sha256 {found.fingerprint}",
    ]


def test_an_unknown_split_is_answered_with_the_nearest(opened: Opened, text: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown split 'vali'; did you mean 'valid'\?"):
        opened("text", text).split("vali")


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_an_empty_file_is_named(split: str, opened: Opened, text: Path) -> None:
    (text / f"{split}.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{split}.txt: the file is empty \({split} split\)"):
        opened("text", text)


def test_a_split_without_tokens_is_named(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "WIKI8_BYTES", (2, 2, 2))
    (tmp_path / "enwik8").write_bytes(b"ab\n\nab")
    with pytest.raises(ValueError, match="enwik8: expected tokens for the valid split, found none"):
        opened("enwik8", tmp_path)


def test_missing_files_are_named_with_where_to_get_them(tmp_path: Path, opened: Opened) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"wt103: .*expected wiki.train.tokens or .* in it; get it: WikiT"
    ):
        opened("wt103", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"text: .*nowhere: there is no such file"):
        opened("text", tmp_path / "nowhere")


def test_without_a_path_the_folder_of_its_name_is_looked_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"enwik8: data/enwik8: there is no such file"):
        open_corpus(DataConfig(name="enwik8"))


@pytest.mark.parametrize("tokenizer", ["char", "word", "bpe"])
def test_text_that_is_not_utf8_is_located(tokenizer: str, opened: Opened, text: Path) -> None:
    (text / "valid.txt").write_bytes(b"abc\xff\n")
    with pytest.raises(ValueError, match=r"valid.txt: expected UTF-8 text, found byte 0xff at off"):
        opened("text", text, tokenizer=tokenizer)
    assert bytes(opened("text", text).split("valid")) == b"abc\xff\n"  # bytes ask for no text


def test_a_word_outside_a_closed_vocabulary_is_named(
    opened: Opened, split_files: SplitFiles
) -> None:
    folder = split_files("wiki.{}.tokens", "a\n", "a\n", "zebra\n")
    with pytest.raises(ValueError, match=r"test.tokens: word 'zebra' is not in the vocab"):
        opened("wt103", folder)


def test_a_tokenizer_file_must_be_one(opened: Opened, text: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    file = str(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer.json"):
        opened("text", text, tokenizer="bpe", tokenizer_file=file)
    with pytest.raises(ValueError, match="expected tokenizer 'bpe' with it, got 'byte'"):
        opened("text", text, tokenizer_file=file)
    with pytest.raises(FileNotFoundError, match=r"tokenizer_file: there is no file missing.json"):
        opened("text", text, tokenizer="bpe", tokenizer_file="missing.json")


def test_a_corpus_shorter_than_one_segment_is_refused(opened: Opened, text: Path) -> None:
    with pytest.raises(ValueError, match="shorter than one segment"):
        opened("text", text).batches("test", 1, 5)
