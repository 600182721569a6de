"""Words between white space as tokens, with a symbol where each line ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from transformer_xl.data.sources import Piece
from transformer_xl.data.text import decode_stream, whole_lines
from transformer_xl.data.token_file import TokenArray
from transformer_xl.data.vocabularies.base import UnknownSymbolError, Vocabulary, by_frequency

END_OF_LINE = "<eos>"
SENTENCE = "<S>"
UNKNOWN = ("<unk>", "<UNK>")


class _Ids(dict[str, int]):
    """Ids by word; a word that is not there takes the id of `<unk>`, or raises where none is."""

    unknown: int | None = None

    def __missing__(self, word: str) -> int:
        if self.unknown is None:
            raise UnknownSymbolError(
                f"word {word!r} is not in the vocabulary of {len(self)} words, which has no "
                f"{UNKNOWN[0]}"
            )
        return self.unknown


class WordVocabulary(Vocabulary):
    """Words as tokens. Every newline is a token too, on empty lines as well.

    A line `a b` is `a b <eos>`; with `<S>` among the words and no `<eos>` (One Billion Word) it is
    `<S> a b <S>`. A word not seen becomes `<unk>` or `<UNK>` if the vocabulary has one.

    Args:
        words: the word of each id.
        lowercase: whether text is lower-cased before it is encoded.

    Raises:
        ValueError: neither `<eos>` nor `<S>` among the words, or a word twice.
    """

    kind = "word"

    def __init__(self, words: Sequence[str], lowercase: bool = False) -> None:
        self.words, self.lowercase = list(words), lowercase
        self._ids = _Ids((word, token) for token, word in enumerate(self.words))
        if len(self._ids) != len(self.words):
            raise ValueError("words: expected each once, got one twice")
        self._ids.unknown = next((self._ids[w] for w in UNKNOWN if w in self._ids), None)
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
        lines = (line for text in whole_lines(decode_stream(piece)) for line in text.split("\n"))
        return cls(list(dict.fromkeys(line.split()[0] for line in lines if line.strip())))

    @property
    def boundary(self) -> int:
        """The id of the symbol that ends a line."""
        return self._ids[self.line_end]

    def __len__(self) -> int:
        return len(self.words)

    def encode_stream(self, piece: Piece) -> Iterator[TokenArray]:
        """As the base class; the last line is ended where the file does not end it."""
        text = ""
        for text in whole_lines(decode_stream(piece)):
            yield self.encode_array(text)
        if text and not text.endswith("\n"):
            yield np.array([self.boundary], dtype=np.uint32)

    def encode_array(self, text: str) -> TokenArray:
        lowered = text.lower() if self.lowercase else text
        words = self._marked(lowered).split()
        return np.fromiter(map(self._ids.__getitem__, words), np.uint32, count=len(words))

    def _marked(self, text: str) -> str:
        """The text with its line symbols written out."""
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
        return cls(values["words"], values["lowercase"])
