"""Corpora, vocabularies and archives from strangers: read in bounded memory, or refused by name."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from transformer_xl.config import DataConfig, TrainConfig, from_dict, load_preset, override
from transformer_xl.config_fields import to_dict
from transformer_xl.data import Corpus, Vocabulary, open_corpus
from transformer_xl.data.archives import MOST_MEMBERS, members
from transformer_xl.data.batches import OrderedBatches
from transformer_xl.data.files import check_regular, linked, read_json
from transformer_xl.data.sentence_batches import ShuffledSentenceBatches
from transformer_xl.data.sources import Piece, plain_text
from transformer_xl.data.text import read_text
from transformer_xl.data.vocabularies import SubwordVocabulary, WordVocabulary

Opened = Callable[..., Corpus]
DEEP = "[" * 100_000
MIB = 1 << 20


def odd_files(folder: Path) -> dict[str, Path]:
    """Paths of a folder, a FIFO and others that are no regular files, by their kind."""
    paths = {name: folder / name for name in ("folder", "FIFO", "loop", "dangling")}
    paths["folder"].mkdir()
    os.mkfifo(paths["FIFO"])
    paths["loop"].symlink_to("loop")
    paths["dangling"].symlink_to("nowhere")
    return paths | {"device": Path("/dev/zero")}


READERS = {
    "json": read_json,
    "vocabulary": Vocabulary.load,
    "tokenizer": SubwordVocabulary.from_file,
    "text": lambda path: read_text(Piece(path)),
    "words": lambda path: WordVocabulary.from_list(Piece(path)),
}


@pytest.mark.parametrize("kind", ["folder", "FIFO", "loop", "dangling", "device"])
@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_are_opened(reader: str, kind: str, tmp_path: Path) -> None:
    path = odd_files(tmp_path)[kind]
    with pytest.raises((ValueError, OSError)) as raised:
        READERS[reader](path)
    assert str(path) in str(raised.value)
    if kind in ("folder", "FIFO", "device"):
        assert f"{path}: expected a file, found a {kind}" == str(raised.value)


def test_a_loop_of_links_stays_as_it_is(tmp_path: Path) -> None:
    assert linked(odd_files(tmp_path)["loop"]) == tmp_path / "loop"
    check_regular(Path(__file__))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vocab.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(PermissionError, match=r"vocab\.json"):
        Vocabulary.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP, "it is not JSON"),
        ('{"kind": ["byte"]}', "expected a kind byte"),
        ('{"kind": "byte", "values": 99999999999, "dropped": []}', "values: expected a list of by"),
        ('{"kind": "byte", "values": [1, 1], "dropped": []}', "values: expected each byte once"),
        ('{"kind": "byte", "values": [], "dropped": []}', "expected at least one byte"),
        ('{"kind": "char", "symbols": ["ab"]}', "symbols: expected single characters, found 'ab'"),
        ('{"kind": "char", "symbols": "ab"}', "symbols: expected a list of texts, found 'ab'"),
        ('{"kind": "char", "symbols": []}', r"symbols: expected a list of texts, found \[\]"),
        ('{"kind": "char", "symbols": ["\\ud800"]}', "symbols: expected texts"),
        ('{"kind": "word", "words": ["<eos>", null], "lowercase": false}', "words: expected texts"),
        ('{"kind": "word", "words": ["<eos>"], "lowercase": 3}', "lowercase: expected true or"),
        ('{"kind": "bpe", "tokenizer": {"version": 7}}', "."),
        ('{"kind": "bpe"}', "it has no 'tokenizer'"),
    ],
)
def test_a_vocabulary_that_no_program_wrote(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "vocab.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"vocab\.json: not a vocabulary: .*{message}"):
        Vocabulary.load(path)


def test_a_tokenizer_of_few_tokens_cannot_have_huge_ids(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {"a": 4_000_000_000}, "unk_token": "a"}
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: .* with ids below 16,777,216, found 4,"
    ):
        SubwordVocabulary.from_file(path)


def test_a_word_list_without_the_end_of_a_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("a\nb\n")
    with pytest.raises(ValueError, match="words: words: expected <eos> or <S> among them"):
        WordVocabulary.from_list(Piece(tmp_path / "words"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["splits"].pop("valid"), "splits: expected train, valid, test"),
        (lambda v: v["splits"]["test"].update(name="../other"), r"splits.test.name: expected 'te"),
        (lambda v: v["splits"]["test"].update(dtype="O"), "splits.test.dtype: expected one of"),
        (lambda v: v["splits"]["test"].update(n_tokens=0), "splits.test.n_tokens: expected a pos"),
        (lambda v: v["n_unknown"].update(train="3"), "n_unknown.train: expected 0 or more"),
        (lambda v: v.update(sources=[{"x" * 9000: 1}]), "it is no record"),
    ],
)
def test_a_record_that_no_program_wrote(
    change: Callable[[dict], object], message: str, tmp_path: Path, opened: Opened
) -> None:
    (tmp_path / "text").write_text("some text\n" * 90)
    record = opened("text", tmp_path / "text").folder / "record.json"
    values = json.loads(record.read_text())
    change(values)
    record.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"record\.json is damaged: {message}") as raised:
        opened("text", tmp_path / "text")
    assert len(str(raised.value)) < 1500


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "text").write_text("abc\n" * 30)
    folder = opened("text", tmp_path / "text", tokenizer="char").folder
    record = json.loads((folder / "record.json").read_text())
    data = (folder / "valid.bin").read_bytes()[:-1] + b"\xfa"
    (folder / "valid.bin").write_bytes(data)
    record["splits"]["valid"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "record.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"valid.bin is damaged: expected ids below 5, found 250"):
        opened("text", tmp_path / "text", tokenizer="char")


def peak(call: Callable[[], object]) -> int:
    """The most bytes that Python's objects take during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ending", ["txt.gz", "txt.bz2", "zip", "tar.gz", "tar.xz"])
def test_a_bomb_is_unpacked_in_bounded_memory(ending: str, tmp_path: Path) -> None:
    path, size = tmp_path / f"bomb.{ending}", 48 * MIB
    if ending == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("text", bytes(size))
    else:
        info = tarfile.TarInfo("text")
        info.size = size
        content = info.tobuf() + bytes(size + 1024) if "tar" in ending else bytes(size)
        pack = {
            "gz": gzip.compress,
            "bz2": bz2.compress,
            "xz": lambda d: lzma.compress(d, preset=0),
        }
        path.write_bytes(pack[ending.rpartition(".")[2]](content))
    pieces = plain_text(path)
    found = 0

    def read() -> None:
        nonlocal found
        found = sum(len(chunk) for piece in pieces["train"] for chunk in piece.chunks())

    assert peak(read) < 32 * MIB
    assert found > size * 0.89


def long_name(size: int) -> bytes:
    """A tar whose first header says that a name of `size` bytes follows."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    return info.tobuf() + bytes(size)


def negative() -> bytes:
    """A tar with a member of negative size, after which tarfile would read the same header."""
    header = bytearray(tarfile.TarInfo("text").tobuf())
    header[124:136] = b"\xff" * 4 + struct.pack(">q", -1024)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) * 3 + bytes(1024)


def test_headers_of_a_tar_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.tar.gz"
    for content in (long_name(64 * MIB), negative()):
        path.write_bytes(gzip.compress(content, 1))
        with pytest.raises(ValueError, match=r"text\.tar\.gz: (the archive|a header)"):
            assert peak(lambda: members(path)) < 8 * MIB
    monkeypatch.setattr("transformer_xl.data.archives.MOST_MEMBERS", 3)
    path.write_bytes(gzip.compress(tarfile.TarInfo("text").tobuf() * 5))
    with pytest.raises(ValueError, match="more than 3 members"):
        members(path)
    assert MOST_MEMBERS >= 10_000


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_of_zip_without_a_limit_are_refused(method: int, tmp_path: Path) -> None:
    path = tmp_path / "text.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("text", b"a" * 1000)
    with pytest.raises(
        ValueError, match=r"text\.zip: .* expected it stored .* or deflated .* found"
    ):
        plain_text(path)


def test_a_zip_with_a_wrong_size_is_refused(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text", b"some words\n" * 50)
    data = packed.getvalue()
    at = data.rfind(b"PK\x01\x02") + 24  # of the size in the directory
    path = tmp_path / "text.zip"
    path.write_bytes(data[:at] + struct.pack("<I", 90_000) + data[at + 4 :])
    with pytest.raises(ValueError, match=r"text\.zip(:text)?: "):
        [list(piece.chunks()) for pieces in plain_text(path).values() for piece in pieces]


def test_offsets_outside_a_zip_are_named(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("text", b"some words\n" * 50)
    data = packed.getvalue()
    end = data.rfind(b"PK\x05\x06")
    path = tmp_path / "text.zip"
    for offset in (0x7FFFFFFF, 0xFFFFFFF0):
        path.write_bytes(data[: end + 16] + struct.pack("<I", offset) + data[end + 20 :])
        with pytest.raises(ValueError, match=r"text\.zip: the archive is damaged"):
            members(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.lr", 10**400),
        ("train.lr", float("nan")),
        ("train.clip", "inf"),
        ("model.mem_len", 2**64),
        ("model.cutoffs", [2**64]),
        ("data.path", "a\0b"),
        ("data.cache_dir", "\ud800"),
        ("train.decay_rate", 2.0),
        ("train.scheduler", ["cosine"]),
        ("model.init", "x" * 90_000),
    ],
)
def test_configurations_that_no_program_wrote(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field.partition(".")[2]) as raised:
        override(load_preset("demo"), {field: value})
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("tree", [None, 3, {"model": 3}, {3: {}}, {None: 1}, {"x" * 90_000: 1}])
def test_trees_that_are_no_configuration(tree: object) -> None:
    with pytest.raises(ValueError, match=r"RunConfig|model|data is missing") as raised:
        from_dict(tree)
    assert len(str(raised.value)) < 1000
    assert from_dict(to_dict(load_preset("demo"))) == load_preset("demo")
    assert TrainConfig(decay_rate=1.0).decay_rate == 1


@pytest.mark.parametrize(
    "state",
    [{"position": -1}, {"position": 10**9}, {"position": "0"}, {"epoch": -1}, {"epoch": None}],
)
def test_positions_outside_a_stream_are_refused(state: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("ab" * 100)
    config = DataConfig(name="text", path=str(tmp_path / "text"), cache_dir=str(tmp_path / "cache"))
    batches = OrderedBatches(open_corpus(config).split("train"), 2, 4)
    name = next(iter(state))
    with pytest.raises(ValueError, match=f"data position: {name}: expected an integer in"):
        batches.load_state_dict(batches.state_dict() | state)


@pytest.mark.parametrize(
    "state",
    [{"spans": [[0, 99], [0, 0]]}, {"spans": [[5, 2], [0, 0]]}, {"spans": 3}, {"dealt": 99}],
)
def test_spans_outside_the_sentences_are_refused(state: dict[str, object]) -> None:
    tokens = WordVocabulary(["<S>", "a"]).encode_array("a a\na\n" * 4)
    batches = ShuffledSentenceBatches(tokens, 0, 2, 2, seed=1)
    with pytest.raises(ValueError, match=f"data position: {next(iter(state))}: expected"):
        batches.load_state_dict(batches.state_dict() | state)
