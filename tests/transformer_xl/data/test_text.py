"""Files to text: characters and lines survive any chunking, and what is not UTF-8 is located."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_xl.data import sources, text
from transformer_xl.data.sources import Piece
from transformer_xl.data.text import decode_stream, whole_lines


@given(st.lists(st.text(st.sampled_from("ab \n"), max_size=12)))
def test_lines_come_whole_and_nothing_is_lost(texts: list[str]) -> None:
    pieces = list(whole_lines(texts))
    assert "".join(pieces) == "".join(texts)
    assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_a_very_long_line_is_cut_at_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_LINE", 5)
    assert list(whole_lines(["abc de", "f gh", "i\n"])) == ["abc ", "def ", "ghi\n"]


def test_a_very_long_line_without_spaces_is_not_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_LINE", 5)
    assert list(whole_lines(["ACGT"] * 5)) == ["ACGTACGT", "ACGTACGT", "ACGT"]
    assert list(whole_lines(["ACGTAC\r", "\nG"])) == ["ACGTAC", "\r\n", "G"]


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 5, 1 << 20])
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(
    ("data", "offset", "byte"),
    [
        (b"abc\xffdef", 3, "0xff"),
        ("abcé☃".encode() + b"\xe2\x98", 8, "0xe2"),
        ("abcé".encode() + b"\xe2\x98x", 5, "0xe2"),
        (b"abcdefgh\x80", 8, "0x80"),
    ],
)
def test_the_first_byte_that_is_not_utf8_is_located(
    data: bytes,
    offset: int,
    byte: str,
    start: int,
    read_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "READ_BYTES", read_bytes)
    (tmp_path / "latin").write_bytes(data)
    with pytest.raises(
        ValueError, match=f"latin: expected UTF-8 text, found byte {byte} at offset {offset} "
    ):
        list(decode_stream(Piece(tmp_path / "latin", start=start)))
