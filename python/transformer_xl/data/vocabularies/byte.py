"""Bytes as tokens: any file, no text needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from transformer_xl.data.sources import Piece
from transformer_xl.data.token_file import TokenArray
from transformer_xl.data.vocabularies.base import UnknownSymbolError, Vocabulary

EVERY_BYTE = bytes(range(256))


class ByteVocabulary(Vocabulary):
    """Byte values as tokens.

    Args:
        values: the byte of each id.
        dropped: bytes left out when encoding (enwik8's newlines in the original's protocol).
    """

    kind = "byte"

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

    def encode_array(self, text: str) -> TokenArray:
        return self._encode(text.encode("utf-8"))

    def encode_stream(self, piece: Piece) -> Iterator[TokenArray]:
        return map(self._encode, piece.chunks())

    def _encode(self, data: bytes) -> TokenArray:
        unknown = data.translate(None, self._known)
        if unknown:
            raise UnknownSymbolError(
                f"byte {unknown[0]:#04x} is not in the vocabulary of {len(self)} bytes"
            )
        return self._ids[np.frombuffer(data.translate(None, self.dropped), dtype=np.uint8)]

    def decode(self, ids: ArrayLike) -> str:
        """Text of the bytes; what is not UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        """The bytes themselves."""
        return bytes(np.frombuffer(self.values, dtype=np.uint8)[self.checked(ids)])

    def to_dict(self) -> dict[str, Any]:
        return {"values": list(self.values), "dropped": list(self.dropped)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ByteVocabulary:
        return cls(bytes(values["values"]), bytes(values["dropped"]))
