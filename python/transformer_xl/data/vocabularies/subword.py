"""Subwords through the `tokenizers` library: byte-level BPE learned here, or a tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from transformer_xl.data.sources import Piece
from transformer_xl.data.text import decode_stream, read_text, split_lines, whole_lines
from transformer_xl.data.token_file import TokenArray
from transformer_xl.data.vocabularies.base import Vocabulary

# GPT-2's rule for the pieces of text that no subword crosses (letters, digits, other characters,
# white space), with at most 256 characters to a piece: learning takes a time that is proportional
# to the number of pieces and to the square of their length.
PIECES = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,256}| ?\p{N}{1,256}| ?[^\s\p{L}\p{N}]{1,256}"
    r"|\s{1,256}(?!\S)|\s{1,256}"
)


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
        model = json.loads(tokenizer.to_str())["model"]
        symbol = model.get("unk_token")
        self.unknown_id = model.get("unk_id") if symbol is None else tokenizer.token_to_id(symbol)

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
        tokenizer.train_from_iterator(map(split_lines, texts), trainer)
        return cls(tokenizer)

    @classmethod
    def from_file(cls, path: Path) -> SubwordVocabulary:
        """Read a tokenizer.json; ValueError if it is none."""
        text = read_text(Piece(path))
        try:
            return cls(Tokenizer.from_str(text))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer.json ({error})") from error

    def __len__(self) -> int:
        return self._size

    def lookup(self, text: str) -> tuple[TokenArray, int]:
        lines = split_lines(text)
        encodings = self._tokenizer.encode_batch_fast(lines, add_special_tokens=False)
        parts = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)
        n_unknown = 0 if self.unknown_id is None else int((ids == self.unknown_id).sum())
        return ids, n_unknown

    def unknown(self, text: str) -> list[str]:
        found: dict[str, None] = {}
        for line in split_lines(text):
            encoding = self._tokenizer.encode(line, add_special_tokens=False)
            for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
                if token == self.unknown_id:
                    found[repr(line[start:stop])] = None
        return list(found)

    def decode(self, ids: ArrayLike) -> str:
        tokens = self.checked(ids).tolist()
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def to_dict(self) -> dict[str, Any]:
        return {"tokenizer": json.loads(self._tokenizer.to_str())}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SubwordVocabulary:
        return cls(Tokenizer.from_str(json.dumps(values["tokenizer"])))
