"""The file formats that the project reads: small valid files, and how a command reads each."""

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

import torch
import yaml

from tools.fuzz.oracle import Format
from transformer_xl import config as configuration
from transformer_xl import generation
from transformer_xl.checkpoint import open_checkpoint
from transformer_xl.cli.loading import LoadedModel
from transformer_xl.config import DataConfig, EvaluateConfig, ModelConfig, RunConfig, TrainConfig
from transformer_xl.data import Corpus, Vocabulary, open_corpus
from transformer_xl.data.sources import Piece, find_file, plain_text
from transformer_xl.data.vocabularies import CharVocabulary, SubwordVocabulary, WordVocabulary
from transformer_xl.training import changes, report
from transformer_xl.training.trainer import Trainer, join_processes
from txl_kernels.backends.verification import records

TEXT = "the memory of one segment\nis what the next one reads é ☃\r\n\nfirst <unk>\n" * 4


class _Folder:
    """A folder of valid files, of which an input replaces one."""

    name: str
    errors: tuple[type[BaseException], ...] = (ValueError, OSError)

    def __init__(self, folder: Path) -> None:
        self.folder = folder / self.name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.files: dict[str, bytes] = {}

    def seeds(self) -> list[bytes]:
        return [bytes([i]) + content for i, content in enumerate(self.files.values())]

    def refused(self, data: bytes) -> bool:
        return False

    def chosen(self, data: bytes) -> str:
        """The name of the file that the input replaces."""
        return list(self.files)[(data[0] if data else 0) % len(self.files)]

    def write(self, data: bytes) -> Path:
        """Write all files, one of them replaced; returns its path."""
        name = self.chosen(data)
        for each, content in self.files.items():
            (self.folder / each).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / each).write_bytes(data[1:] if each == name else content)
        return self.folder / name

    def names(self, data: bytes, message: str) -> bool:
        return str(self.folder) in message


def tiny_run(folder: Path, **train: Any) -> RunConfig:
    """A run of a tiny model over a text of bytes."""
    (folder / "text").write_text(TEXT * 8, encoding="utf-8")
    return RunConfig(
        model=ModelConfig(
            vocab_size=256, n_layer=2, d_model=8, n_head=2, d_head=4, d_inner=8, mem_len=4
        ),
        data=DataConfig(name="text", path=str(folder / "text"), cache_dir=str(folder / "cache")),
        train=TrainConfig(
            batch_size=2, tgt_len=4, max_step=4, eval_batch_size=2, eval_tgt_len=4, **train
        ),
        evaluate=EvaluateConfig(batch_size=2, tgt_len=4, mem_len=4),
    )


class TokenFiles(_Folder):
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


class _Checkpoint(_Folder):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.config = tiny_run(self.folder)
        self.corpus = open_corpus(self.config.data)
        self.trainer = Trainer(self.config, self.corpus, join_processes())
        self.trainer.advance()
        self.trainer.advance()
        saved = self.folder / "last"
        self.trainer.save(saved)
        self.files = {f"last/{path.name}": path.read_bytes() for path in sorted(saved.iterdir())}


class Checkpoints(_Checkpoint):
    """A checkpoint as `generate` and `evaluate` open it."""

    name = "checkpoint"

    def read(self, data: bytes) -> None:
        self.write(data)
        loaded = LoadedModel.open(self.folder / "last", torch.device("cpu"))
        loaded.vocabulary.first_tokens()
        tokens = torch.zeros(1, 3, dtype=torch.int64)
        for token in generation.generate(loaded.model, tokens, 2):
            loaded.vocabulary.decode([int(token)])


class TrainerStates(_Checkpoint):
    """A checkpoint as `train --resume` opens it."""

    name = "trainer"

    def read(self, data: bytes) -> None:
        self.write(data)
        saved = open_checkpoint(self.folder / "last")
        self.trainer.restore(saved)
        changes.since(saved, self.config, self.trainer.schedule)
        with contextlib.suppress(FloatingPointError):
            self.trainer.advance()
            self.trainer.mean_loss()


class Vocabularies(_Folder):
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


class Tokenizers(_Folder):
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


class Configurations(_Folder):
    """YAML of a preset, and FIELD=VALUE arguments."""

    name = "config"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        preset = configuration.load_preset("wt103_base")
        self.base = preset
        self.files = {
            "preset.json": json.dumps(configuration.to_dict(preset)).encode(),
            "preset.yaml": yaml.safe_dump(configuration.to_dict(preset)).encode(),
            "arguments": b"train.lr=1e-3\nmodel.cutoffs=20000,40000,200000\ndata.path=none\n"
            b"model.tie_weight=true\ntrain.scheduler=constant\nevaluate.mem_len=64\n",
        }

    def read(self, data: bytes) -> None:
        text = data[1:].decode("utf-8", "surrogateescape")
        if self.chosen(data) == "arguments":
            pairs = (line.partition("=") for line in text.splitlines())
            found = configuration.override(self.base, {name: value for name, _, value in pairs})
        else:
            try:
                tree = yaml.safe_load(text)
            except (yaml.YAMLError, ValueError, RecursionError):
                return  # PyYAML's own errors: presets are files of this package
            found = configuration.from_dict(tree)
        assert configuration.from_dict(configuration.to_dict(found)) == found
        configuration.differences(found, self.base)

    def names(self, data: bytes, message: str) -> bool:
        return True  # fields are named instead of a file


class Archives(_Folder):
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


class Texts(_Folder):
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


class Logs(_Folder):
    """The log of a run, which `train --resume` reads and cuts."""

    name = "log"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        entries = [
            {"step": 1, "tokens": 8, "train_loss": 5.5, "lr": 0.001, "tokens_per_second": 9.0},
            {"step": 2, "tokens": 16, "valid_loss": 5.0, "protocol": "as trained"},
            {"step": 3, "tokens": 24, "train_loss": None, "lr": 0.001, "tokens_per_second": 9.0},
        ]
        self.files = {report.LOG: "".join(json.dumps(e) + "\n" for e in entries).encode()}

    def read(self, data: bytes) -> None:
        path = self.write(data)
        report._cut_log(path, 2, validation_due=True)
        entries = report.read_log(path.parent)
        assert all(entry["step"] <= 2 for entry in entries)
        if len(entries) % 16 == 3:  # a picture takes as long as a hundred logs
            report.plot_curves(path.parent / "curve.png", {"run": entries}, "bpc", "run")


class Records(_Folder):
    """Records of verified GPU kernels: a damaged one is ignored with a warning that names it."""

    name = "record"
    errors = (RuntimeWarning,)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        content = {"version": records.VERSION, "device": "a GPU", "kernel": "forward"}
        self.files = {"transformer-xl/verified/a_GPU/0123.json": json.dumps(content).encode()}

    def read(self, data: bytes) -> None:
        self.write(data)
        records._passed.clear()
        folder = self.folder / "transformer-xl" / "verified"
        place = records.cache_folder
        try:
            records.cache_folder = lambda: folder
            records.is_verified("a GPU", "0123")
        finally:
            records.cache_folder = place


FORMATS: dict[str, Callable[[Path], Format]] = {
    each.name: each
    for each in (
        TokenFiles,
        Checkpoints,
        TrainerStates,
        Vocabularies,
        Tokenizers,
        Configurations,
        Archives,
        Texts,
        Logs,
        Records,
    )
}
