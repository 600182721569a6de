"""Formats of text and of the files made from it: how the data readers read each."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import lzma
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tools.fuzz.folder import TEXT, Folder, tiny_run
from transformer_xl.config import DataConfig
from transformer_xl.data import Corpus, Vocabulary, open_corpus
from transformer_xl.data.sources import Piece, find_file, plain_text
from transformer_xl.data.vocabularies import CharVocabulary, SubwordVocabulary, WordVocabulary


class TokenFiles(Folder):
    """The token files of a corpus with their record and vocabulary."""

    name = "tokens"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.config = tiny_run(self.folder).data
        cache = open_corpus(self.config).folder
        self.files = {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(cache.iterdir())
        }
        self.cache = cache

    def read(self, data: bytes) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)
        path = self.write(data)
        record = self.cache / "record.json"
        if path != record:  # hashes that fit, as whoever made the file would write them
            values = json.loads(record.read_bytes())
            digest = hashlib.sha256(data[1:]).hexdigest()
            if path.suffix == ".bin":
                values["splits"][path.stem] |= {"n_tokens": len(data) - 1, "sha256": digest}
            else:
                values["vocabulary_sha256"] = digest
            record.write_text(json.dumps(values))
        use_corpus(open_corpus(self.config))


def use_corpus(corpus: Corpus) -> None:
    """Read what training and evaluation read of a corpus."""
    for split in ("train", "valid", "test"):
        corpus.vocab.decode(corpus.split(split)[:50])
        corpus.source(split)
        with contextlib.suppress(ValueError):  # too short for a batch
            next(iter(corpus.batches(split, 2, 4)))
    corpus.summary()


class Vocabularies(Folder):
    """The vocabularies of checkpoints and token folders, of each kind."""

    name = "vocabulary"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        text = self.folder / "text"
        text.write_text(TEXT, encoding="utf-8")
        made: list[Vocabulary] = [
            CharVocabulary.count([Piece(text)], ["<unk>"]),
            WordVocabulary.count([Piece(text)], ["<eos>", "<unk>"]),
            WordVocabulary(["<S>", "<UNK>", "the"], lowercase=True),
            SubwordVocabulary.learn([Piece(text)], 270),
        ]
        self.files = {"vocab.json": b'{"kind": "byte", "values": [104, 10, 32], "dropped": [13]}'}
        for i, vocabulary in enumerate(made):
            vocabulary.save(self.folder / f"vocab{i}.json")
            self.files[f"vocab{i}.json"] = (self.folder / f"vocab{i}.json").read_bytes()

    def read(self, data: bytes) -> None:
        use_vocabulary(Vocabulary.load(self.write(data)))


def use_vocabulary(vocabulary: Vocabulary) -> None:
    """Encode and decode with a vocabulary, and write it."""
    with contextlib.suppress(ValueError):
        vocabulary.decode(vocabulary.encode(TEXT))
    vocabulary.unknown(TEXT)
    vocabulary.decode(vocabulary.first_tokens())
    vocabulary.decode([0, len(vocabulary) - 1])
    assert len(vocabulary.sha256) == 64


class Tokenizers(Folder):
    """tokenizer.json files of the `tokenizers` library, and lists of words."""

    name = "tokenizer"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        text = self.folder / "text"
        text.write_text(TEXT, encoding="utf-8")
        learned = SubwordVocabulary.learn([Piece(text)], 260).to_dict()["tokenizer"]
        learned["model"]["vocab"] = dict(list(learned["model"]["vocab"].items())[:40])
        learned["model"]["merges"] = learned["model"]["merges"][:0]
        words = {"<unk>": 0, "the": 1, "memory": 2}
        special = {"id": 0, "content": "<unk>", "single_word": False, "lstrip": False}
        special |= {"rstrip": False, "normalized": False, "special": True}
        tree: dict[str, Any] = {"version": "1.0", "added_tokens": [special], "truncation": None}
        tree |= {"padding": None, "post_processor": None, "decoder": {"type": "WordPiece"} | {}}
        tree["decoder"] |= {"prefix": "##", "cleanup": True}
        tree |= {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Whitespace"}}
        models: list[dict[str, Any]] = [
            {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
            {"type": "WordPiece", "vocab": words, "unk_token": "<unk>"}
            | {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
            {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["the", -1.0]]},
        ]
        files = [learned, *({**tree, "model": model} for model in models)]
        self.files = {f"tokenizer{i}.json": json.dumps(f).encode() for i, f in enumerate(files)}
        self.files["words.txt"] = b"<S>\n<UNK> 1\nthe\nmemory\n"

    def read(self, data: bytes) -> None:
        path = self.write(data)
        if path.suffix == ".json":
            use_vocabulary(SubwordVocabulary.from_file(path))
        else:
            use_vocabulary(WordVocabulary.from_list(Piece(path)))


class Archives(Folder):
    """Archives and compressed files with a text in them."""

    name = "archive"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        text = TEXT.encode()
        self.files = {"text.txt.gz": gzip.compress(text), "text.txt.bz2": bz2.compress(text)}
        modes: Mapping[str, Callable[[bytes], bytes]] = {
            "tar": lambda data: data,
            "tar.gz": gzip.compress,
            "tar.bz2": bz2.compress,
            "tar.xz": lzma.compress,
        }
        for ending, compress in modes.items():
            for style in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)[: 2 if ending == "tar" else 1]:
                name = "text.tar" if style == tarfile.PAX_FORMAT else "gnu/text.tar"
                self.files[name + ending[3:]] = compress(_tar(text, style))
        for method in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
            zipfile.ZIP_BZIP2,
            zipfile.ZIP_LZMA,
        ):
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", method) as archive:
                archive.writestr("a/README", "read me")
                archive.writestr("a/text.txt", text)
            self.files[f"{method}/text.zip"] = packed.getvalue()
        self.config = DataConfig(
            name="text", tokenizer="word", cache_dir=str(self.folder / "cache")
        )

    def refused(self, data: bytes) -> bool:
        return self.chosen(data) in (
            f"{zipfile.ZIP_BZIP2}/text.zip",
            f"{zipfile.ZIP_LZMA}/text.zip",
        )

    def read(self, data: bytes) -> None:
        name = self.chosen(data)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[1:])
        for pieces in plain_text(path).values():
            for piece in pieces:
                size = sum(len(chunk) for chunk in itertools.islice(piece.chunks(), 64))
                assert size == piece.size, f"{size} bytes of {piece.size}"
        for chunk in find_file(path, ["README", "text.txt"]).chunks():
            assert chunk


def _tar(text: bytes, style: int) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=style) as tar:
        for name, data in (
            ("a/README", b"read me"),
            ("a/" + "é" * 110, b"long"),
            ("text.txt", text),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "text.txt"
        tar.addfile(link)
    return packed.getvalue()


class Texts(Folder):
    """Plain text in any encoding, as characters, words and bytes."""

    name = "text"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        encodings = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "utf-16-le")
        for kind, encoding in itertools.product(("byte", "char", "word"), encodings):
            text = (TEXT.replace("☃", "") if encoding == "latin-1" else TEXT) * 4
            self.files[f"{kind}-{encoding}.txt"] = text.encode(encoding)

    def refused(self, data: bytes) -> bool:
        name = self.chosen(data)
        return not name.startswith("byte") and not name.endswith(("-utf-8.txt", "-utf-8-sig.txt"))

    def read(self, data: bytes) -> None:
        name = self.chosen(data)
        path, cache = self.folder / name, self.folder / "cache"
        path.write_bytes(data[1:])
        shutil.rmtree(cache, ignore_errors=True)
        level: Any = name.partition("-")[0]
        use_corpus(
            open_corpus(
                DataConfig(name="text", path=str(path), tokenizer=level, cache_dir=str(cache))
            )
        )
        assert not list(cache.glob(".*")), "an unfinished folder or a lock stayed"
