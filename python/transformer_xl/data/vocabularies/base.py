"""What every vocabulary can do: encode, decode, encode a file as a stream, and be kept as JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transformer_xl.data.sources import Piece
from transformer_xl.data.token_file import TokenArray


class UnknownSymbolError(ValueError):
    """A symbol that a vocabulary has no number for."""


class Vocabulary(ABC):
    """Numbers 0 … V - 1 for the symbols of a text. `len(vocabulary)` is V, `kind` the level."""

    kind: ClassVar[str]

    @abstractmethod
    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; UnknownSymbolError for a symbol that is not in the vocabulary."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    @abstractmethod
    def encode_array(self, text: str) -> TokenArray:
        """As `encode`, as an array."""

    @abstractmethod
    def decode(self, ids: ArrayLike) -> str:
        """Text of token ids, a sequence or one-dimensional array; IndexError for one outside V."""

    @abstractmethod
    def encode_stream(self, piece: Piece) -> Iterator[TokenArray]:
        """Token ids of a piece of a corpus, chunk by chunk, in memory that does not grow with it.

        Raises ValueError with the file and the byte offset where text is asked for and the bytes
        are not UTF-8, UnknownSymbolError for a symbol that is not in the vocabulary.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything `from_dict` needs, for JSON."""

    @classmethod
    @abstractmethod
    def from_dict(cls, values: dict[str, Any]) -> Vocabulary:
        """The inverse of `to_dict`."""

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON."""
        values = {"kind": self.kind, **self.to_dict()}
        path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Vocabulary:
        """Read what `save` wrote, whichever kind it is; ValueError if it is no vocabulary."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            kinds = {cls.kind: cls for cls in Vocabulary.__subclasses__()}
            return kinds[values.pop("kind")].from_dict(values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a vocabulary ({error!r})") from error

    def checked(self, ids: ArrayLike) -> NDArray[np.int64]:
        """`ids` as an array, after raising IndexError for one that is not a token."""
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        wrong = array[(array < 0) | (array >= len(self))]
        if len(wrong):
            raise IndexError(f"ids: expected tokens in [0, {len(self)}), got {wrong[0]}")
        return array


def by_frequency(counts: dict[str, int], specials: Iterable[str] = ()) -> list[str]:
    """`specials`, then the symbols by falling count, equal ones by first appearance.

    This is the original's order of ids. `counts` holds its keys in order of first appearance.
    """
    first = list(specials)
    counted = (symbol for symbol in counts if symbol not in first)
    return first + sorted(counted, key=counts.__getitem__, reverse=True)
