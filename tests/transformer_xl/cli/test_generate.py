"""Text is shown as soon as it is sure, and is the decoded whole."""

from __future__ import annotations

import pytest

from transformer_xl.cli.generate import WINDOW, decoded
from transformer_xl.data.vocabularies import ByteVocabulary, Vocabulary, WordVocabulary

TEXT = "naïve Übung: 日本語 and 🙂 " * 12


def test_characters_of_several_bytes_come_whole() -> None:
    vocabulary = ByteVocabulary()
    ids = list(TEXT.encode())
    assert len(ids) > 2 * WINDOW
    pieces = list(decoded(vocabulary, [10], ids))
    assert "".join(pieces) == TEXT
    assert all(len(piece) == 1 for piece in pieces)


def test_bytes_that_are_no_text_are_shown_at_last() -> None:
    pieces = list(decoded(ByteVocabulary(), [10], [255] * 200 + list(b"end")))
    assert "".join(pieces).endswith("end")


@pytest.mark.parametrize("before", [[0], [1, 2]])
def test_words_are_joined_as_in_the_whole(before: list[int]) -> None:
    vocabulary: Vocabulary = WordVocabulary(["<eos>", "one", "two", "three"])
    ids = [1, 2, 0, 3, 1] * 40
    whole = vocabulary.decode([*before, *ids])
    assert vocabulary.decode(before) + "".join(decoded(vocabulary, before, ids)) == whole
