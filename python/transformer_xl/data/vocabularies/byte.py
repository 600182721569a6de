"""Bytes as tokens: of any file, as it is; it need not be text."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transformer_xl.data.files import is_int
from transformer_xl.data.sources import Piece
from transformer_xl.data.text import whole_lines
from transformer_xl.data.token_file import TokenArray
from transformer_xl.data.vocabularies.base import Vocabulary
from transformer_xl.messages import shortened

EVERY_BYTE = bytes(range(256))


class ByteVocabulary(Vocabulary):
    """Byte values as tokens.

    Args:
        values: the byte of each id.
        dropped: bytes left out when encoding (enwik8's newlines in the original's protocol).
    """

    kind = "byte"
    symbol = "byte"

    def __init__(self, values: bytes = EVERY_BYTE, dropped: bytes = b"") -> None:
        self.values, self.dropped = values, dropped
        self._ids = np.zeros(256, dtype=np.uint8)
        self._ids[list(values)] = np.arange(len(values), dtype=np.uint8)
        self._known = values + dropped

    @classmethod
    def count(cls, pieces: Iterable[Piece], dropped: bytes = b"") -> ByteVocabulary:
        """The bytes that occur, by falling count, equal ones by first appearance."""
        counts: dict[int, int] = {}
        for chunk in (chunk for piece in pieces for chunk in piece.chunks()):
            kept = chunk.translate(None, dropped)
            found = np.bincount(np.frombuffer(kept, dtype=np.uint8), minlength=256)
            for value in sorted(np.flatnonzero(found).tolist(), key=kept.index):
                counts[value] = counts.get(value, 0) + int(found[value])
        values = sorted(counts, key=counts.__getitem__, reverse=True)
        return cls(bytes(values), dropped)

    def __len__(self) -> int:
        return len(self.values)

    def lookup(self, text: str) -> tuple[TokenArray, int]:
        return self._lookup(_bytes(text))

    def lookup_stream(self, piece: Piece) -> Iterator[tuple[TokenArray, int]]:
        return map(self._lookup, piece.chunks())

    def _lookup(self, data: bytes) -> tuple[TokenArray, int]:
        kept = np.frombuffer(data.translate(None, self.dropped), dtype=np.uint8)
        return self._ids[kept], len(data.translate(None, self._known))

    def spans(self, text: str) -> NDArray[np.int64]:
        data = np.frombuffer(_bytes(text), dtype=np.uint8)
        starts = np.flatnonzero(~np.isin(data, np.frombuffer(self.dropped, dtype=np.uint8)))
        return np.stack([starts, starts + 1], axis=1)

    def unknown(self, text: str) -> list[str]:
        found = dict.fromkeys(_bytes(text).translate(None, self._known))
        return [f"{value:#04x}" for value in found]

    def _texts(self, piece: Piece) -> Iterator[str]:
        return whole_lines(codecs.iterdecode(piece.chunks(), "utf-8", "surrogateescape"))

    def decode(self, ids: ArrayLike) -> str:
        """Text of the bytes; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        """The bytes themselves."""
        return bytes(np.frombuffer(self.values, dtype=np.uint8)[self.checked(ids)])

    def to_dict(self) -> dict[str, Any]:
        return {"values": list(self.values), "dropped": list(self.dropped)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ByteVocabulary:
        found, dropped = _byte_values(values, "values"), _byte_values(values, "dropped")
        if not found:
            raise ValueError("values: expected at least one byte, found none")
        return cls(found, dropped)


def _byte_values(values: dict[str, Any], name: str) -> bytes:
    """A list of different bytes of a vocabulary's file."""
    found = values[name]
    sound = isinstance(found, list) and len(found) <= 256
    if not sound or not all(is_int(value, at_most=255) for value in found):
        raise ValueError(f"{name}: expected a list of bytes, found {shortened(found)}")
    if len(set(found)) != len(found):
        raise ValueError(f"{name}: expected each byte once, found {shortened(found)}")
    return bytes(found)


def _bytes(text: str) -> bytes:
    """The UTF-8 of a text, and the bytes themselves where `surrogateescape` decoded them."""
    return text.encode("utf-8", "surrogateescape")
