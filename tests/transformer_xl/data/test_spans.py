"""Where each token of a text is in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_xl.data.sources import Piece
from transformer_xl.data.vocabularies import (
    ByteVocabulary,
    CharVocabulary,
    SubwordVocabulary,
    Vocabulary,
    WordVocabulary,
)

TEXTS = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("ab \n\r\t\u2003\x1cİ☃🙂")), max_size=60
)


def parts(vocabulary: Vocabulary, text: str) -> list[bytes]:
    """The bytes of each token of a text; there is one span for each token of `lookup`."""
    data, spans = text.encode(), vocabulary.spans(text)
    ids, _ = vocabulary.lookup(text)
    assert spans.shape == (len(ids), 2)
    assert spans.dtype == "int64"
    return [data[start:stop] for start, stop in spans.tolist()]


@given(TEXTS)
def test_bytes_and_characters_cover_the_text(text: str) -> None:
    bytewise = ByteVocabulary()
    assert parts(bytewise, text) == [bytes([value]) for value in text.encode()]
    characters = CharVocabulary(["<unk>", *dict.fromkeys(text)][:20])
    assert parts(characters, text) == [character.encode() for character in text]


@given(TEXTS)
@pytest.mark.parametrize("lowercase", [False, True])
def test_words_are_the_text_between_white_space(lowercase: bool, text: str) -> None:
    vocabulary = WordVocabulary(["<eos>", "<unk>", "a"], lowercase)
    found = parts(vocabulary, text)
    ends = [part for part in found if part in (b"\n", b"\r", b"\r\n")]
    words = [part.decode() for part in found if part not in ends]
    assert words == text.split()
    assert len(ends) == vocabulary.encode(text).count(0)


@given(TEXTS)
def test_sentences_have_a_mark_before_and_one_at_their_end(text: str) -> None:
    vocabulary = WordVocabulary(["<S>", "<unk>", "a"])
    found = parts(vocabulary, text)
    words = [part.decode() for part in found if part.strip()]
    assert words == text.split()


def test_dropped_bytes_are_between_tokens() -> None:
    vocabulary = ByteVocabulary(b"ab", dropped=b"\n")
    assert vocabulary.spans("a\nb\n").tolist() == [[0, 1], [2, 3]]


def test_bytes_that_are_no_text_have_their_places() -> None:
    text = b"a\xff\xc3b".decode("utf-8", "surrogateescape")
    assert ByteVocabulary().spans(text).tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]


def test_subwords_have_the_span_of_their_characters(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("the memory of the segment\n" * 50, encoding="utf-8")
    vocabulary = SubwordVocabulary.learn([Piece(path)], 300)
    text = "the ☃ of\nthe memory"
    found = parts(vocabulary, text)
    snowman = [i for i, part in enumerate(found) if "☃" in part.decode()]
    assert len(snowman) > 1, "the character has several tokens"
    assert len({tuple(vocabulary.spans(text)[i]) for i in snowman[-2:]}) == 1
    once = [part for i, part in enumerate(found) if i not in snowman[1:]]
    assert b"".join(once).decode().replace(" ", "") == text.replace(" ", "")
