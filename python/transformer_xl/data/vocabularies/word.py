"""Words between white space as tokens, with a symbol where each line ends."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transformer_xl.data.sources import Piece
from transformer_xl.data.text import (
    byte_offsets,
    decode_stream,
    split_lines,
    whole_lines,
    with_newlines,
)
from transformer_xl.data.token_file import TokenArray
from transformer_xl.data.vocabularies.base import Vocabulary, by_frequency, checked_symbols
from transformer_xl.messages import shortened

END_OF_LINE = "<eos>"
SENTENCE = "<S>"
UNKNOWN = ("<unk>", "<UNK>")
TOKEN = re.compile(r"\r\n|\r|\n|\S+")  # the end of a line, or a word


class WordVocabulary(Vocabulary):
    """Words as tokens. Every end of a line is a token too, on empty lines as well.

    A line `a b` is `a b <eos>`; with `<S>` among the words and no `<eos>` (One Billion Word) it is
    `<S> a b <S>`. A word not seen becomes `<unk>` or `<UNK>` if the vocabulary has one.

    Args:
        words: the word of each id.
        lowercase: whether text is lower-cased before it is encoded.

    Raises:
        ValueError: neither `<eos>` nor `<S>` among the words, or a word twice.
    """

    kind = "word"
    symbol = "word"

    def __init__(self, words: Sequence[str], lowercase: bool = False) -> None:
        self.words, self.lowercase = list(words), lowercase
        self._ids = {word: token for token, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            raise ValueError("words: expected each once, got one twice")
        self.unknown_id = next((self._ids[w] for w in UNKNOWN if w in self._ids), None)
        self.eos_id = self._ids.get(END_OF_LINE)
        self.line_end = END_OF_LINE if END_OF_LINE in self._ids else SENTENCE
        if self.line_end not in self._ids:
            raise ValueError(f"words: expected {END_OF_LINE} or {SENTENCE} among them")

    @classmethod
    def count(
        cls,
        pieces: Iterable[Piece],
        specials: Iterable[str] = (END_OF_LINE,),
        lowercase: bool = False,
    ) -> WordVocabulary:
        """`specials`, then the words by falling count, equal ones by first appearance."""
        counts: Counter[str] = Counter()
        for text in (text for piece in pieces for text in whole_lines(decode_stream(piece))):
            counts.update((text.lower() if lowercase else text).split())
        return cls(by_frequency(counts, specials), lowercase)

    @classmethod
    def from_list(cls, piece: Piece) -> WordVocabulary:
        """The first word of each line of a list, as 1b_word_vocab.txt; a word again is skipped."""
        lines = (line for text in whole_lines(decode_stream(piece)) for line in split_lines(text))
        words = list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
        try:
            return cls(words)
        except ValueError as error:
            raise ValueError(f"{piece}: {error}") from error

    @property
    def boundary(self) -> int:
        """The id of the symbol that ends a line."""
        return self._ids[self.line_end]

    def __len__(self) -> int:
        return len(self.words)

    def first_tokens(self) -> list[int]:
        return [self.boundary]

    def lookup_stream(self, piece: Piece) -> Iterator[tuple[TokenArray, int]]:
        """As the base class; a last line without an end gets one."""
        text = ""
        for text in self._texts(piece):
            yield self.lookup(text)
        if text and not text.endswith(("\n", "\r")):
            yield np.array([self.boundary], dtype=np.uint32), 0

    def lookup(self, text: str) -> tuple[TokenArray, int]:
        words = self._split(text)
        missing = len(self)
        found = map(self._ids.get, words, itertools.repeat(missing))
        ids = np.fromiter(found, np.uint32, count=len(words))
        unknown = ids == missing
        ids[unknown] = self.unknown_id or 0
        return ids, int(unknown.sum())

    def spans(self, text: str) -> NDArray[np.int64]:
        offsets = byte_offsets(text)
        found, begin = [], 0  # spans in characters
        for line in split_lines(text):
            if self.line_end == SENTENCE:
                found.append((begin, begin))
            found += [(begin + m.start(), begin + m.end()) for m in TOKEN.finditer(line)]
            begin += len(line)
        return offsets[np.array(found, dtype=np.int64).reshape(-1, 2)]

    def unknown(self, text: str) -> list[str]:
        return [repr(word) for word in dict.fromkeys(self._split(text)) if word not in self._ids]

    def _split(self, text: str) -> list[str]:
        """The words of a text, the symbols of its lines among them."""
        lowered = text.lower() if self.lowercase else text
        return self._marked(with_newlines(lowered)).split()

    def _marked(self, text: str) -> str:
        """The text, in which \"\\n\" ends lines, with the symbols of its lines written out."""
        if self.line_end == END_OF_LINE:
            return text.replace("\n", f" {END_OF_LINE} ")
        *lines, rest = text.split("\n")
        ended = "".join(f"{SENTENCE} {line} {SENTENCE} " for line in lines)
        return ended + f"{SENTENCE} {rest}" if rest else ended

    def decode(self, ids: ArrayLike) -> str:
        """Words with one space between them, lines as lines; between sentences one newline."""
        lines: list[list[str]] = [[]]
        for token in self.checked(ids):
            if self.words[token] == self.line_end:
                lines.append([])
            else:
                lines[-1].append(self.words[token])
        if self.line_end == SENTENCE:
            lines = [line for line in lines if line]
        return "\n".join(" ".join(line) for line in lines)

    def to_dict(self) -> dict[str, Any]:
        return {"words": self.words, "lowercase": self.lowercase}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WordVocabulary:
        words, lowercase = checked_symbols("words", values["words"]), values["lowercase"]
        if not isinstance(lowercase, bool):
            raise ValueError(f"lowercase: expected true or false, found {shortened(lowercase)}")
        return cls(words, lowercase)
