"""Where the bytes lie: files, archives, ranges, and the cuts of one file into splits."""

from __future__ import annotations

import random
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_xl.data import sources
from transformer_xl.data.sources import Piece, find_file, find_piece, plain_text, three_files

DATA = bytes(range(256)) * 3


@pytest.fixture(params=["folder", "file", "zip", "tgz", "folder of zip"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The file `inner/wiki` in one of the ways it may come."""
    folder = tmp_path / "downloaded"
    (folder / "inner").mkdir(parents=True)
    file = folder / "inner" / "wiki"
    file.write_bytes(DATA)
    if request.param == "folder":
        return folder
    if request.param == "file":
        return file
    if request.param == "tgz":
        with tarfile.open(tmp_path / "archive.tgz", "w:gz") as tar:
            tar.add(file, "deep/inner/wiki")
        return tmp_path / "archive.tgz"
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "archive.zip", "w") as archive:
        archive.write(file, "deep/inner/wiki")
    return tmp_path / "zipped" / ("archive.zip" if request.param == "zip" else "")


@pytest.mark.parametrize("read_bytes", [100, 1 << 20])
@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 300), (255, 300), (700, None)])
def test_any_range_is_read_from_any_place(
    place: Path,
    start: int,
    stop: int | None,
    read_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "READ_BYTES", read_bytes)
    found = find_file(place, ["missing", "inner/wiki"])
    piece = Piece(found.path, found.member, start, stop)
    assert b"".join(piece.chunks()) == DATA[start:stop]
    assert piece.size == len(DATA[start:stop])
    assert all(len(chunk) <= read_bytes for chunk in piece.chunks())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such file or folder"):
        find_piece(tmp_path / "nowhere", ["wiki"])
    with pytest.raises(FileNotFoundError, match="expected a or b in it"):
        find_piece(tmp_path, ["a", "b"])
    with pytest.raises(FileNotFoundError, match=r"expected wiki.train.tokens or train.txt in it"):
        three_files(tmp_path, ["wiki.{}.tokens", "{}.txt"])


def test_one_file_is_not_three_splits(tmp_path: Path) -> None:
    (tmp_path / "wiki.train.tokens").write_bytes(DATA)
    with pytest.raises(FileNotFoundError, match=r"expected wiki.train.tokens in it"):
        three_files(tmp_path / "wiki.train.tokens", ["wiki.{}.tokens"])


def test_two_archives_with_the_same_file_are_refused(tmp_path: Path) -> None:
    for name in ("wikitext-103-v1.zip", "wikitext-2-v1.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("wiki.train.tokens", DATA)
    with pytest.raises(ValueError, match=r"expected one archive, found .*-103-v1.zip:wiki.*-2-v1"):
        find_piece(tmp_path, ["wiki.train.tokens"])


@pytest.mark.parametrize("name", ["text.zip", "text.tgz", "text.tar.gz"])
@pytest.mark.parametrize("keep", [0, 3, 200])
def test_a_damaged_archive_is_named(name: str, keep: int, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(random.Random(0).randbytes(1000))
    if name.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.write(tmp_path / "text", "text")
    else:
        with tarfile.open(tmp_path / name, "w:gz") as tar:
            tar.add(tmp_path / "text", "text")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{name}: the archive is damaged"):
        b"".join(find_piece(tmp_path / name, ["text"]).chunks())


lines = st.lists(st.text(st.sampled_from("aé☃ \n"), max_size=30), max_size=30).map("".join)


@given(text=lines)
def test_the_splits_of_one_file_are_the_file(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("plain") / "text"
    path.write_text(text, encoding="utf-8")
    splits = plain_text(path)
    parts = [b"".join(piece.chunks()) for pieces in splits.values() for piece in pieces]
    assert b"".join(parts) == text.encode()
    for part in parts:
        part.decode()  # no cut inside a character


def test_one_file_is_cut_where_lines_end(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"".join(b"line %03d\n" % i for i in range(1000)))
    splits = plain_text(path)
    sizes = [pieces[0].size for pieces in splits.values()]
    assert sizes == [8100, 450, 450]  # 90, 5 and 5% of 9,000 bytes, which are ends of lines
    path.write_bytes(path.read_bytes() + b"end\n")
    sizes = [pieces[0].size for pieces in plain_text(path).values()]
    assert sizes == [8109, 450, 445]


def test_three_plain_files_are_the_splits(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(name)
    splits = plain_text(tmp_path)
    assert {split: b"".join(pieces[0].chunks()) for split, pieces in splits.items()} == {
        "train": b"train",
        "valid": b"valid",
        "test": b"test",
    }
