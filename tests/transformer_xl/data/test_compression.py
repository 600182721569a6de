"""Compressed files and archives are unpacked, or refused with one sentence, in every reader."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from transformer_xl.data import Corpus, sources
from transformer_xl.data.sources import Piece, find_piece, plain_text

Opened = Callable[..., Corpus]
TEXT = "".join(f"line {i} of the text é\n" for i in range(200))
TARS = {
    ".tar": "w",
    ".tgz": "w:gz",
    ".tar.gz": "w:gz",
    ".TAR.GZ": "w:gz",
    ".tar.bz2": "w:bz2",
    ".tbz2": "w:bz2",
    ".tar.xz": "w:xz",
    ".txz": "w:xz",
}


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """An archive of these files, whose kind follows from its name."""
    for name, data in files.items():
        member = path.parent / "members" / name
        member.parent.mkdir(parents=True, exist_ok=True)
        member.write_bytes(data)
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("folder/", "")
            for name in files:
                archive.write(path.parent / "members" / name, name)
    else:
        mode = next(mode for ending, mode in TARS.items() if path.name.endswith(ending))
        with tarfile.open(path, mode) as tar:
            for name in files:
                tar.add(path.parent / "members" / name, name)
    return path


def whole(corpus: Corpus) -> str:
    return "".join(corpus.vocab.decode(corpus.split(split)) for split in ("train", "valid", "test"))


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
@pytest.mark.parametrize("kind", [".zip", ".ZIP", *TARS])
def test_a_text_alone_in_an_archive_is_read(
    kind: str, tokenizer: str, tmp_path: Path, opened: Opened
) -> None:
    files = {"some/text.of.mine": TEXT.encode(), "__MACOSX/some/._text": b"x", ".hidden": b"y"}
    archive = pack(tmp_path / f"corpus{kind}", files)
    assert whole(opened("text", archive, tokenizer=tokenizer)) == TEXT


def test_the_text_with_the_name_of_the_archive_is_read(tmp_path: Path, opened: Opened) -> None:
    files = {"README": b"read me\n", "corpus.v1.txt": TEXT.encode(), "LICENSE": b"mine\n"}
    assert whole(opened("text", pack(tmp_path / "corpus.v1.zip", files))) == TEXT
    with tarfile.open(tmp_path / "corpus.v1.tar.gz", "w:gz") as tar:
        for name in files:
            tar.add(tmp_path / "members" / name, name)
    assert whole(opened("text", tmp_path / "corpus.v1.tar.gz")) == TEXT


def test_a_text_below_the_current_folder_is_read(tmp_path: Path, opened: Opened) -> None:
    archive = pack(tmp_path / "corpus.tar.gz", {"./book.txt": TEXT.encode(), "./.hidden": b"y"})
    assert whole(opened("text", archive)) == TEXT


def test_three_files_in_an_archive_are_the_splits(tmp_path: Path, opened: Opened) -> None:
    names = ("a/train.txt", "a/valid.txt", "a/test.txt")
    archive = pack(tmp_path / "corpus.tar.gz", {name: name.encode() for name in names})
    assert bytes(opened("text", archive).split("valid")) == b"a/valid.txt"


def test_an_archive_without_a_text_that_can_be_chosen_is_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "corpus.tar", {"a": b"1", "b": b"2"})
    with pytest.raises(FileNotFoundError, match=r"corpus.tar: expected train.txt or train or"):
        plain_text(archive)


@pytest.mark.parametrize("tokenizer", ["byte", "char", "word", "bpe"])
@pytest.mark.parametrize("ending", [".gz", ".bz2", ".GZ"])
def test_one_compressed_file_is_read(
    ending: str, tokenizer: str, tmp_path: Path, opened: Opened
) -> None:
    compress = bz2.compress if ending == ".bz2" else gzip.compress
    half = len(TEXT.encode()) // 2
    path = tmp_path / f"corpus.txt{ending}"
    path.write_bytes(compress(TEXT.encode()[:half]) + compress(TEXT.encode()[half:]))
    (tmp_path / "plain.txt").write_text(TEXT, encoding="utf-8")
    fields = {"tokenizer": tokenizer, "bpe_size": 300}
    plain = opened("text", tmp_path / "plain.txt", **fields)
    assert opened("text", path, **fields).fingerprint == plain.fingerprint


def test_compressed_splits_are_found_by_name(tmp_path: Path, opened: Opened) -> None:
    for split, compress in (("train", gzip.compress), ("valid", bz2.compress)):
        ending = "gz" if compress is gzip.compress else "bz2"
        (tmp_path / f"wiki.{split}.tokens.{ending}").write_bytes(compress(b"a b\n"))
    (tmp_path / "wiki.test.tokens").write_text("b a\n")
    corpus = opened("wt103", tmp_path)
    assert [corpus.split(split).tolist() for split in ("train", "valid", "test")] == [
        [1, 2, 0],
        [1, 2, 0],
        [2, 1, 0],
    ]


@pytest.mark.parametrize("read_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize(("start", "stop"), [(0, None), (3, 700), (700, None), (5, 5)])
@pytest.mark.parametrize("ending", [".gz", ".bz2"])
def test_any_range_of_a_compressed_file_is_read(
    start: int,
    stop: int | None,
    ending: str,
    read_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "READ_BYTES", read_bytes)
    data = bytes(range(256)) * 4
    path = tmp_path / f"data{ending}"
    path.write_bytes((gzip if ending == ".gz" else bz2).compress(data))
    piece = Piece(path, None, start, stop)
    assert b"".join(piece.chunks()) == data[start:stop]
    assert piece.size == len(data[start:stop])


def test_a_compressed_member_of_an_archive_is_read(tmp_path: Path, opened: Opened) -> None:
    archive = pack(tmp_path / "corpus.tar", {"corpus.txt.gz": gzip.compress(TEXT.encode())})
    assert whole(opened("text", archive)) == TEXT


def test_an_archive_in_an_archive_is_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "corpus.tar", {"inner.zip": b"PK"})
    with pytest.raises(ValueError, match=r"corpus.tar:inner.zip: an archive in an archive cannot"):
        plain_text(archive)


@pytest.mark.parametrize("name", ["text.7z", "text.rar", "text.tar.zst", "text.TZST"])
def test_archives_of_other_kinds_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"data")
    for read in (plain_text, lambda path: find_piece(path, ["enwik8"])):
        with pytest.raises(ValueError, match=f"{name}: this kind of archive cannot be read: unp"):
            read(tmp_path / name)


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
@pytest.mark.parametrize("ending", ["gz", "bz2"])
@pytest.mark.parametrize("keep", [0, 3, 60])
def test_a_damaged_compressed_file_is_named(
    keep: int, ending: str, tokenizer: str, tmp_path: Path, opened: Opened
) -> None:
    path = tmp_path / f"text.{ending}"
    path.write_bytes((gzip if ending == "gz" else bz2).compress(TEXT.encode())[:keep])
    with pytest.raises(
        ValueError, match=f"text.{ending}: the (compressed file is damaged|file is empty)"
    ):
        opened("text", path, tokenizer=tokenizer)
    path.write_text(TEXT, encoding="utf-8")  # mislabelled
    with pytest.raises(ValueError, match=f"text.{ending}: the compressed file is damaged"):
        opened("text", path, tokenizer=tokenizer)


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "text.zip", {"text": b"abc"})
    data = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.rfind(signature)
        data[at + offset] |= 1  # the flag of encryption
    archive.write_bytes(data)
    with pytest.raises(ValueError, match=r"text.zip: the archive is damaged \(.*encrypted"):
        b"".join(find_piece(archive, ["text"]).chunks())


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("gzip", gzip.compress(TEXT.encode())),
        ("bzip2", bz2.compress(TEXT.encode())),
        ("bzip2", bz2.compress(b"")),
        ("xz", lzma.compress(TEXT.encode())),
        ("zip", b"PK\x03\x04\x14\0"),
        ("Zstandard", b"\x28\xb5\x2f\xfd\x04"),
        ("7z", b"7z\xbc\xaf\x27\x1c\0"),
        ("rar", b"Rar!\x1a\x07\x01"),
    ],
)
def test_compressed_data_under_another_name_is_refused_as_text_and_read_as_bytes(
    kind: str, data: bytes, tmp_path: Path, opened: Opened
) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_bytes(data)
    for tokenizer in ("char", "word", "bpe"):
        with pytest.raises(ValueError, match=rf"txt: expected UTF-8 text, found .* of {kind} data"):
            opened("text", tmp_path, tokenizer=tokenizer)
    assert bytes(opened("text", tmp_path).split("test")) == data
