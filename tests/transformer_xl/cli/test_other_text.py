"""A checkpoint reads other text with its own vocabulary, in `evaluate` and in fine-tuning."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from transformer_xl import training
from transformer_xl.checkpoint import open_checkpoint
from transformer_xl.cli.app import app
from transformer_xl.config import RunConfig, override

OTHER = "the memory of a zebra is one segment\r\n" * 400


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def trained(tiny_config: RunConfig, tmp_path: Path) -> Path:
    config = override(
        tiny_config, {"data.tokenizer": "word", "train.max_step": 2, "model.vocab_size": 12}
    )
    training.train(config, tmp_path / "words")
    return tmp_path / "words"


@pytest.fixture
def other(tmp_path: Path) -> list[str]:
    (tmp_path / "other.txt").write_text(OTHER, newline="")
    return [f"data.path={tmp_path}/other.txt", f"data.cache_dir={tmp_path}/cache"]


def test_evaluate_counts_unknown_words(trained: Path, other: list[str]) -> None:
    result = run("evaluate", trained, *other)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "V = 12 (a checkpoint's vocabulary), 40 unknown words read as <unk>" in shown
    assert "unknown" not in run("evaluate", trained).stdout


def test_fine_tuning_and_resuming_keep_the_vocabulary(
    trained: Path, other: list[str], tiny_config: RunConfig, tmp_path: Path
) -> None:
    small = ("train.batch_size=2", "train.tgt_len=8", "train.eval_batch_size=2")
    lengths = ("train.eval_tgt_len=8", "evaluate.batch_size=2", "evaluate.tgt_len=8")
    model = [f"model.{name}={getattr(tiny_config.model, name)}" for name in MODEL]
    arguments = ("train", "demo", *model, "data.name=text", *other, *small, *lengths)
    tuned = tmp_path / "tuned"
    result = run(*arguments, "train.max_step=2", "--init-from", trained, "--out", tuned)
    assert result.exit_code == 0, result.output
    vocabulary = open_checkpoint(trained).vocabulary.to_dict()
    assert open_checkpoint(tuned).vocabulary.to_dict() == vocabulary
    assert re.search(r"720 unknown words read as <unk>", " ".join(result.stdout.split()))
    result = run("train", "train.max_step=3", "--resume", tuned)
    assert result.exit_code == 0, result.output
    assert open_checkpoint(tuned).step == 3
    assert open_checkpoint(tuned).vocabulary.to_dict() == vocabulary


MODEL = ("n_layer", "d_model", "n_head", "d_head", "d_inner", "mem_len", "dropout")


def test_another_kind_of_token_cannot_be_requested(trained: Path, other: list[str]) -> None:
    result = run("evaluate", trained, *other, "data.tokenizer=char")
    assert result.exit_code == 2
    assert "has another vocabulary: data.tokenizer: expected 'dataset' or 'word', got 'char'" in (
        " ".join(result.stderr.split())
    )
