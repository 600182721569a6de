"""A corpus, ready to read: its vocabulary and its splits as memory-mapped token ids."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

from transformer_xl.config import DataConfig
from transformer_xl.data.batches import OrderedBatches, TooShortError
from transformer_xl.data.datasets import (
    Dataset,
    Level,
    Protocol,
    find_dataset,
    find_protocol,
    nearest,
)
from transformer_xl.data.encoding import (
    RECORD,
    VOCABULARY,
    encode,
    lock_file,
    remove_unfinished,
)
from transformer_xl.data.files import expanded, locked, resolved
from transformer_xl.data.record import Recipe, Record
from transformer_xl.data.sentence_batches import ShuffledSentenceBatches
from transformer_xl.data.sources import SPLITS, Piece, Splits, find_piece
from transformer_xl.data.token_file import TokenArray, damaged, file_sha256
from transformer_xl.data.vocabularies import Vocabulary, WordVocabulary
from transformer_xl.data.vocabularies.word import SENTENCE

EVALUATE_FIELDS = ("evaluate.batch_size", "evaluate.tgt_len")


def open_corpus(config: DataConfig, vocabulary: Vocabulary | None = None) -> Corpus:
    """The corpus that `config` names, encoded at the first call and reused while its files are the
    same.

    Of several processes one encodes and the others wait, for as long as it runs. If it is killed,
    the next one encodes instead.

    Args:
        vocabulary: read the text with this vocabulary, a checkpoint's, instead of making one.
            `tokenizer`, `bpe_size` and `tokenizer_file` are then ignored.

    Raises:
        ValueError: an unknown data set or protocol (with the nearest name), an empty file, text
            that is not UTF-8 (with the byte offset), unknown symbols for a vocabulary without
            `<unk>` (with the first of them, its line and their number), a token file that is
            damaged.
        FileNotFoundError: missing files, with the names that were looked for and where to get them.
    """
    recipe, path, splits = _located(config, vocabulary)
    folder = _folder(config, recipe, path)
    record = _record(folder, recipe, splits)
    if vocabulary is not None and (record is None or record.vocabulary_sha256 != vocabulary.sha256):
        recipe = replace(recipe, tokenizer_file=None, word_list=None, vocabulary=vocabulary)
        folder = _folder(config, recipe, path)
        record = _record(folder, recipe, splits)
    if record is None:
        remove_unfinished(folder.parent)
        with locked(lock_file(folder)):
            record = _record(folder, recipe, splits) or encode(recipe, splits, folder)
    return Corpus(folder, recipe, record)


class Corpus:
    """An encoded data set.

    Attributes:
        vocab: its vocabulary.
        metric: "bpc" (bits per byte or character) or "ppl" (perplexity per word or subword).
        protocol: the data set, its protocol and the size of the vocabulary, in one line.
        fingerprint: hex SHA-256 of the vocabulary and the tokens, wherever the files are.
        shuffled: whether training reads sentences in random order.
        folder: the folder of the token files.

    Raises:
        ValueError: a file of the folder is not the one that was written.
    """

    def __init__(self, folder: Path, recipe: Recipe, record: Record) -> None:
        self.folder, self._recipe, self._record = folder, recipe, record
        if file_sha256(folder / VOCABULARY) != record.vocabulary_sha256:
            raise damaged(folder / VOCABULARY, "its sha256 is not the recorded one")
        self.vocab = vocab = Vocabulary.load(folder / VOCABULARY)
        self._tokens = {split: record.splits[split].open(folder, len(vocab)) for split in SPLITS}
        self.metric: Literal["bpc", "ppl"] = "bpc" if recipe.level in ("byte", "char") else "ppl"
        # The vocabulary of another corpus may end lines with <eos>: then no sentences are shuffled.
        has_sentences = isinstance(self.vocab, WordVocabulary) and self.vocab.line_end == SENTENCE
        self.shuffled = recipe.protocol.shuffled and has_sentences
        content = [record.vocabulary_sha256, *(record.splits[split].sha256 for split in SPLITS)]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def split(self, name: str) -> TokenArray:
        """Token ids of "train", "valid" or "test", memory-mapped: uint8, uint16 or uint32 `[N]`."""
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}; did you mean {nearest(name, SPLITS)!r}?")
        return self._tokens[name]

    def batches(
        self,
        split: str,
        batch_size: int,
        tgt_len: int,
        *,
        rows: tuple[int, int] | None = None,
        loop: bool = False,
        seed: int | None = None,
        fields: tuple[str, str] = ("batch_size", "tgt_len"),
    ) -> OrderedBatches | ShuffledSentenceBatches:
        """The batches of a split by its protocol: of sentences if it shuffles them, else of
        contiguous streams.

        Args:
            batch_size, tgt_len, rows, loop: as for `OrderedBatches`.
            seed: of the order of sentences; None keeps the file's order and scores every token.
            fields: names of batch_size and tgt_len in the configuration, for messages.

        Raises:
            ValueError: an unknown split, or one that is too short for these sizes.
        """
        tokens = self.split(split)
        try:
            if not self.shuffled:
                return OrderedBatches(tokens, batch_size, tgt_len, rows=rows, loop=loop)
            assert isinstance(self.vocab, WordVocabulary)
            return ShuffledSentenceBatches(
                tokens,
                self.vocab.boundary,
                batch_size,
                tgt_len,
                seed=seed,
                rows=rows,
                loop=loop,
                partial="pad" if seed is None else "drop",
            )
        except TooShortError as error:
            raise ValueError(
                f"{split} split of {self._recipe.dataset}: {error}; "
                f"lower {fields[0]} or {fields[1]}, or use more text"
            ) from error

    @property
    def protocol(self) -> str:
        recipe = self._recipe
        meaning = recipe.protocol.meaning if recipe.as_protocol else f"{recipe.level} tokens"
        given = " (a checkpoint's vocabulary)" if recipe.vocabulary else ""
        return (
            f"{recipe.dataset} ({recipe.protocol_name}: {meaning}), V = {len(self.vocab):,}{given}"
        )

    def source(self, split: str) -> str:
        """The split and the protocol in one line, with the number of unknown symbols, if any."""
        n_unknown = self._record.n_unknown[split]
        counted = f", {n_unknown:,} unknown {self.vocab.symbol}s read as <unk>" if n_unknown else ""
        return f"{split} split of {self.protocol}{counted}"

    def summary(self) -> str:
        """What was read: protocol, size in bytes, tokens of each split, hash; for people."""
        sources = self._record.sources
        sizes = " / ".join(f"{len(self.split(split)):,}" for split in SPLITS)
        n_files = "1 file" if len(sources) == 1 else f"{len(sources):,} files"
        return (
            f"{self.protocol}\n"
            f"{sum(source.size for source in sources):,} bytes in {n_files}; "
            f"train / valid / test: {sizes} tokens\n"
            f"sha256 {self.fingerprint}"
        )


def _record(folder: Path, recipe: Recipe, splits: Splits) -> Record | None:
    """The record of a folder that holds these splits encoded by this recipe; else None."""
    try:
        record = Record.load(folder / RECORD)
    except FileNotFoundError:
        return None
    return record if record.describes(recipe, splits) else None


def _located(config: DataConfig, vocabulary: Vocabulary | None) -> tuple[Recipe, Path, Splits]:
    """The data set's own recipe (at the level of a given vocabulary), its place and its splits."""
    dataset = find_dataset(config.name)
    protocol_name, protocol = find_protocol(dataset, config.protocol)
    level = _level(config, dataset, protocol, vocabulary)
    path = _place(config)
    word_list: Piece | None = None
    try:
        splits = dataset.locate(path)
        if dataset.word_list is not None:
            with contextlib.suppress(*(() if vocabulary is None else (FileNotFoundError,))):
                word_list = find_piece(path, [dataset.word_list])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data set {config.name}: {error}; get it: {dataset.source}"
        ) from error
    tokenizer_file = None if config.tokenizer_file is None else expanded(config.tokenizer_file)
    recipe = Recipe(
        config.name, protocol_name, protocol, level, config.bpe_size, tokenizer_file, word_list
    )
    return recipe, path, splits


def _level(
    config: DataConfig, dataset: Dataset, protocol: Protocol, vocabulary: Vocabulary | None
) -> Level:
    """The kind of token, after raising for a tokenizer that does not fit."""
    level = protocol.level if config.tokenizer == "dataset" else config.tokenizer
    if vocabulary is not None:
        level = cast(Level, vocabulary.kind)
    if dataset.word_list is not None and level != protocol.level and vocabulary is None:
        raise ValueError(f"tokenizer: {config.name} is read as {protocol.level}s, got {level!r}")
    if config.tokenizer_file is not None and vocabulary is None:
        if level != "bpe":
            raise ValueError(f"tokenizer_file: expected tokenizer 'bpe' with it, got {level!r}")
        if not expanded(config.tokenizer_file).is_file():
            raise FileNotFoundError(f"tokenizer_file: there is no file {config.tokenizer_file}")
    return level


def _place(config: DataConfig) -> Path:
    """Where the data set lies: the given path, else this Python's library or the set's folder."""
    if config.path is not None:
        return expanded(config.path)
    if config.name == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    return Path("data", config.name)


def _folder(config: DataConfig, recipe: Recipe, path: Path) -> Path:
    """The folder of the encoded files: one for each path and recipe."""
    tokenizer_file = None if recipe.tokenizer_file is None else str(recipe.tokenizer_file)
    key = [str(resolved(path)), recipe.key(), tokenizer_file]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    name = f"{recipe.dataset}-{recipe.protocol_name}-{recipe.level}-{digest[:12]}"
    return expanded(config.cache_dir) / name
