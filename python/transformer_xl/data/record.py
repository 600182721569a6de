"""The record beside the token files of a folder: what was read, by which recipe, and what was
written, so that it is known whether the files are still good."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformer_xl.data.datasets import Level, Protocol
from transformer_xl.data.sources import SPLITS, Piece, Splits
from transformer_xl.data.token_file import TokenFile, damaged, file_sha256

FORMAT = 1  # of the folder; raise it when the same files would be encoded otherwise


@dataclass(frozen=True)
class Recipe:
    """What to encode, and how.

    Args:
        dataset, protocol_name, protocol: as the data set names them.
        level: what a token is; the protocol's own or another.
        bpe_size: subwords to learn.
        tokenizer_file: a tokenizer.json to use instead of learning.
        word_list: a file that lists the words instead of counting.
    """

    dataset: str
    protocol_name: str
    protocol: Protocol
    level: Level
    bpe_size: int
    tokenizer_file: Path | None
    word_list: Piece | None

    @property
    def open(self) -> bool:
        """Whether symbols that were not counted get a token."""
        return self.protocol.open or not self.as_protocol

    @property
    def counted(self) -> tuple[str, ...]:
        """Splits that the vocabulary is made from."""
        return self.protocol.counted if self.as_protocol else ("train",)

    @property
    def as_protocol(self) -> bool:
        """Whether tokens are what the protocol says, not another level's."""
        return self.level == self.protocol.level

    def files(self, splits: Splits) -> list[Path]:
        """Every file the encoding depends on, each once."""
        files = [piece.path for split in SPLITS for piece in splits[split]]
        files += [self.word_list.path] if self.word_list else []
        files += [self.tokenizer_file] if self.tokenizer_file else []
        return list(dict.fromkeys(files))

    def key(self) -> dict[str, Any]:
        """What tells this recipe from another one over the same files, for JSON."""
        learned = self.level == "bpe" and self.tokenizer_file is None
        return {
            "format": FORMAT,
            "dataset": self.dataset,
            "protocol": self.protocol_name,
            "level": self.level,
            "bpe_size": self.bpe_size if learned else None,
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
        stat = path.stat()
        if stat.st_size != self.size:
            return False
        return stat.st_mtime_ns == self.mtime_ns or file_sha256(path) == self.sha256


@dataclass(frozen=True)
class Record:
    """What lies beside the token files of a folder, as JSON: the recipe, what was read, what was
    written."""

    recipe: Mapping[str, Any]
    sources: Sequence[SourceFile]
    vocabulary_sha256: str
    splits: Mapping[str, TokenFile]

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote; ValueError if it is something else."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                values["recipe"],
                [SourceFile(**source) for source in values["sources"]],
                values["vocabulary_sha256"],
                {split: TokenFile(**file) for split, file in values["splits"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(path, repr(error)) from error

    def save(self, path: Path) -> None:
        """Write the record as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    def describes(self, recipe: Recipe, splits: Splits) -> bool:
        """Whether encoding the splits by this recipe would give what lies here."""
        files = [str(path) for path in recipe.files(splits)]
        if self.recipe != recipe.key() or [source.path for source in self.sources] != files:
            return False
        return all(source.unchanged() for source in self.sources)
