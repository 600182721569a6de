"""A corpus, ready to read: its vocabulary and its splits as memory-mapped token ids."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path
from typing import Literal

from transformer_xl.config import DataConfig
from transformer_xl.data.batches import OrderedBatches
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
from transformer_xl.data.record import Recipe, Record
from transformer_xl.data.sentence_batches import ShuffledSentenceBatches
from transformer_xl.data.sources import SPLITS, Splits, find_piece
from transformer_xl.data.token_file import TokenArray, damaged, file_sha256
from transformer_xl.data.vocabularies import Vocabulary, WordVocabulary
from transformer_xl.files import expanded, locked


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config` names, encoded at the first call and reused while its files are the
    same.

    Of several processes one encodes and the others wait, for as long as it runs. If it is killed,
    the next one encodes instead.

    Raises:
        ValueError: an unknown data set or protocol (with the nearest name), an empty file, text
            that is not UTF-8 (with the byte offset), a symbol outside a closed vocabulary, a token
            file that is damaged.
        FileNotFoundError: files that are not there, with the names that were looked for and where
            to get them.
    """
    dataset = find_dataset(config.name)
    protocol_name, protocol = find_protocol(dataset, config.protocol)
    level = _level(config, dataset, protocol)
    path = _place(config)
    try:
        splits = dataset.locate(path)
        word_list = find_piece(path, [dataset.word_list]) if dataset.word_list else None
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data set {config.name}: {error}; get it: {dataset.source}"
        ) from error
    tokenizer_file = None if config.tokenizer_file is None else expanded(config.tokenizer_file)
    recipe = Recipe(
        config.name, protocol_name, protocol, level, config.bpe_size, tokenizer_file, word_list
    )
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
        protocol: what was read and how, in one line, to stand beside every score.
        fingerprint: hex SHA-256 of the vocabulary and the tokens; where the files lay does not
            matter.
        shuffled: whether training reads sentences in random order.
        folder: where the token files lie.

    Raises:
        ValueError: a file of the folder is not what was written there.
    """

    def __init__(self, folder: Path, recipe: Recipe, record: Record) -> None:
        self.folder, self._recipe, self._record = folder, recipe, record
        if file_sha256(folder / VOCABULARY) != record.vocabulary_sha256:
            raise damaged(folder / VOCABULARY, "its sha256 is not the recorded one")
        self.vocab = Vocabulary.load(folder / VOCABULARY)
        self._tokens = {split: record.splits[split].open(folder) for split in SPLITS}
        self.metric: Literal["bpc", "ppl"] = "bpc" if recipe.level in ("byte", "char") else "ppl"
        self.shuffled = recipe.protocol.shuffled
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
    ) -> OrderedBatches | ShuffledSentenceBatches:
        """The split as the protocol has it read: sentences where they are shuffled (in the order of
        `seed`; None keeps the file's, and then scores every token), else contiguous streams."""
        tokens = self.split(split)
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

    @property
    def protocol(self) -> str:
        recipe = self._recipe
        meaning = recipe.protocol.meaning if recipe.as_protocol else f"{recipe.level} tokens"
        return f"{recipe.dataset} ({recipe.protocol_name}: {meaning}), V = {len(self.vocab):,}"

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


def _level(config: DataConfig, dataset: Dataset, protocol: Protocol) -> Level:
    """What a token is, after raising for a tokenizer that does not fit."""
    level = protocol.level if config.tokenizer == "dataset" else config.tokenizer
    if dataset.word_list is not None and level != protocol.level:
        raise ValueError(f"tokenizer: {config.name} is read as {protocol.level}s, got {level!r}")
    if config.tokenizer_file is not None:
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
    key = [str(path.resolve()), recipe.key(), tokenizer_file]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    name = f"{recipe.dataset}-{recipe.protocol_name}-{recipe.level}-{digest[:12]}"
    return expanded(config.cache_dir) / name
