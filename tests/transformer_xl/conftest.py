"""A corpus and a model small enough to train in a test."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from transformer_xl.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60,000 bytes of words in a random order."""
    words = ["the", "memory", "of", "one", "segment", "is", "what", "next", "reads", "first", "\n"]
    drawn = random.Random(0).choices(words, k=12_000)
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text(" ".join(drawn)[:60_000], encoding="utf-8")
    return path


@pytest.fixture
def tiny_config(text_file: Path) -> RunConfig:
    """A run of 24 steps, every one of them logged."""
    return RunConfig(
        model=ModelConfig(
            vocab_size=256,
            n_layer=2,
            d_model=16,
            n_head=2,
            d_head=8,
            d_inner=32,
            mem_len=12,
            dropout=0.0,
        ),
        data=DataConfig(
            name="text",
            path=str(text_file),
            tokenizer="byte",
            cache_dir=str(text_file.parent / "cache"),
        ),
        train=TrainConfig(
            batch_size=4,
            tgt_len=8,
            max_step=24,
            lr=1e-2,
            warmup_step=4,
            eval_batch_size=4,
            eval_tgt_len=8,
            eval_interval=12,
            log_interval=1,
            checkpoint_interval=4,
        ),
        evaluate=EvaluateConfig(batch_size=4, tgt_len=8, mem_len=24),
    )


@pytest.fixture
def heeded(number: signal.Signals) -> Iterator[None]:
    """The default action of a signal; `nohup` and shells may have made this process ignore it."""
    before = signal.getsignal(number)
    if before is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
    yield
    signal.signal(number, before)
