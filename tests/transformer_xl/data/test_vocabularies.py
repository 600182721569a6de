"""Vocabularies: round trips, the original's order of ids, files read in chunks cut anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_xl.data import sources
from transformer_xl.data.sources import Piece
from transformer_xl.data.token_file import token_type
from transformer_xl.data.vocabularies import (
    ByteVocabulary,
    CharVocabulary,
    SubwordVocabulary,
    UnknownSymbolError,
    Vocabulary,
    WordVocabulary,
)

TEXT = "the cat sat\non the mat\n\nthé ☃ cat\n"
texts = st.text(st.characters(codec="utf-8"), max_size=80)
words = st.lists(st.sampled_from(["the", "cat", "sat", "<unk>", "\n"])).map(" ".join)


@pytest.fixture
def piece(tmp_path: Path) -> Piece:
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    return Piece(tmp_path / "text")


@pytest.fixture(params=["byte", "char", "word", "bpe"])
def vocabulary(request: pytest.FixtureRequest, piece: Piece) -> Vocabulary:
    made = {
        "byte": lambda: ByteVocabulary.count([piece]),
        "char": lambda: CharVocabulary.count([piece]),
        "word": lambda: WordVocabulary.count([piece]),
        "bpe": lambda: SubwordVocabulary.learn([piece], 270),
    }
    return made[request.param]()


def test_saved_and_loaded_it_is_the_same(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    assert type(loaded) is type(vocabulary)
    assert loaded.to_dict() == vocabulary.to_dict()
    assert loaded.encode(TEXT) == vocabulary.encode(TEXT)


def test_text_comes_back(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode(TEXT)
    assert vocabulary.decode(ids) == TEXT
    assert vocabulary.decode(np.array(ids, dtype=np.uint16)) == TEXT
    assert vocabulary.decode([]) == "" == vocabulary.decode(vocabulary.encode(""))


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 1 << 20])
def test_a_file_read_in_any_chunks_gives_the_same_tokens(
    vocabulary: Vocabulary, piece: Piece, read_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "READ_BYTES", read_bytes)
    streamed = [token for ids, _ in vocabulary.lookup_stream(piece) for token in ids.tolist()]
    assert streamed == vocabulary.encode(TEXT)


@pytest.mark.parametrize("wrong", [-1, 100_000])
def test_ids_outside_the_vocabulary_are_refused(vocabulary: Vocabulary, wrong: int) -> None:
    with pytest.raises(IndexError, match=rf"tokens in \[0, {len(vocabulary)}\), got {wrong}"):
        vocabulary.decode([0, wrong])


@given(texts)
def test_every_text_survives_bytes(text: str) -> None:
    vocabulary = ByteVocabulary()
    assert len(vocabulary) == 256
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.encode(text) == list(text.encode())


@given(texts)
def test_every_text_survives_its_own_characters(text: str) -> None:
    vocabulary = CharVocabulary(sorted(set(text)))
    assert vocabulary.decode(vocabulary.encode(text)) == text


@given(words)
def test_words_survive_but_for_white_space(text: str) -> None:
    vocabulary = WordVocabulary(["<eos>", "the", "cat", "sat", "<unk>"])
    lines = [" ".join(line.split()) for line in text.split("\n")]
    assert vocabulary.decode(vocabulary.encode(text)) == "\n".join(lines)


@given(st.lists(st.integers(0, 4)))
def test_word_ids_survive(ids: list[int]) -> None:
    vocabulary = WordVocabulary(["<eos>", "the", "cat", "sat", "<unk>"])
    assert vocabulary.encode(vocabulary.decode(ids)) == ids


@pytest.fixture(scope="module")
def subwords(tmp_path_factory: pytest.TempPathFactory) -> SubwordVocabulary:
    path = tmp_path_factory.mktemp("subwords") / "text"
    path.write_text(TEXT * 5, encoding="utf-8")
    return SubwordVocabulary.learn([Piece(path)], 280)


@given(text=texts)
def test_every_text_survives_subwords(subwords: SubwordVocabulary, text: str) -> None:
    assert subwords.decode(subwords.encode(text)) == text


def test_order_is_end_of_line_then_frequency_then_first_appearance(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("b a a c\nd c b e e e\n")
    assert WordVocabulary.count([Piece(path)]).words == ["<eos>", "e", "b", "a", "c", "d"]
    assert CharVocabulary.count([Piece(path)]).symbols == list(" ebac\nd")
    assert ByteVocabulary.count([Piece(path)], b"\n").values == b" ebacd"


def test_bytes_left_out_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"ab\nba\n")
    vocabulary = ByteVocabulary.count([Piece(path)], dropped=b"\n")
    assert vocabulary.decode(vocabulary.encode("ab\nba\n")) == "abba"


def test_unseen_words_become_unk_or_are_refused() -> None:
    known = WordVocabulary(["<eos>", "a", "<unk>"])
    assert known.encode("a zebra\n") == [1, 2, 0]
    assert WordVocabulary(["<S>", "<UNK>"]).encode("zebra") == [0, 1]
    with pytest.raises(UnknownSymbolError, match="word 'zebra' is not in the vocabulary of 2"):
        WordVocabulary(["<eos>", "a"]).encode("a zebra\n")


def test_unseen_characters_become_unk_or_are_refused() -> None:
    assert CharVocabulary(["<unk>", "a"]).encode("az") == [1, 0]
    with pytest.raises(UnknownSymbolError, match="character 'z' is not in the vocabulary of 1"):
        CharVocabulary(["a"]).encode("az")


def test_unseen_bytes_are_refused() -> None:
    with pytest.raises(UnknownSymbolError, match="byte 0x7a is not in the vocabulary of 2 bytes"):
        ByteVocabulary(b"ab").encode("abz")


def test_sentences_stand_between_two_marks() -> None:
    vocabulary = WordVocabulary(["<S>", "<UNK>", "a", "b"])
    assert vocabulary.encode("a b\nb\n") == [0, 2, 3, 0, 0, 3, 0]
    assert vocabulary.encode("a b") == [0, 2, 3]
    assert vocabulary.decode([0, 2, 3, 0, 0, 3, 0]) == "a b\nb"
    assert vocabulary.decode([3, 0, 0, 2]) == "b\na"


def test_the_last_line_of_a_file_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("a b\na")
    vocabulary = WordVocabulary(["<eos>", "a", "b"])
    ids = [token for ids, _ in vocabulary.lookup_stream(Piece(path)) for token in ids]
    assert ids == [1, 2, 0, 1, 0]


def test_word_lists_keep_their_order_and_skip_repetitions(tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.write_text("</S>\n<S>\n<UNK>\nthe 12\nthe\n,\n")
    assert WordVocabulary.from_list(Piece(path)).words == ["</S>", "<S>", "<UNK>", "the", ","]


@pytest.mark.parametrize(
    ("words", "reason"), [(["<eos>", "a", "a"], "each once"), (["a"], "<eos> or <S> among them")]
)
def test_words_that_make_no_vocabulary_are_refused(words: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=f"words: expected {reason}"):
        WordVocabulary(words)


def test_a_tokenizer_file_is_used_as_it_is(subwords: SubwordVocabulary, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_str(subwords._tokenizer.to_str())
    tokenizer.add_special_tokens(["[CLS]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", tokenizer.token_to_id("[CLS]"))]
    )
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = SubwordVocabulary.from_file(tmp_path / "tokenizer.json")
    assert loaded.encode(TEXT) == subwords.encode(TEXT)
    assert len(loaded) == len(subwords) + 1


def test_learning_subwords_twice_gives_the_same(piece: Piece) -> None:
    first, second = (SubwordVocabulary.learn([piece], 280) for _ in range(2))
    assert first.to_dict() == second.to_dict()


def test_fewer_subwords_than_bytes_are_refused(piece: Piece) -> None:
    with pytest.raises(ValueError, match="bpe_size: expected 256 or more, got 100"):
        SubwordVocabulary.learn([piece], 100)


@pytest.mark.parametrize("content", ["", "{}", '{"kind": "runes"}', "[1]", '{"kind": "word"}'])
def test_a_file_that_is_no_vocabulary_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "vocabulary.json").write_text(content)
    with pytest.raises(ValueError, match=r"vocabulary\.json: not a vocabulary"):
        Vocabulary.load(tmp_path / "vocabulary.json")


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")],
)
def test_tokens_take_the_narrowest_type(size: int, expected: str) -> None:
    assert token_type(size) == expected
