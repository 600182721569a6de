"""Formats that a run writes or is configured by: how the commands read each."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch
import yaml

from tools.fuzz.folder import Folder, tiny_run
from transformer_xl import config as configuration
from transformer_xl import config_fields, generation
from transformer_xl.checkpoint import open_checkpoint
from transformer_xl.cli.loading import LoadedModel
from transformer_xl.data import open_corpus
from transformer_xl.key_value_window import KeyValueWindow
from transformer_xl.model import TransformerXL
from transformer_xl.training import changes, report
from transformer_xl.training.processes import join_processes
from transformer_xl.training.trainer import Trainer
from txl_kernels.backends.verification import records


class _Checkpoint(Folder):
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


class Windows(Folder):
    """A `KeyValueWindow` in a file, and a segment that follows it."""

    name = "window"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch.manual_seed(0)
        self.model = TransformerXL(tiny_run(self.folder).model).eval().requires_grad_(False)
        self.tokens = torch.zeros(2, 3, dtype=torch.int64)
        window = KeyValueWindow.empty(self.model, 2)
        with torch.no_grad():
            self.model(self.tokens, window)
        window.save(self.folder / "window")
        self.files = {"window": (self.folder / "window").read_bytes()}

    def read(self, data: bytes) -> None:
        window = KeyValueWindow.load(self.write(data), self.model)
        with torch.no_grad():
            self.model(self.tokens, window)


class Configurations(Folder):
    """YAML of a preset, and FIELD=VALUE arguments."""

    name = "config"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        preset = configuration.load_preset("wt103_base")
        self.base = preset
        self.files = {
            "preset.json": json.dumps(config_fields.to_dict(preset)).encode(),
            "preset.yaml": yaml.safe_dump(config_fields.to_dict(preset)).encode(),
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
        assert configuration.from_dict(config_fields.to_dict(found)) == found
        config_fields.differences(found, self.base)

    def names(self, data: bytes, message: str) -> bool:
        return True  # fields are named instead of a file


class Logs(Folder):
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


class Records(Folder):
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
