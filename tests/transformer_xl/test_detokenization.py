"""WikiText's words become ordinary text, and the pieces of a text become the whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_xl.detokenization import Detokenizer, detokenize


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("a well @-@ known one", "a well-known one"),
        ("1 @,@ 000 or 2 @.@ 5 km", "1,000 or 2.5 km"),
        ("The end , he said . It was !", "The end, he said. It was!"),
        ('He said " yes " and " no " .', 'He said "yes" and "no".'),
        ("the game 's end , they 're here , I don 't", "the game's end, they're here, I don't"),
        ("the dogs ' owners", "the dogs' owners"),
        ("a ' quoted ' word", "a 'quoted' word"),
        ("one ( of two [ or three ] ) here", "one (of two [or three]) here"),
        ("$ 5 million , 50 % of £ 10", "$5 million, 50% of £10"),
        ("and / or", "and/or"),
        (" = = Reception = = ", "== Reception =="),
        (" = Valkyria = \n \n The game", "= Valkyria =\n\nThe game"),
        ('" open \n " new " end', '"open\n"new" end'),
        ("1990 – 1995 ; see : this", "1990 – 1995; see: this"),
        ("<unk> of <unk>", "<unk> of <unk>"),
        ("@ and a@b @-@", "@ and a@b-"),
        ("", ""),
    ],
)
def test_conventions_of_wikitext(words: str, text: str) -> None:
    assert detokenize(words) == text


@given(
    st.lists(
        st.sampled_from([*"ab,.\"'()=\n", "s", "'s", "@-@", " ", "  ", "dogs", "@", "n't"]),
        max_size=25,
    )
)
def test_pieces_give_the_text_of_the_whole(pieces: list[str]) -> None:
    words = Detokenizer()
    shown = ""
    whole = detokenize("".join(pieces))
    for piece in pieces:
        shown += words.feed(piece)
        assert whole.startswith(shown)
    assert shown + words.end() == whole
