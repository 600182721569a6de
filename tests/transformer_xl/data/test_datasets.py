"""Each data set from tiny files in its published format: tokens, ids and protocol."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from transformer_xl.config import DataConfig, load_preset, preset_names
from transformer_xl.data import Corpus, datasets
from transformer_xl.data.datasets import DATASETS
from transformer_xl.data.vocabularies import WordVocabulary

Opened = Callable[..., Corpus]
SplitFiles = Callable[..., Path]


def tokens(corpus: Corpus) -> dict[str, list[int]]:
    return {split: corpus.split(split).tolist() for split in ("train", "valid", "test")}


@pytest.fixture
def tiny_wiki8(monkeypatch: pytest.MonkeyPatch) -> None:
    """enwik8 and text8 of 12 + 4 + 4 bytes."""
    monkeypatch.setattr(datasets, "WIKI8_BYTES", (12, 4, 4))


@pytest.fixture(params=["file", "folder", "zip"])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str, bytes], Path]:
    """Write a file as it may come: itself, its folder, or a zip around it."""

    def pack(name: str, data: bytes) -> Path:
        folder = tmp_path / "downloaded"
        folder.mkdir()
        if request.param == "zip":
            with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
                archive.writestr(name, data)
            return folder / f"{name}.zip"
        (folder / name).write_bytes(data)
        return folder if request.param == "folder" else folder / name

    return pack


WIKI8 = b"aab\nbb\xc3\xa9\nbb\nbz\nba\n\nb"


@pytest.mark.usefixtures("tiny_wiki8")
def test_enwik8_original_leaves_newlines_out(
    opened: Opened, packed: Callable[[str, bytes], Path]
) -> None:
    corpus = opened("enwik8", packed("enwik8", WIKI8))
    # Counted on all splits as the original does: z, which is not in train, has a token.
    assert corpus.vocab.to_dict()["values"] == list(b"ba\xc3\xa9z")
    assert tokens(corpus) == {
        "train": [1, 1, 0, 0, 0, 2, 3, 0, 0],
        "valid": [0, 4, 0],
        "test": [1, 0],
    }
    assert corpus.metric == "bpc"
    assert corpus.protocol == "enwik8 (original: newline bytes left out), V = 5"


@pytest.mark.usefixtures("tiny_wiki8")
def test_enwik8_full_keeps_every_byte(opened: Opened, packed: Callable[[str, bytes], Path]) -> None:
    corpus = opened("enwik8", packed("enwik8", WIKI8), protocol="full")
    decoded = b"".join(corpus.vocab.decode_bytes(part) for part in tokens(corpus).values())
    assert decoded == WIKI8
    assert corpus.split("train").dtype == "uint8"
    assert corpus.protocol == "enwik8 (full: all bytes, newlines too), V = 6"


@pytest.mark.usefixtures("tiny_wiki8")
def test_text8_is_characters(opened: Opened, packed: Callable[[str, bytes], Path]) -> None:
    corpus = opened("text8", packed("text8", b" anarchism originate"))
    assert len(corpus.vocab) == len(set(" anarchism originate"))
    assert corpus.vocab.decode(corpus.split("valid")) == "rigi"
    assert corpus.metric == "bpc"


def test_a_prefix_of_enwik8_is_not_enwik8(opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "enwik8").write_bytes(WIKI8)
    with pytest.raises(ValueError, match="expected 100,000,000 bytes, found 20; as plain text"):
        opened("enwik8", tmp_path)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("wt103", "wiki.{}.tokens"), ("wt2", "wiki.{}.tokens"), ("wt103", "{}.txt")],
)
def test_wikitext_is_words_with_an_end_for_every_line(
    name: str, pattern: str, opened: Opened, split_files: SplitFiles
) -> None:
    folder = split_files(pattern, " \n = A = \n the A <unk> \n", " the \n", " A B \n")
    corpus = opened(name, folder)
    # Counted on train alone: B, which is not there, is <unk>.
    assert corpus.vocab.to_dict()["words"] == ["<eos>", "=", "A", "the", "<unk>"]
    assert tokens(corpus) == {
        "train": [0, 1, 2, 1, 0, 3, 2, 4, 0],
        "valid": [3, 0],
        "test": [2, 4, 0],
    }
    assert corpus.metric == "ppl"


def test_wikitext_comes_zipped_too(opened: Opened, split_files: SplitFiles, tmp_path: Path) -> None:
    folder = split_files("wiki.{}.tokens", "a b\n", "a\n", "b\n")
    with zipfile.ZipFile(tmp_path / "wikitext-103-v1.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"wikitext-103/{file.name}")
    zipped = opened("wt103", tmp_path / "wikitext-103-v1.zip")
    assert zipped.fingerprint == opened("wt103", folder).fingerprint


def test_wikitext2_original_counts_all_splits(opened: Opened, split_files: SplitFiles) -> None:
    folder = split_files("wiki.{}.tokens", "a b <unk>\n", "c\n", "c d\n")
    corpus = opened("wt2", folder, protocol="original")
    assert corpus.vocab.to_dict()["words"] == ["<eos>", "c", "a", "b", "<unk>", "d"]


@pytest.fixture(params=["tgz", "folder"])
def simple_examples(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Penn Treebank as simple-examples.tgz holds it, packed or unpacked."""
    data = tmp_path / "simple-examples" / "data"
    data.mkdir(parents=True)
    for split, text in {
        "train": " the N <unk> \n the bank \n",
        "valid": " the \n",
        "test": " bank \n",
    }.items():
        (data / f"ptb.{split}.txt").write_text(text)
        letters = text.strip().replace(" ", "_").replace("\n", " \n")
        (data / f"ptb.char.{split}.txt").write_text(f" {' '.join(letters)} \n")
    if request.param == "folder":
        return tmp_path
    with tarfile.open(tmp_path / "simple-examples.tgz", "w:gz") as tar:
        tar.add(tmp_path / "simple-examples", "./simple-examples")
    return tmp_path / "simple-examples.tgz"


def test_penn_treebank_is_words(opened: Opened, simple_examples: Path) -> None:
    corpus = opened("ptb", simple_examples)
    assert corpus.vocab.to_dict()["words"] == ["<eos>", "the", "N", "<unk>", "bank"]
    assert tokens(corpus) == {"train": [1, 2, 3, 0, 1, 4, 0], "valid": [1, 0], "test": [4, 0]}


def test_penn_treebank_original_is_lower_case(opened: Opened, simple_examples: Path) -> None:
    corpus = opened("ptb", simple_examples, protocol="original")
    assert corpus.vocab.to_dict()["words"] == ["<eos>", "the", "bank", "n", "<unk>"]
    assert corpus.vocab.encode("The N\n") == [1, 3, 0]


def test_char_penn_treebank_is_text_again(opened: Opened, simple_examples: Path) -> None:
    corpus = opened("char_ptb", simple_examples)
    assert corpus.vocab.decode(corpus.split("valid")) == "the\n"
    assert corpus.metric == "bpc"


@pytest.fixture
def one_billion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One Billion Word with two training shards and its word list."""
    monkeypatch.setattr(datasets, "LM1B_SHARDS", 2)
    root = tmp_path / "1-billion-word-language-modeling-benchmark-r13output"
    train, heldout = (
        root / f"{part}-monolingual.tokenized.shuffled" for part in ("training", "heldout")
    )
    train.mkdir(parents=True)
    heldout.mkdir()
    (train / "news.en-00001-of-00100").write_text("a b\nb\n")
    (train / "news.en-00002-of-00100").write_text("zebra a\n")
    (heldout / "news.en.heldout-00000-of-00050").write_text("b a\n")
    (heldout / "news.en.heldout-00001-of-00050").write_text("not read\n")
    (tmp_path / "1b_word_vocab.txt").write_text("<S>\n</S>\n<UNK>\na\nb\n")
    return tmp_path


@pytest.mark.parametrize("protocol", ["original", "boundary-scored"])
def test_one_billion_word_is_sentences_between_two_marks(
    protocol: str, opened: Opened, one_billion: Path
) -> None:
    corpus = opened("lm1b", one_billion, protocol=protocol)
    assert tokens(corpus) == {
        "train": [0, 3, 4, 0, 0, 4, 0, 0, 2, 3, 0],
        "valid": [0, 4, 3, 0],
        "test": [0, 4, 3, 0],
    }
    # Where one stream is read, <S> after <S> is scored: once for each sentence but the first.
    scored = sum(int((b.targets != -100).sum()) for b in corpus.batches("train", 1, 2))
    assert scored == {"original": 8, "boundary-scored": 10}[protocol]


def test_one_billion_word_needs_every_shard(opened: Opened, one_billion: Path) -> None:
    next(one_billion.glob("*/training*/*00002*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected 2 files training.* in it, found 1; get"):
        opened("lm1b", one_billion)


def test_one_billion_word_needs_its_word_list(opened: Opened, one_billion: Path) -> None:
    (one_billion / "1b_word_vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lm1b: .*expected 1b_word_vocab.txt in it; get"):
        opened("lm1b", one_billion)
    with pytest.raises(ValueError, match="tokenizer: lm1b is read as words, got 'byte'"):
        opened("lm1b", one_billion, tokenizer="byte")


@pytest.mark.parametrize("tokenizer", ["byte", "char", "word", "bpe"])
def test_plain_text_at_every_level(tokenizer: str, opened: Opened, split_files: SplitFiles) -> None:
    corpus = opened(
        "text", split_files("{}.txt", "a b é\n", "b\n", "new\n"), tokenizer=tokenizer, bpe_size=256
    )
    assert corpus.vocab.kind == tokenizer
    assert corpus.vocab.decode(corpus.split("valid")) == "b\n"
    assert (
        corpus.vocab.decode(corpus.split("test"))
        == {
            "byte": "new\n",
            "char": "<unk><unk><unk>\n",
            "word": "<unk>\n",
            "bpe": "new\n",
        }[tokenizer]
    )
    assert corpus.metric == ("bpc" if tokenizer in ("byte", "char") else "ppl")


@pytest.mark.parametrize("name", ["wt103", "wt2"])
def test_at_another_level_the_vocabulary_is_made_from_train(
    name: str, opened: Opened, split_files: SplitFiles
) -> None:
    folder = split_files("wiki.{}.tokens", "a b\n", "a\n", "zz zz zz\n")
    corpus = opened(name, folder, tokenizer="char", protocol="original")
    assert corpus.protocol == f"{name} (original: char tokens), V = 5"
    assert corpus.vocab.decode(corpus.split("test")[:2]) == "<unk><unk>"
    subwords = opened(name, folder, tokenizer="bpe", protocol="original")
    assert len(subwords.split("test")) == len("zz zz zz\n")  # no pair of z was learned


def test_unknown_names_are_answered_with_the_nearest(opened: Opened, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'enwiki8'; did you mean 'enwik8'\?"):
        opened("enwiki8")
    with pytest.raises(ValueError, match=r"unknown protocol 'ful'; did you mean 'full'\?"):
        opened("enwik8", tmp_path, protocol="ful")


def test_every_preset_names_a_data_set_and_a_protocol() -> None:
    for preset in preset_names():
        data: DataConfig = load_preset(preset).data
        datasets.find_protocol(datasets.find_dataset(data.name), data.protocol)


def test_counted_vocabularies_start_with_the_end_of_line(
    opened: Opened, split_files: SplitFiles
) -> None:
    corpus = opened("wt103", split_files("wiki.{}.tokens", "a a\n", "a\n", "a\n"))
    assert isinstance(corpus.vocab, WordVocabulary)
    assert corpus.vocab.boundary == 0


def test_every_data_set_says_where_it_comes_from() -> None:
    assert all(dataset.source and dataset.protocols for dataset in DATASETS.values())
