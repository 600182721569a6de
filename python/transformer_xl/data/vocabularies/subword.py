"""Subwords through the `tokenizers` library: byte-level BPE learned here, or a tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Encoding, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from transformer_xl.data.interruptible import interruptible
from transformer_xl.data.sources import Piece
from transformer_xl.data.text import (
    byte_offsets,
    decode_stream,
    read_text,
    split_lines,
    whole_lines,
)
from transformer_xl.data.token_file import TokenArray
from transformer_xl.data.vocabularies.base import UnknownSymbolError, Vocabulary
from transformer_xl.messages import brief

# GPT-2's rule for the pieces of text that no subword crosses (letters, digits, other characters,
# white space), with at most 256 characters to a piece: learning takes a time that is proportional
# to the number of pieces and to the square of their length.
PIECES = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,256}| ?\p{N}{1,256}| ?[^\s\p{L}\p{N}]{1,256}"
    r"|\s{1,256}(?!\S)|\s{1,256}"
)


MOST_IDS = 1 << 24  # a model has a row for each id, also for those that no token has


class SubwordVocabulary(Vocabulary):
    """The tokens of a `tokenizers.Tokenizer`, without the special ones it may put around a text.

    Every line is encoded by itself, its end with it, so that a file gives the same tokens however
    it is read.
    """

    kind = "bpe"
    symbol = "subword"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._size = max(tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps
        self.eos_id = tokenizer.token_to_id("<eos>")
        model = json.loads(tokenizer.to_str())["model"]
        symbol = model.get("unk_token")
        self.unknown_id = model.get("unk_id") if symbol is None else tokenizer.token_to_id(symbol)
        # A BPE without `<unk>` and without all bytes leaves unknown characters out.
        bytewise = model.get("byte_fallback") or not any(
            tokenizer.token_to_id(byte) is None for byte in pre_tokenizers.ByteLevel.alphabet()
        )
        self._drops = model["type"] == "BPE" and self.unknown_id is None and not bytewise

    @classmethod
    def learn(cls, pieces: Iterable[Piece], vocab_size: int) -> SubwordVocabulary:
        """Byte-level BPE of at most `vocab_size` subwords: lossless for every text.

        Raises ValueError for a size below 256, the number of bytes, each of which is a subword.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet):
            raise ValueError(f"bpe_size: expected {len(alphabet)} or more, got {vocab_size}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
        )
        texts = (text for piece in pieces for text in whole_lines(decode_stream(piece)))
        interruptible(
            lambda lines: tokenizer.train_from_iterator(lines, trainer), map(split_lines, texts)
        )
        return cls(tokenizer)

    @classmethod
    def from_file(cls, path: Path) -> SubwordVocabulary:
        """Read a tokenizer.json; ValueError if it is none."""
        text = read_text(Piece(path))
        try:
            return cls(_tokenizer(text))
        except ValueError as error:
            raise ValueError(f"{path}: not a tokenizer.json ({error})") from error

    def __len__(self) -> int:
        return self._size

    def lookup(self, text: str) -> tuple[TokenArray, int]:
        try:
            encodings = self._encodings(self._tokenizer.encode_batch_fast, text)
        except UnknownSymbolError:
            if refused := self._refused(text):
                return np.empty(0, dtype=np.uint32), len(refused)
            raise
        parts = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)
        if self.unknown_id is not None:
            return ids, int((ids == self.unknown_id).sum())
        return ids, sum(text.count(character) for character in self._dropped(text))

    def spans(self, text: str) -> NDArray[np.int64]:
        offsets = byte_offsets(text)
        found, begin = [], 0  # spans in characters
        encodings = self._encodings(self._tokenizer.encode_batch, text)
        for line, encoding in zip(split_lines(text), encodings, strict=True):
            found += [(begin + start, begin + stop) for start, stop in encoding.offsets]
            begin += len(line)
        return offsets[np.array(found, dtype=np.int64).reshape(-1, 2)]

    def unknown(self, text: str) -> list[str]:
        if refused := self._refused(text):
            return [repr(word) for word in dict.fromkeys(refused)]
        found = self._dropped(text)
        encodings = self._encodings(self._tokenizer.encode_batch, text)  # with offsets
        for line, encoding in zip(split_lines(text), encodings, strict=True):
            spans = zip(encoding.ids, encoding.offsets, strict=True)
            found += [line[slice(*span)] for token, span in spans if token == self.unknown_id]
        return [repr(symbol) for symbol in dict.fromkeys(found)]

    def _encodings(self, encode_batch: Callable[..., list[Encoding]], text: str) -> list[Encoding]:
        """One encoding of each line."""
        try:
            return encode_batch(split_lines(text), add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise UnknownSymbolError(f"the tokenizer cannot encode the text: {error}") from error

    def _refused(self, text: str) -> list[str]:
        """The words of a text, in order, for which the tokenizer raises an error."""
        words = text.split()
        refused = {word for word in set(words) if not self._accepts(word)}
        return [word for word in words if word in refused]

    def _accepts(self, word: str) -> bool:
        try:
            self._tokenizer.encode(word, add_special_tokens=False)
        except Exception:  # the library raises bare Exception
            return False
        return True

    def _dropped(self, text: str) -> list[str]:
        """The characters, each once, of which the tokenizer leaves out some or all bytes."""
        return [
            character
            for character in (dict.fromkeys(text) if self._drops else ())
            if not character.isspace() and self._loses(character)
        ]

    def _loses(self, character: str) -> bool:
        ids = self._tokenizer.encode(character, add_special_tokens=False).ids
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return not ids or ("\ufffd" in text and character != "\ufffd")

    def decode(self, ids: ArrayLike) -> str:
        tokens = self.checked(ids).tolist()
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def to_dict(self) -> dict[str, Any]:
        return {"tokenizer": json.loads(self._tokenizer.to_str())}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SubwordVocabulary:
        return cls(_tokenizer(json.dumps(values["tokenizer"])))


def _tokenizer(text: str) -> Tokenizer:
    """A tokenizer of a tokenizer.json; ValueError if it is none."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(brief(error)) from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < MOST_IDS:
        raise ValueError(f"expected tokens with ids below {MOST_IDS:,}, found {largest:,}")
    return tokenizer
