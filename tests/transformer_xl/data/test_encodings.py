"""Byte-order marks, line ends and encodings: read alike in every reader, or refused."""

from __future__ import annotations

import codecs
import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_xl.data import Corpus, sources
from transformer_xl.data.sources import Piece, plain_text
from transformer_xl.data.text import decode_stream, split_lines, whole_lines
from transformer_xl.data.vocabularies import (
    ByteVocabulary,
    CharVocabulary,
    SubwordVocabulary,
    Vocabulary,
    WordVocabulary,
)

Opened = Callable[..., Corpus]
SplitFiles = Callable[..., Path]
NO_LINE_ENDS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
WORDS = WordVocabulary(["<eos>", "a", "b", "<unk>"])


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize("read_bytes", [1, 2, 3, 1 << 20])
def test_every_end_of_a_line_is_one_token_in_words(
    end: str, read_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "READ_BYTES", read_bytes)
    text, expected = f"a b{end}{end}b{end}a", [1, 2, 0, 0, 2, 0, 1]
    assert WORDS.encode(text) == expected
    assert WordVocabulary(["<S>", "a", "b"]).encode(text) == [0, 1, 2, 0, 0, 0, 0, 2, 0, 0, 1]
    path = tmp_path / "text"
    for written, streamed in ((text, [*expected, 0]), (text + end, [*expected, 0])):
        path.write_bytes(written.encode())
        assert [token for ids, _ in WORDS.lookup_stream(Piece(path)) for token in ids] == streamed
    path.write_text(f"<S>{end}a 12{end}{end}b", newline="")
    assert WordVocabulary.from_list(Piece(path)).words == ["<S>", "a", "b"]


@pytest.mark.parametrize("other", NO_LINE_ENDS)
def test_nothing_else_ends_a_line(other: str, tmp_path: Path) -> None:
    assert WORDS.encode(f"a{other}b\n") == [1, 2, 0]
    assert split_lines(f"a{other}b\r\nc") == [f"a{other}b\r\n", "c"]
    assert list(whole_lines([f"a{other}", "b\n"])) == [f"a{other}b\n"]
    path = tmp_path / "words"
    path.write_text(f"<eos>\na{other}b\n", encoding="utf-8")
    assert WordVocabulary.from_list(Piece(path)).words == ["<eos>", "a"]


texts = st.lists(st.text(st.sampled_from("ab \r\n\x85"), max_size=8), max_size=6)


@given(texts=texts)
def test_lines_are_the_same_however_the_text_is_cut(texts: list[str]) -> None:
    text = "".join(texts)
    pieces = list(whole_lines(texts))
    assert "".join(pieces) == text
    assert [line for piece in pieces for line in split_lines(piece)] == split_lines(text)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert [line.rstrip("\r\n") for line in split_lines(text)] == lines[: len(split_lines(text))]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_one_file_is_cut_at_any_end_of_a_line(end: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("".join(f"line {i:03}{end}" for i in range(1000)).encode())
    length = len(f"line 000{end}")
    sizes = [pieces[0].size for pieces in plain_text(path).values()]
    assert sizes == [900 * length, 50 * length, 50 * length]


@pytest.fixture(params=["char", "word", "bpe"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_byte_order_mark_is_no_part_of_the_text(
    kind: str, split_files: SplitFiles, opened: Opened
) -> None:
    folder = split_files("{}.txt", "one two\n" * 9, "two\n", "one\n")
    fields = {"tokenizer": kind, "bpe_size": 260}
    plain = opened("text", folder, **fields).fingerprint
    for file in folder.iterdir():
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert opened("text", folder, **fields).fingerprint == plain
    marked = opened("text", folder)
    assert bytes(marked.split("test")) == codecs.BOM_UTF8 + b"one\n"  # bytes are read as they are


@pytest.mark.parametrize("read_bytes", [1, 2, 1 << 20])
def test_only_a_mark_at_the_start_of_a_file_is_left_out(
    read_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "READ_BYTES", read_bytes)
    path = tmp_path / "text"
    path.write_text("\ufeffab\ufeffc", encoding="utf-8")
    assert "".join(decode_stream(Piece(path))) == "ab\ufeffc"
    assert "".join(decode_stream(Piece(path, start=5))) == "\ufeffc"
    path.write_bytes(codecs.BOM_UTF8)
    assert list(decode_stream(Piece(path))) == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("mark", [False, True])
def test_other_encodings_are_refused(
    encoding: str, mark: bool, kind: str, tmp_path: Path, opened: Opened
) -> None:
    text = ("\ufeff" if mark and "-" in encoding[4:] else "") + "a few words\n" * 50
    path = tmp_path / "other.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=r"other.txt: expected UTF-8 text, found .* convert") as e:
        opened("text", path, tokenizer=kind)
    assert "\n" not in str(e.value)
    (tmp_path / "other.txt.gz").write_bytes(gzip.compress(text.encode(encoding)))
    with pytest.raises(ValueError, match=r"other.txt.gz: expected UTF-8 text, found"):
        opened("text", tmp_path / "other.txt.gz", tokenizer=kind)
    assert opened("text", path).vocab.kind == "byte"


def test_a_nul_byte_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "READ_BYTES", 4)
    (tmp_path / "text").write_bytes(b"abcdef\0g")
    with pytest.raises(ValueError, match="text: expected UTF-8 text, found a NUL byte at offset 6"):
        list(decode_stream(Piece(tmp_path / "text", start=2)))


@pytest.mark.parametrize("made", [WORDS, CharVocabulary(["a"]), ByteVocabulary(b"ab")])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_vocabulary_files_may_have_a_mark(ending: str, made: Vocabulary, tmp_path: Path) -> None:
    path = tmp_path / f"vocabulary.json{ending}"
    made.save(tmp_path / "plain.json")
    data = codecs.BOM_UTF8 + (tmp_path / "plain.json").read_bytes()
    path.write_bytes(gzip.compress(data) if ending else data)
    assert Vocabulary.load(path).to_dict() == made.to_dict()
    path.write_bytes("{}".encode("utf-16"))
    with pytest.raises(ValueError, match=r"vocabulary.json(.gz)?: (expected UTF-8|the compressed)"):
        Vocabulary.load(path)


def test_tokenizer_files_may_have_a_mark(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a few words\n")
    learned = SubwordVocabulary.learn([Piece(tmp_path / "text")], 256)
    path = tmp_path / "tokenizer.json"
    learned._tokenizer.save(str(path))
    plain = path.read_bytes()
    path.write_bytes(codecs.BOM_UTF8 + plain)
    assert SubwordVocabulary.from_file(path).to_dict() == learned.to_dict()
    (tmp_path / "tokenizer.json.gz").write_bytes(gzip.compress(plain))
    assert SubwordVocabulary.from_file(tmp_path / "tokenizer.json.gz").encode("a") == [64]
    path.write_text("{}", encoding="utf-16")
    with pytest.raises(ValueError, match=r"tokenizer.json: expected UTF-8 text, found .*UTF-16"):
        SubwordVocabulary.from_file(path)
