"""The data sets by name: which files each is made of, and the protocols by which it is read."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from platform import python_version
from typing import Literal, TypeVar

from transformer_xl.data.sources import (
    SPLITS,
    Piece,
    Splits,
    find_file,
    find_piece,
    one_file,
    plain_text,
    three_files,
)
from transformer_xl.data.stdlib import stdlib_files

Level = Literal["byte", "char", "word", "bpe"]
T = TypeVar("T")

WIKI8_BYTES = (90_000_000, 5_000_000, 5_000_000)
LM1B_TRAIN = "training-monolingual.tokenized.shuffled"
LM1B_HELDOUT = "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050"
LM1B_WORDS = "1b_word_vocab.txt"
LM1B_SHARDS = 99


@dataclass(frozen=True)
class Protocol:
    """One way of reading a data set.

    Args:
        meaning: what is special about it, printed with every score.
        level: what a token is.
        counted: splits whose symbols make the vocabulary; at another level than this one, and for
            subwords, it is always made from train.
        dropped: bytes left out, at byte level.
        lowercase: lower-case the text, at word level.
        open: what was not counted is a token too: all 256 bytes, or `<unk>`.
        shuffled: sentences are trained on in random order.
    """

    meaning: str
    level: Level
    counted: tuple[str, ...] = ("train",)
    dropped: bytes = b""
    lowercase: bool = False
    open: bool = False
    shuffled: bool = False


@dataclass(frozen=True)
class Dataset:
    """A named data set.

    Args:
        source: where a user gets it.
        locate: finds its splits under a path; raises FileNotFoundError, ValueError.
        protocols: by name; the first is the data set's own.
        word_list: name of the file that lists its words, if one does.
    """

    source: str
    locate: Callable[[Path], Splits]
    protocols: Mapping[str, Protocol]
    word_list: str | None = None


def find_dataset(name: str) -> Dataset:
    """The data set `name`; an unknown one raises ValueError with the nearest name."""
    return _find("data set", name, DATASETS)


def find_protocol(dataset: Dataset, name: str) -> tuple[str, Protocol]:
    """A protocol of the data set and its name; "dataset" is the first."""
    chosen = next(iter(dataset.protocols)) if name == "dataset" else name
    return chosen, _find("protocol", chosen, dataset.protocols)


def _find(kind: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; did you mean {nearest(name, known)!r}?")
    return known[name]


def nearest(name: str, known: Collection[str]) -> str:
    """The known name most like this one."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _wiki8(name: str) -> Callable[[Path], Splits]:
    return lambda path: one_file(find_file(path, [name]), WIKI8_BYTES)


def _files(*patterns: str) -> Callable[[Path], Splits]:
    return lambda path: three_files(path, [*patterns, "{}.txt"])


def _lm1b_files(path: Path) -> Splits:
    """The shards in alphabetic order; the same held-out shard is validation and test set."""
    root = next(iter(sorted(path.glob("1-billion-word*output"))), path)
    shards = sorted((root / LM1B_TRAIN).glob("news.en-*-of-*"))
    if len(shards) != LM1B_SHARDS:
        raise FileNotFoundError(
            f"{root}: expected {LM1B_SHARDS} files {LM1B_TRAIN}/news.en-*-of-* in it, found "
            f"{len(shards)}"
        )
    heldout = [find_piece(root, [LM1B_HELDOUT])]
    return {"train": [Piece(shard) for shard in shards], "valid": heldout, "test": heldout}


def _char_ptb_files(path: Path) -> Splits:
    found = _files("ptb.char.{}.txt", "simple-examples/data/ptb.char.{}.txt")(path)
    return {
        split: [replace(piece, rewrite=_unspaced) for piece in pieces]
        for split, pieces in found.items()
    }


def _unspaced(data: bytes) -> bytes:
    """char-PTB's `t h e _ b a n k` as `the bank`."""
    return data.translate(bytes.maketrans(b"_", b" "), b" ")


_WORDS = Protocol("words, <eos> ends each line", "word")
_WORDS_OF_ALL = Protocol(
    "words, <eos> ends each line, vocabulary of all three splits", "word", counted=SPLITS
)

DATASETS: dict[str, Dataset] = {
    "enwik8": Dataset(
        "https://mattmahoney.net/dc/enwik8.zip",
        _wiki8("enwik8"),
        {
            "original": Protocol("newline bytes left out", "byte", counted=SPLITS, dropped=b"\n"),
            "full": Protocol("all bytes, newlines too", "byte", counted=SPLITS),
        },
    ),
    "text8": Dataset(
        "https://mattmahoney.net/dc/text8.zip",
        _wiki8("text8"),
        {"original": Protocol("characters a-z and space", "char", counted=SPLITS)},
    ),
    "wt103": Dataset(
        "WikiText-103, wikitext-103-v1.zip",
        _files("wiki.{}.tokens", "wikitext-103/wiki.{}.tokens"),
        {"original": _WORDS},
    ),
    "wt2": Dataset(
        "WikiText-2, wikitext-2-v1.zip",
        _files("wiki.{}.tokens", "wikitext-2/wiki.{}.tokens"),
        {"standard": _WORDS, "original": _WORDS_OF_ALL},
    ),
    "ptb": Dataset(
        "https://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz",
        _files("ptb.{}.txt", "simple-examples/data/ptb.{}.txt"),
        {
            "standard": _WORDS,
            "original": Protocol(
                "words in lower case, <eos> ends each line, vocabulary of all three splits",
                "word",
                counted=SPLITS,
                lowercase=True,
            ),
        },
    ),
    "char_ptb": Dataset(
        "https://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz",
        _char_ptb_files,
        {"standard": Protocol("characters, newlines too", "char")},
    ),
    "lm1b": Dataset(
        "1-billion-word-language-modeling-benchmark-r13output.tar.gz, unpacked, and "
        "1b_word_vocab.txt beside its folders",
        _lm1b_files,
        {
            "original": Protocol(
                "sentences <S> … <S> packed back to back, <S> after <S> never scored",
                "word",
                shuffled=True,
            ),
            "boundary-scored": Protocol(
                "sentences <S> … <S> as one stream, <S> after <S> scored too (TensorFlow)", "word"
            ),
        },
        word_list=LM1B_WORDS,
    ),
    "text": Dataset(
        "your own files",
        plain_text,
        {"standard": Protocol("bytes", "byte", open=True)},
    ),
    "stdlib": Dataset(
        "the Python that runs this program",
        stdlib_files,
        {"standard": Protocol(f"source of Python {python_version()}, bytes", "byte", open=True)},
    ),
}
