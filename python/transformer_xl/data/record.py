"""The record beside the token files of a folder: the recipe, the files that were read and the files
that were written. It tells whether the token files are still valid."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformer_xl.data.datasets import Level, Protocol
from transformer_xl.data.files import is_int, read_json
from transformer_xl.data.sources import SPLITS, Piece, Splits
from transformer_xl.data.token_file import TokenFile, damaged, file_sha256
from transformer_xl.data.vocabularies import Vocabulary
from transformer_xl.messages import shortened

FORMAT = 2  # of the folder; raise it when the same files would be encoded otherwise


@dataclass(frozen=True)
class Recipe:
    """The data set to encode, and how.

    Args:
        dataset, protocol_name, protocol: as the data set names them.
        level: what a token is; the protocol's own or another.
        bpe_size: subwords to learn.
        tokenizer_file: a tokenizer.json to use instead of learning.
        word_list: a file that lists the words instead of counting.
        vocabulary: a vocabulary of another corpus to use instead of making one.
    """

    dataset: str
    protocol_name: str
    protocol: Protocol
    level: Level
    bpe_size: int
    tokenizer_file: Path | None
    word_list: Piece | None
    vocabulary: Vocabulary | None = None

    @property
    def open(self) -> bool:
        """Whether the vocabulary has a token for symbols that were not counted."""
        return self.protocol.open or not self.as_protocol

    @property
    def counted(self) -> tuple[str, ...]:
        """Splits that the vocabulary is made from."""
        return self.protocol.counted if self.as_protocol else ("train",)

    @property
    def as_protocol(self) -> bool:
        """Whether tokens are of the protocol's level."""
        return self.level == self.protocol.level

    def files(self, splits: Splits) -> list[Path]:
        """Every file the encoding depends on, each once."""
        files = [piece.path for split in SPLITS for piece in splits[split]]
        files += [self.word_list.path] if self.word_list else []
        files += [self.tokenizer_file] if self.tokenizer_file else []
        return list(dict.fromkeys(files))

    def key(self) -> dict[str, Any]:
        """The values in which this recipe differs from another over the same files, for JSON."""
        learned = self.level == "bpe" and not (self.tokenizer_file or self.vocabulary)
        return {
            "format": FORMAT,
            "dataset": self.dataset,
            "protocol": self.protocol_name,
            "level": self.level,
            "bpe_size": self.bpe_size if learned else None,
            "vocabulary": self.vocabulary.sha256 if self.vocabulary else None,
        }


@dataclass(frozen=True)
class SourceFile:
    """A file that was read; while its size and time are the recorded ones, so is its content."""

    path: str
    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def read(cls, path: Path) -> SourceFile:
        """Describe a file as it is now."""
        stat = path.stat()
        return cls(str(path), stat.st_size, stat.st_mtime_ns, file_sha256(path))

    def unchanged(self) -> bool:
        """Whether the file still has the recorded content."""
        path = Path(self.path)
        if not path.is_file():
            return False
        stat = path.stat()
        if stat.st_size != self.size:
            return False
        return stat.st_mtime_ns == self.mtime_ns or file_sha256(path) == self.sha256


@dataclass(frozen=True)
class Record:
    """The recipe of a folder of token files, the files that were read, and those written, as JSON.

    n_unknown: by split, the tokens that stand for symbols that the vocabulary does not have.
    """

    recipe: Mapping[str, Any]
    sources: Sequence[SourceFile]
    vocabulary_sha256: str
    splits: Mapping[str, TokenFile]
    n_unknown: Mapping[str, int]

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a file that `save` wrote; ValueError if it is another."""
        try:
            values = read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}; delete {path.parent} to encode it again") from error
        try:
            record = cls(
                values["recipe"],
                [SourceFile(**source) for source in values["sources"]],
                values["vocabulary_sha256"],
                {split: TokenFile(**file) for split, file in values["splits"].items()},
                values["n_unknown"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise damaged(path, f"it is no record ({error!r:.400})") from error
        if (fault := record._fault()) is not None:
            raise damaged(path, fault)
        return record

    def _fault(self) -> str | None:
        """What is wrong with the values of a record that was read, or None."""
        for field in ("splits", "n_unknown"):
            found = getattr(self, field)
            if not isinstance(found, dict) or set(found) != set(SPLITS):
                return f"{field}: expected {', '.join(SPLITS)}, found {shortened(found)}"
        for split in SPLITS:
            if (fault := self.splits[split].fault(f"{split}.bin")) is not None:
                return f"splits.{split}.{fault}"
            if not is_int(n_unknown := self.n_unknown[split]):
                return f"n_unknown.{split}: expected 0 or more, found {shortened(n_unknown)}"
        return None

    def save(self, path: Path) -> None:
        """Write the record as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    def describes(self, recipe: Recipe, splits: Splits) -> bool:
        """Whether encoding the splits by this recipe would give the files of this record."""
        files = [str(path) for path in recipe.files(splits)]
        if self.recipe != recipe.key() or [source.path for source in self.sources] != files:
            return False
        return all(source.unchanged() for source in self.sources)
