"""Subwords through the `tokenizers` library: byte-level BPE learned here, or a tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from transformer_xl.data.interruptible import interruptible
from transformer_xl.data.sources import Piece
from transformer_xl.data.text import decode_stream, whole_lines
from transformer_xl.data.token_file import TokenArray
from transformer_xl.data.vocabularies.base import Vocabulary


class SubwordVocabulary(Vocabulary):
    """The tokens of a `tokenizers.Tokenizer`, without the special ones it may put around a text.

    Every line is encoded by itself, its newline with it, so that a file gives the same tokens
    however it is read.
    """

    kind = "bpe"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._size = max(tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps

    @classmethod
    def learn(cls, pieces: Iterable[Piece], vocab_size: int) -> SubwordVocabulary:
        """Byte-level BPE of at most `vocab_size` subwords: lossless for every text.

        Raises ValueError for a size below 256, which the bytes alone take.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet):
            raise ValueError(f"bpe_size: expected {len(alphabet)} or more, got {vocab_size}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
        )
        texts = (text for piece in pieces for text in whole_lines(decode_stream(piece)))
        interruptible(
            lambda lines: tokenizer.train_from_iterator(lines, trainer), map(_lines, texts)
        )
        return cls(tokenizer)

    @classmethod
    def from_file(cls, path: Path) -> SubwordVocabulary:
        """Read a tokenizer.json; ValueError if it is none."""
        try:
            return cls(Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer.json ({error})") from error

    def __len__(self) -> int:
        return self._size

    def encode_stream(self, piece: Piece) -> Iterator[TokenArray]:
        return map(self.encode_array, whole_lines(decode_stream(piece)))

    def encode_array(self, text: str) -> TokenArray:
        encodings = self._tokenizer.encode_batch_fast(_lines(text), add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        return np.concatenate(ids) if ids else np.empty(0, dtype=np.uint32)

    def decode(self, ids: ArrayLike) -> str:
        tokens = self.checked(ids).tolist()
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def to_dict(self) -> dict[str, Any]:
        return {"tokenizer": json.loads(self._tokenizer.to_str())}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SubwordVocabulary:
        return cls(Tokenizer.from_str(json.dumps(values["tokenizer"])))


def _lines(text: str) -> list[str]:
    """The lines of a text, each with its newline (and nothing else taken for a line's end)."""
    *lines, rest = text.split("\n")
    return [line + "\n" for line in lines] + ([rest] if rest else [])
