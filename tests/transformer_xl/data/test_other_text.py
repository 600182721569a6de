"""A given vocabulary reads any text; unknown symbols are counted, or refused with their place."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from transformer_xl.config import DataConfig
from transformer_xl.data import Corpus, encoding, open_corpus
from transformer_xl.data.sources import Piece
from transformer_xl.data.vocabularies import (
    ByteVocabulary,
    CharVocabulary,
    SubwordVocabulary,
    UnknownSymbolError,
    Vocabulary,
    WordVocabulary,
)

SplitFiles = Callable[..., Path]
Read = Callable[[Vocabulary, Path], Corpus]
WORDS = ["<eos>", "<unk>", "a", "b"]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def opened(vocabulary: Vocabulary, path: Path, name: str = "text", **fields: str) -> Corpus:
        cache = str(tmp_path / "cache")
        config = DataConfig(name=name, path=str(path), cache_dir=cache, **fields)
        return open_corpus(config, vocabulary)

    return opened


@pytest.fixture
def learned(tmp_path: Path) -> SubwordVocabulary:
    (tmp_path / "learned").write_text("low lower lowest\n")
    return SubwordVocabulary.learn([Piece(tmp_path / "learned")], 262)


def test_unknown_words_are_unk_and_counted_by_split(read: Read, split_files: SplitFiles) -> None:
    folder = split_files("{}.txt", "a <unk> zebra\n", "b\n", "zebra a gnu zebra\r\ngnu\n")
    corpus = read(WordVocabulary(WORDS), folder)
    assert corpus.split("train").tolist() == [2, 1, 1, 0]
    assert corpus.split("test").tolist() == [1, 2, 1, 1, 0, 1, 0]
    assert corpus.metric == "ppl"
    assert corpus.source("test") == (
        "test split of text (standard: word tokens), V = 4 (a checkpoint's vocabulary), "
        "4 unknown words read as <unk>"
    )
    assert ", 1 unknown words read as <unk>" in corpus.source("train")
    assert "unknown" not in corpus.source("valid")


def test_unknown_characters_and_subwords_are_counted(read: Read, split_files: SplitFiles) -> None:
    folder = split_files("{}.txt", "abab", "ab", "abcdc")
    corpus = read(CharVocabulary(["<unk>", "a", "b"]), folder)
    assert corpus.split("test").tolist() == [1, 2, 0, 0, 0]
    assert "3 unknown characters read as <unk>" in corpus.source("test")
    assert corpus.metric == "bpc"
    model = models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]")
    pieces = SubwordVocabulary(Tokenizer(model))
    corpus = read(pieces, split_files("{}.txt", "ab", "ab", "abc"))
    assert corpus.split("test").tolist() == [0]
    assert "1 unknown subwords read as <unk>" in corpus.source("test")


def test_the_own_text_has_its_unknown_words_counted_too(
    opened: Callable[..., Corpus], split_files: SplitFiles
) -> None:
    folder = split_files("{}.txt", "a b\n", "a\n", "a c\n")
    assert "1 unknown words" in opened("text", folder, tokenizer="word").source("test")


def test_learned_subwords_read_every_text(
    read: Read, learned: SubwordVocabulary, split_files: SplitFiles
) -> None:
    folder = split_files("{}.txt", "größer\r\n", "low\n", "\x85 ☃\n")
    corpus = read(learned, folder)
    assert corpus.vocab.decode(corpus.split("train")) == "größer\r\n"
    assert "unknown" not in corpus.source("train")


@pytest.mark.parametrize(
    ("vocabulary", "error", "count"),
    [
        (WordVocabulary(["<eos>", "a", "b"]), "word 'zzz' .* of 3 words", 5),
        (CharVocabulary(list("ab \n\r")), "character 'z' .* of 5 characters", 15),
        (ByteVocabulary(b"ab ", b"\n\r"), "byte 0x7a .* of 3 bytes", 15),
    ],
    ids=["word", "char", "byte"],
)
@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_without_unk_the_error_has_symbol_line_and_count(
    vocabulary: Vocabulary, error: str, count: int, end: str, read: Read, tmp_path: Path
) -> None:
    text = "a b\n" * 95 + "a zzz\n" * 3 + "zzz b\n" * 2
    path = tmp_path / "other.txt"
    path.write_bytes(text.replace("\n", end).encode())
    with pytest.raises(
        UnknownSymbolError,
        match=rf"other.txt: {error}, which has no <unk> \(line 96; {count} unknown \w+ in all\)",
    ):
        read(vocabulary, path)
    assert not list((tmp_path / "cache").glob("text*"))


def test_encode_has_the_same_error(learned: SubwordVocabulary) -> None:
    with pytest.raises(UnknownSymbolError, match=r"word 'c' .* \(line 2; 3 unknown words in all\)"):
        WordVocabulary(["<eos>", "a"]).encode("a\rc b\r\n c")
    with pytest.raises(UnknownSymbolError, match=r"character 'z' .* \(line 3; 1 unknown"):
        CharVocabulary(list("a\n")).encode("a\n\nz")
    assert learned.encode("any ☃")


def test_a_tokenizer_that_drops_unknown_characters_refuses_them(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(["low new"], trainers.BpeTrainer(show_progress=False))
    closed = SubwordVocabulary(tokenizer)
    assert len(closed.encode("low new\nlow\n")) == 3
    with pytest.raises(UnknownSymbolError, match=r"subword 'z' .* \(line 2; 3 unknown subwords"):
        closed.encode("low\nzéo zo\n")
    path = tmp_path / "text"
    path.write_text("low\nno xw\n")
    [(ids, n_unknown)] = closed.lookup_stream(Piece(path))
    assert (len(ids), n_unknown) == (4, 1)
    with pytest.raises(UnknownSymbolError, match=r"text: subword 'x' .* \(line 2; 1 unknown"):
        closed.check_unknown(Piece(path), n_unknown)


def test_a_tokenizer_that_refuses_a_word_names_it_with_line_and_count() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UnknownSymbolError) as raised:
        SubwordVocabulary(tokenizer).encode("a a\na b c\nb\n")
    for part in ("'b'", "line 2", "3"):
        assert part in str(raised.value)


def test_the_own_vocabulary_encodes_nothing_again(
    opened: Callable[..., Corpus],
    read: Read,
    split_files: SplitFiles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = split_files("{}.txt", "a b\n" * 9, "a\n", "b\n")
    own = opened("text", folder, tokenizer="word")
    monkeypatch.setattr(encoding, "build_vocabulary", None)
    again = read(own.vocab, folder, tokenizer="word")
    assert again.folder == own.folder
    assert again.protocol == own.protocol == "text (standard: word tokens), V = 4"


def test_another_vocabulary_has_a_folder_of_its_own(read: Read, split_files: SplitFiles) -> None:
    folder = split_files("{}.txt", "ab", "ab", "ba")
    first, second = (read(CharVocabulary(list(order)), folder) for order in ("ab", "ba"))
    assert first.folder != second.folder
    assert first.split("test").tolist() == [1, 0]
    assert second.split("test").tolist() == [0, 1]
    assert read(CharVocabulary(list("ab")), folder).folder == first.folder


def test_other_data_sets_are_read_too(read: Read, split_files: SplitFiles) -> None:
    folder = split_files("wiki.{}.tokens", "c a\n", "a\n", "b d\n")
    corpus = read(WordVocabulary(WORDS), folder, "wt103")
    assert corpus.split("test").tolist() == [3, 1, 0]
    missing = read(WordVocabulary(WORDS), folder, "wt103", tokenizer_file="/nowhere.json")
    assert missing.folder == corpus.folder


@pytest.mark.parametrize("run", ["ACGT", "1234", "-+*/", " \t", "é"])
def test_no_learned_piece_is_long(run: str, tmp_path: Path) -> None:
    text = "".join(run[i * i % 7 % len(run)] for i in range(20_000))
    (tmp_path / "long").write_text(text, encoding="utf-8")
    learned = SubwordVocabulary.learn([Piece(tmp_path / "long")], 400)
    pieces = learned._tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert max(stop - start for _, (start, stop) in pieces) <= 257  # a space and 256 characters
    assert learned.decode(learned.encode(text)) == text


def test_ordinary_text_has_the_pieces_of_byte_level_bpe(learned: SubwordVocabulary) -> None:
    text = f"It's  we'll 12 words,\tand\n\n more…  {string.punctuation} größer 日本語 \r\n x  "
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    assert learned._tokenizer.pre_tokenizer.pre_tokenize_str(text) == plain
    assert json.loads(learned._tokenizer.to_str())["model"]["type"] == "BPE"


@pytest.mark.parametrize(
    ("vocabulary", "first"),
    [
        (ByteVocabulary(), "\n"),
        (ByteVocabulary(b"e t\n", b"\n"), " "),
        (ByteVocabulary(b"et", b"\n"), "e"),
        (ByteVocabulary(b"\xff"), "\ufffd"),
        (CharVocabulary([" ", *string.ascii_lowercase]), " "),
        (CharVocabulary(["<unk>", *"ACGT"]), "A"),
        (WordVocabulary(WORDS), "\n"),
        (WordVocabulary(["<S>", "a"]), ""),
    ],
    ids=["bytes", "counted_bytes", "letters", "no_text", "chars", "dna", "words", "sentences"],
)
def test_every_vocabulary_can_begin_a_text(vocabulary: Vocabulary, first: str) -> None:
    tokens = vocabulary.first_tokens()
    assert len(tokens) == 1
    assert vocabulary.decode(tokens) == first
