"""The published text itself, where it is present: counts that others have published too."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from transformer_xl.data import Corpus, datasets

Opened = Callable[..., Corpus]
RealText = Callable[[str], Path]
SPLITS = ("train", "valid", "test")


@pytest.mark.parametrize("protocol", ["standard", "original"])
def test_wikitext2_has_its_published_size(
    protocol: str, opened: Opened, real_text: RealText
) -> None:
    corpus = opened("wt2", real_text("wikitext-2"), protocol=protocol)
    assert [len(corpus.split(split)) for split in SPLITS] == [2_088_628, 217_646, 245_569]
    assert len(corpus.vocab) == 33_278
    assert corpus.split("train").dtype == "uint16"


def test_wikitext2_comes_back_line_by_line(opened: Opened, real_text: RealText) -> None:
    place = real_text("wikitext-2")
    corpus = opened("wt2", place)
    lines = (place / "wiki.test.tokens").read_text(encoding="utf-8").split("\n")
    decoded = corpus.vocab.decode(corpus.split("test"))
    assert decoded == "\n".join(" ".join(line.split()) for line in lines)


def test_wikitext2_is_encoded_in_seconds(opened: Opened, real_text: RealText) -> None:
    place = real_text("wikitext-2")
    start = time.process_time()
    opened("wt2", place)
    assert time.process_time() - start < 10  # about 1 s on an idle core


def test_wikitext103_heldout_has_its_published_size(
    opened: Opened, real_text: RealText, tmp_path: Path
) -> None:
    place = real_text("wikitext-103-heldout")
    for split, source in {"train": "valid", "valid": "valid", "test": "test"}.items():
        (tmp_path / f"wiki.{split}.tokens").symlink_to(place / f"wiki.{source}.tokens")
    corpus = opened("wt103", tmp_path)  # its training set is not here
    assert [len(corpus.split(split)) for split in SPLITS] == [217_646, 217_646, 245_569]


def test_enwik6_by_enwik8s_protocols(
    opened: Opened, real_text: RealText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "WIKI8_BYTES", (900_000, 50_000, 50_000))
    place = real_text("enwik6") / "enwik6"
    data = place.read_bytes()
    original, full = (opened("enwik8", place, protocol=name) for name in ("original", "full"))
    assert len(full.vocab) == len(set(data)) == len(original.vocab) + 1
    assert original.vocab.decode_bytes(original.split("test")) == data[950_000:].replace(b"\n", b"")
    assert full.vocab.decode_bytes(full.split("test")) == data[950_000:]


def test_enwik6_has_the_ids_of_the_originals_procedure(
    opened: Opened, real_text: RealText, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes written as decimal words, newlines as newlines; read by line, counted, sorted."""
    monkeypatch.setattr(datasets, "WIKI8_BYTES", (900_000, 50_000, 50_000))
    place = real_text("enwik6") / "enwik6"
    corpus = opened("enwik8", place)
    data = place.read_bytes()
    prepared = [
        " ".join(str(byte) if byte != ord("\n") else "\n" for byte in part).split("\n")
        for part in (data[:900_000], data[900_000:950_000], data[950_000:])
    ]
    counter = Counter(symbol for lines in prepared for line in lines for symbol in line.split())
    ids = {symbol: token for token, (symbol, _) in enumerate(counter.most_common())}
    for split, lines in zip(SPLITS, prepared, strict=True):
        expected = [ids[symbol] for line in lines for symbol in line.split()]
        assert corpus.split(split).tolist() == expected


def test_wikitext2_has_the_ids_of_the_originals_procedure(
    opened: Opened, real_text: RealText
) -> None:
    place = real_text("wikitext-2")
    corpus = opened("wt2", place, protocol="original")
    read = {}
    for split in SPLITS:
        with (place / f"wiki.{split}.tokens").open(encoding="utf-8") as file:
            read[split] = [line.strip().split() for line in file]
    counter = Counter(word for lines in read.values() for line in lines for word in line)
    ids = {"<eos>": 0} | {w: i for i, (w, _) in enumerate(counter.most_common(), start=1)}
    expected = [ids[word] for line in read["valid"] for word in [*line, "<eos>"]]
    assert corpus.split("valid").tolist() == expected


def test_text8_prefix_has_27_characters(opened: Opened, real_text: RealText) -> None:
    place = real_text("text8-prefix") / "text8.first700k"
    corpus = opened("text", place, tokenizer="char")
    assert len(corpus.vocab) == 27 + 1  # and <unk>
    assert sum(len(corpus.split(split)) for split in SPLITS) == 700_000
    assert corpus.vocab.decode(corpus.split("train")[:11]) == " anarchism "
