"""From a data set's files to a folder of token files: make a vocabulary, encode every split as a
stream, and write a record of the files that were read and written."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformer_xl.data.files import locked
from transformer_xl.data.record import Recipe, Record, SourceFile
from transformer_xl.data.sources import SPLITS, Piece, Splits
from transformer_xl.data.token_file import TokenArray, TokenFile, file_sha256, token_type
from transformer_xl.data.vocabularies import (
    ByteVocabulary,
    CharVocabulary,
    SubwordVocabulary,
    Vocabulary,
    WordVocabulary,
)
from transformer_xl.data.vocabularies.word import END_OF_LINE

RECORD = "record.json"
VOCABULARY = "vocabulary.json"
UNIQUE = 32  # hexadecimal digits that end the name of an unfinished folder


def encode(recipe: Recipe, splits: Splits, folder: Path) -> Record:
    """Encode the splits into `folder`, which appears, or is replaced, only when it is complete.

    Raises:
        ValueError: an empty file or split, text that is not UTF-8, unknown symbols for a vocabulary
            without `<unk>`; the file and the fault are named.
    """
    for split in SPLITS:
        if not sum(piece.size for piece in splits[split]):
            raise ValueError(f"{splits[split][0]}: the file is empty ({split} split)")
    sources = [SourceFile.read(path) for path in recipe.files(splits)]
    with _written_at_once(folder) as made:
        vocabulary = build_vocabulary(recipe, splits)
        vocabulary.save(made / VOCABULARY)
        tokens = {split: _Tokens(vocabulary, splits[split]) for split in SPLITS}
        written = {split: tokens[split].write(made / f"{split}.bin") for split in SPLITS}
        n_unknown = {split: tokens[split].n_unknown for split in SPLITS}
        for split in SPLITS:
            if (first := tokens[split].first_unknown) is not None:
                vocabulary.check_unknown(first, sum(n_unknown.values()))
            if written[split].n_tokens == 0:
                raise ValueError(
                    f"{splits[split][0]}: expected tokens for the {split} split, found none"
                )
        digest = file_sha256(made / VOCABULARY)
        record = Record(recipe.key(), sources, digest, written, n_unknown)
        record.save(made / RECORD)
    return record


def lock_file(folder: Path) -> Path:
    """The lock that the process that encodes into `folder` holds."""
    return folder.with_name(f".{folder.name}.lock")


def remove_unfinished(cache: Path) -> None:
    """Remove the folders that killed processes left unfinished in the folder `cache`.

    A process that still encodes into its folder holds the lock, and its folder stays.
    """
    for unfinished in cache.glob(f".*-{'[0-9a-f]' * UNIQUE}"):
        name = unfinished.name[1 : -UNIQUE - 1]
        with (
            contextlib.suppress(TimeoutError),
            locked(lock_file(cache / name), timeout=0) as acquired,
        ):
            if acquired:
                shutil.rmtree(unfinished, ignore_errors=True)


def build_vocabulary(recipe: Recipe, splits: Splits) -> Vocabulary:
    """The vocabulary of a recipe: given, read from a file, or made from the protocol's splits."""
    if recipe.vocabulary is not None:
        return recipe.vocabulary
    pieces = [piece for split in recipe.counted for piece in splits[split]]
    unknown = ("<unk>",) if recipe.open else ()
    if recipe.level == "byte":
        return (
            ByteVocabulary()
            if recipe.open
            else ByteVocabulary.count(pieces, recipe.protocol.dropped)
        )
    if recipe.level == "char":
        return CharVocabulary.count(pieces, unknown)
    if recipe.level == "bpe":
        if recipe.tokenizer_file is not None:
            return SubwordVocabulary.from_file(recipe.tokenizer_file)
        return SubwordVocabulary.learn(pieces, recipe.bpe_size)
    if recipe.word_list is not None:
        return WordVocabulary.from_list(recipe.word_list)
    return WordVocabulary.count(pieces, (END_OF_LINE, *unknown), recipe.protocol.lowercase)


class _Tokens:
    """The tokens of a split, and how many of them are unknown symbols, once they are written.

    Attributes:
        n_unknown: how many.
        first_unknown: the piece of the split in which the first of them is.
    """

    def __init__(self, vocabulary: Vocabulary, pieces: Sequence[Piece]) -> None:
        self._vocabulary, self._pieces = vocabulary, pieces
        self.n_unknown = 0
        self.first_unknown: Piece | None = None

    def write(self, path: Path) -> TokenFile:
        """Encode the split into a file."""
        return TokenFile.write(path, token_type(len(self._vocabulary)), self._ids())

    def _ids(self) -> Iterator[TokenArray]:
        for piece in self._pieces:
            for ids, n_unknown in self._vocabulary.lookup_stream(piece):
                if n_unknown and self.first_unknown is None:
                    self.first_unknown = piece
                self.n_unknown += n_unknown
                yield ids


@contextlib.contextmanager
def _written_at_once(folder: Path) -> Iterator[Path]:
    """An empty folder that is renamed to `folder` when the block ends without an error.

    If another process renamed its own folder to `folder` meanwhile, that one stays: both are
    complete.
    """
    made = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    made.mkdir(parents=True)
    try:
        yield made
        if folder.exists():
            folder.rename(made / "replaced")
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        shutil.rmtree(folder / "replaced", ignore_errors=True)
    finally:
        shutil.rmtree(made, ignore_errors=True)
