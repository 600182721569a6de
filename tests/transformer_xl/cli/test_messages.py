"""Messages that tell a user what to write instead."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from transformer_xl.cli.app import app
from transformer_xl.config import DataConfig, RunConfig, override, preset_names
from transformer_xl.data import open_corpus
from transformer_xl.training import Trainer, join_processes


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"transformer-xl {metadata.version('transformer-xl')}\n"


def test_the_help_of_train_lists_the_presets() -> None:
    words = run("train", "--help").stdout.replace("│", " ").split()
    assert set(preset_names()) <= {word.strip(",.") for word in words}


@pytest.mark.parametrize(
    ("argument", "option"),
    [
        ("tgt_len=16", "--tgt-len 16"),
        ("batch_size=3", "--batch-size 3"),
        ("split=valid", "--split valid"),
        ("same_length=true", "--same-length"),
        ("same_length=false", "--no-same-length"),
        ("precision=bf16", "--precision bf16"),
    ],
)
def test_an_option_of_evaluate_given_as_a_field_is_explained(argument: str, option: str) -> None:
    result = run("evaluate", "nowhere", argument)
    assert result.exit_code == 2
    assert result.stderr.rstrip().endswith(
        f"error {argument}: this is an option of evaluate; write {option}"
    )


def test_a_field_without_its_section_is_explained() -> None:
    assert "unknown field 'lr': expected SECTION.FIELD, such as train.lr" in (
        run("train", "demo", "lr=1").stderr
    )
    assert "such as train.tgt_len or evaluate.tgt_len" in run("train", "demo", "tgt_len=1").stderr


def test_same_length_without_memory_names_its_option(tiny_config: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"same_length: expected mem_len > 0 .*--no-same-length"):
        override(tiny_config, {"evaluate.same_length": True, "evaluate.mem_len": 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train.batch_size": 60_000},
            "train split of text: .* lower train.batch_size or train.tgt_len",
        ),
        (
            {"train.eval_batch_size": 3_000},
            "valid split of text: .* lower train.eval_batch_size or train.eval_tgt_len",
        ),
        (
            {"train.eval_batch_size": 3_000, "model.mem_len": 0},
            "valid split of text: .* lower train.eval_batch_size or train.tgt_len",
        ),
        (
            {"evaluate.batch_size": 3_000},
            "test split of text: .* lower evaluate.batch_size or evaluate.tgt_len",
        ),
    ],
)
def test_a_text_that_is_too_short_is_named_by_split_and_field(
    tiny_config: RunConfig, changes: dict[str, object], message: str
) -> None:
    config = override(tiny_config, changes)
    with pytest.raises(ValueError, match=f"{message}, or use more text"):
        Trainer(config, open_corpus(config.data), join_processes())


def test_too_few_sentences_are_named_by_split_and_field(tmp_path: Path) -> None:
    shards = tmp_path / "training-monolingual.tokenized.shuffled"
    heldout = tmp_path / "heldout-monolingual.tokenized.shuffled"
    shards.mkdir()
    heldout.mkdir()
    for number in range(1, 100):
        (shards / f"news.en-{number:05}-of-00100").write_text("a b\n")
    (heldout / "news.en.heldout-00000-of-00050").write_text("a b\n")
    (tmp_path / "1b_word_vocab.txt").write_text("<S>\n<UNK>\na\nb\n")
    config = DataConfig(name="lm1b", path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    corpus = open_corpus(config)
    with pytest.raises(ValueError, match=r"train split of lm1b: .*99 sentences.*lower a or b"):
        corpus.batches("train", 99, 16, seed=1, fields=("a", "b"))
