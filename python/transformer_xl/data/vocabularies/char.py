"""Characters (Unicode code points) as tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transformer_xl.data.sources import Piece
from transformer_xl.data.text import byte_offsets, decode_stream
from transformer_xl.data.token_file import TokenArray
from transformer_xl.data.vocabularies.base import Vocabulary, by_frequency, checked_symbols
from transformer_xl.messages import shortened

N_CODE_POINTS = 0x110000
UNKNOWN = "<unk>"


class CharVocabulary(Vocabulary):
    """Characters as tokens; one not seen becomes `<unk>` if the vocabulary has that symbol.

    Args:
        symbols: the character of each id, or `<unk>`.
    """

    kind = "char"
    symbol = "character"

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = list(symbols)
        self.unknown_id = self.symbols.index(UNKNOWN) if UNKNOWN in self.symbols else None
        missing = len(self.symbols)
        self._ids: NDArray[np.uint32] = np.full(N_CODE_POINTS, missing, dtype=np.uint32)
        for token, symbol in enumerate(self.symbols):
            if token != self.unknown_id:
                self._ids[ord(symbol)] = token

    @classmethod
    def count(cls, pieces: Iterable[Piece], specials: Iterable[str] = ()) -> CharVocabulary:
        """`specials`, then the characters by falling count, equal ones by first appearance."""
        counts: Counter[str] = Counter()
        for text in (text for piece in pieces for text in decode_stream(piece)):
            counts.update(text)
        return cls(by_frequency(counts, specials))

    def __len__(self) -> int:
        return len(self.symbols)

    def lookup(self, text: str) -> tuple[TokenArray, int]:
        ids: TokenArray = self._ids[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")]
        missing = ids == len(self.symbols)
        ids[missing] = self.unknown_id or 0
        return ids, int(missing.sum())

    def spans(self, text: str) -> NDArray[np.int64]:
        offsets = byte_offsets(text)
        return np.stack([offsets[:-1], offsets[1:]], axis=1)

    def unknown(self, text: str) -> list[str]:
        return [repr(each) for each in dict.fromkeys(text) if self._ids[ord(each)] == len(self)]

    def decode(self, ids: ArrayLike) -> str:
        return "".join(self.symbols[token] for token in self.checked(ids))

    def to_dict(self) -> dict[str, Any]:
        return {"symbols": self.symbols}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CharVocabulary:
        symbols = checked_symbols("symbols", values["symbols"])
        for symbol in symbols:
            if len(symbol) != 1 and symbol != UNKNOWN:
                raise ValueError(f"symbols: expected single characters, found {shortened(symbol)}")
        return cls(symbols)
