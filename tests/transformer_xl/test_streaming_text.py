"""Text is returned as soon as it is certain, is the decoded whole, ends before a stop string."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

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
from transformer_xl.streaming_text import WINDOW, StopStrings, TokenDecoder

TEXT = "naïve Übung: 日本語 and 🙂 " * 12


def decoded(vocabulary: Vocabulary, before: list[int], tokens: Sequence[int]) -> list[str]:
    decoder = TokenDecoder(vocabulary, before)
    return [*map(decoder.feed, tokens), decoder.end()]


def test_characters_of_several_bytes_come_whole() -> None:
    ids = list(TEXT.encode())
    assert len(ids) > 2 * WINDOW
    pieces = [piece for piece in decoded(ByteVocabulary(), [10], ids) if piece]
    assert "".join(pieces) == TEXT
    assert all(len(piece) == 1 for piece in pieces)


def test_bytes_that_are_no_text_are_shown_at_last() -> None:
    pieces = decoded(ByteVocabulary(), [10], [255] * 200 + list(b"end"))
    assert "".join(pieces) == "\ufffd" * 200 + "end"


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"abc\xe2\x98", "abc\ufffd"),
        (b"abc\xff", "abc\ufffd"),
        ("abc☃".encode(), "abc☃"),
        ("abc\ufffd".encode(), "abc\ufffd"),
        (b"\xe2", "\ufffd"),
        (b"", ""),
        ("é".encode() * 70 + b"\xf0\x9f\x99", "é" * 70 + "\ufffd"),
    ],
)
def test_a_character_that_is_not_finished_at_the_end_is_shown(data: bytes, shown: str) -> None:
    assert "".join(decoded(ByteVocabulary(), [10], list(data))) == shown


@pytest.mark.parametrize("before", [[0], [1, 2]])
def test_words_are_joined_as_in_the_whole(before: list[int]) -> None:
    vocabulary = WordVocabulary(["<eos>", "one", "two", "three"])
    ids = [1, 2, 0, 3, 1] * 40
    whole = vocabulary.decode([*before, *ids])
    assert vocabulary.decode(before) + "".join(decoded(vocabulary, before, ids)) == whole


# ---- stop strings


def fed(stops: Sequence[str], pieces: Sequence[str]) -> tuple[list[str], str | None]:
    """The text after each piece and at the end, and the string that ended it."""
    text = StopStrings(stops)
    return [*map(text.feed, pieces), text.end()], text.reached


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "reached"),
    [
        ((), ("ab", "c"), ["ab", "c", ""], None),
        (("\n\n",), ("a\n", "b\n", "\nc"), ["a", "\nb", "", ""], "\n\n"),
        (("END",), ("the E", "N", "E", "ND", "more"), ["the ", "", "EN", "", "", ""], "END"),
        (("END",), ("the EN",), ["the ", "EN"], None),
        (("aab",), ("a", "a", "a", "b"), ["", "", "a", "", ""], "aab"),
        (("abc", "b"), ("abc",), ["a", ""], "b"),
        (("abc", "bc", "c"), ("xabcd",), ["x", ""], "abc"),
        (("never",), ("n", "ow"), ["", "now", ""], None),
    ],
)
def test_a_text_ends_before_a_stop_string(
    stops: Sequence[str], pieces: Sequence[str], shown: list[str], reached: str | None
) -> None:
    assert fed(stops, pieces) == (shown, reached)


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    seed=st.integers(0, 1000),
)
def test_the_end_does_not_depend_on_the_pieces(text: str, stops: list[str], seed: int) -> None:
    whole, reached = fed(stops, [text])
    cuts = sorted(random.Random(seed).choices(range(len(text) + 1), k=4))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, same = fed(stops, pieces)
    assert ("".join(shown), same) == ("".join(whole), reached)
    assert (reached is None) == (not any(stop in text for stop in stops))
    assert text.startswith("".join(whole) + (reached or ""))
    # Nothing was shown too early: at no time a part of the stop string.
    assert reached is None or len("".join(shown)) == text.find(reached, len("".join(shown)))


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop: expected a text, got an empty one"):
        StopStrings(["x", ""])


VOCABULARIES: dict[str, Vocabulary] = {
    "byte": ByteVocabulary(),
    "char": CharVocabulary([*string.printable, "é", "☃"]),
    "word": WordVocabulary(["<eos>", "some", "words", "é☃", "Stop", "here", "more"]),
}
STOPPED = "some words é☃ some\nStop here more"


@pytest.mark.parametrize("name", [*VOCABULARIES, "bpe"])
@pytest.mark.parametrize("stop", ["Stop here", "\nStop", "é☃", "☃ s", "e\nS"])
def test_stop_strings_cross_tokens_of_every_vocabulary(
    name: str, stop: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if name == "bpe":
        path = tmp_path_factory.mktemp("bpe") / "text.txt"
        path.write_text("some words Stop here more some\n" * 50, encoding="utf-8")
        vocabulary: Vocabulary = SubwordVocabulary.learn([Piece(path)], 300)
    else:
        vocabulary = VOCABULARIES[name]
    before = vocabulary.encode("\n")
    decoder, stops = TokenDecoder(vocabulary, before), StopStrings([stop])
    ids = vocabulary.encode(STOPPED)
    shown = ""
    for token in ids:
        shown += stops.feed(decoder.feed(token))
        assert STOPPED.partition(stop)[0].startswith(shown)
        if stops.reached:
            break
    assert stops.reached == stop
    assert shown == STOPPED.partition(stop)[0]
