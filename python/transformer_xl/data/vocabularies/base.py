"""What every vocabulary can do: encode, decode, encode a file as a stream, and be kept as JSON."""

from __future__ import annotations

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transformer_xl.data.files import parse_json
from transformer_xl.data.sources import Piece
from transformer_xl.data.text import decode_stream, read_text, split_lines, whole_lines
from transformer_xl.data.token_file import TokenArray
from transformer_xl.messages import shortened

SOME_TOKENS = 1 << 16


class UnknownSymbolError(ValueError):
    """A symbol that a vocabulary has no number for."""


class Vocabulary(ABC):
    """Numbers 0 … V - 1 for the symbols of a text. `len(vocabulary)` is V.

    A symbol that the vocabulary does not have is unknown. It becomes `<unk>` if the vocabulary has
    that symbol, and is an error otherwise.

    Attributes:
        kind: the level, "byte", "char", "word" or "bpe".
        symbol: the noun for one symbol in messages.
        unknown_id: the token of unknown symbols, or None.
        eos_id: the token `<eos>`, or None.
    """

    kind: ClassVar[str]
    symbol: ClassVar[str]
    unknown_id: int | None = None
    eos_id: int | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; UnknownSymbolError for an unknown symbol without `<unk>`."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str) -> TokenArray:
        """As `encode`, as an array."""
        ids, n_unknown = self.lookup(text)
        if n_unknown and self.unknown_id is None:
            raise self._refusal(split_lines(text), n_unknown)
        return ids

    @abstractmethod
    def lookup(self, text: str) -> tuple[TokenArray, int]:
        """Token ids of a text, and how many of its symbols are unknown.

        Unknown symbols have the id `unknown_id`, or any id if that is None.
        """

    @abstractmethod
    def spans(self, text: str) -> NDArray[np.int64]:
        """Where the tokens of `lookup(text)` are in the text: [n_tokens, 2], start and stop in its
        bytes of UTF-8.

        Tokens that are parts of one character have the span of that character.
        """

    def lookup_stream(self, piece: Piece) -> Iterator[tuple[TokenArray, int]]:
        """As `lookup`, for a piece of a corpus of any size, chunk by chunk.

        Raises ValueError with the file and the byte offset if text is expected and the bytes are
        not UTF-8.
        """
        return map(self.lookup, self._texts(piece))

    @abstractmethod
    def unknown(self, text: str) -> list[str]:
        """The unknown symbols of a text, each once, in order of first appearance."""

    def check_unknown(self, piece: Piece, n_unknown: int) -> None:
        """Raise UnknownSymbolError for unknown symbols without `<unk>`.

        Args:
            piece: where the first of them is; its line is counted from the start of the file.
            n_unknown: how many there are, for the message.
        """
        if n_unknown and self.unknown_id is None:
            texts = self._texts(replace(piece, start=0, stop=None))
            lines = (line for text in texts for line in split_lines(text))
            error = self._refusal(lines, n_unknown)
            raise UnknownSymbolError(f"{piece}: {error}")

    def _refusal(self, lines: Iterable[str], n_unknown: int) -> UnknownSymbolError:
        """The error for `n_unknown` unknown symbols in these lines."""
        noun, number = self.symbol, 1
        for line in lines:
            if found := self.unknown(line):
                break
            number += line.endswith(("\n", "\r"))  # a very long line comes in parts
        return UnknownSymbolError(
            f"{noun} {found[0]} is not in the vocabulary of {len(self)} {noun}s, which has no "
            f"<unk> (line {number:,}; {n_unknown:,} unknown {noun}s in all)"
        )

    def _texts(self, piece: Piece) -> Iterator[str]:
        """The text of a piece, in chunks that end with a line."""
        return whole_lines(decode_stream(piece))

    def first_tokens(self) -> list[int]:
        """Tokens to begin a text with: the end of a line, or a space, or else any one token."""
        some = (self.decode([token]) for token in range(min(len(self), SOME_TOKENS)))
        for text in itertools.chain(("\n", " "), some):
            if text and not self.unknown(text) and (ids := self.encode(text)):
                return ids
        return [0]

    @abstractmethod
    def decode(self, ids: ArrayLike) -> str:
        """Text of token ids, a sequence or one-dimensional array; IndexError for one outside V."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything that `from_dict` needs, for JSON."""

    @classmethod
    @abstractmethod
    def from_dict(cls, values: dict[str, Any]) -> Vocabulary:
        """The inverse of `to_dict`; KeyError or ValueError if `values` are no such vocabulary."""

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON."""
        path.write_bytes(self._json())

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the file that `save` writes."""
        return hashlib.sha256(self._json()).hexdigest()

    def _json(self) -> bytes:
        return json.dumps({"kind": self.kind, **self.to_dict()}, ensure_ascii=False).encode()

    @staticmethod
    def load(path: Path) -> Vocabulary:
        """Read a file that `save` wrote, of any kind; ValueError if it is no vocabulary."""
        text = read_text(Piece(path))
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{path}: not a vocabulary: {error}") from error
        kinds = {cls.kind: cls for cls in Vocabulary.__subclasses__()}
        kind = values.get("kind") if isinstance(values, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            found = shortened(values if kind is None else kind)
            raise ValueError(
                f"{path}: not a vocabulary: expected a kind {', '.join(kinds)}; {found}"
            )
        try:
            return kinds[kind].from_dict(values)
        except KeyError as error:
            raise ValueError(f"{path}: not a vocabulary: it has no {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: not a vocabulary: {error}") from error

    def checked(self, ids: ArrayLike) -> NDArray[np.int64]:
        """`ids` as an array, after raising IndexError for one that is not a token."""
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        wrong = array[(array < 0) | (array >= len(self))]
        if len(wrong):
            raise IndexError(f"ids: expected tokens in [0, {len(self)}), got {wrong[0]}")
        return array


def checked_symbols(name: str, values: Any) -> list[str]:
    """`values` as the symbols of a vocabulary; ValueError if it is no list of different texts."""
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name}: expected a list of texts, found {shortened(values)}")
    for value in values:
        if not isinstance(value, str) or any("\ud800" <= each <= "\udfff" for each in value):
            raise ValueError(f"{name}: expected texts, found {shortened(value)}")
    if len(set(values)) != len(values):
        twice = next(value for value, count in Counter(values).items() if count > 1)
        raise ValueError(f"{name}: expected each once, found {shortened(twice)} twice")
    return values


def by_frequency(counts: dict[str, int], specials: Iterable[str] = ()) -> list[str]:
    """`specials`, then the symbols by falling count, equal ones by first appearance.

    This is the original's order of ids. `counts` holds its keys in order of first appearance.
    """
    first = list(specials)
    counted = (symbol for symbol in counts if symbol not in first)
    return first + sorted(counted, key=counts.__getitem__, reverse=True)
