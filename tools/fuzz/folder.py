"""A folder of small valid files, of which each input replaces one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformer_xl.config import DataConfig, EvaluateConfig, ModelConfig, RunConfig, TrainConfig

TEXT = "the memory of one segment\nis what the next one reads é ☃\r\n\nfirst <unk>\n" * 4


class Folder:
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
