"""Errors that a run would meet after hours are raised before its corpus is encoded or its first
step is taken, and no run replaces another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from transformer_xl.checkpoint import CheckpointError, open_checkpoint
from transformer_xl.config import RunConfig, override
from transformer_xl.training import train
from transformer_xl.training.trainer import Trainer, validation_lengths


@pytest.fixture
def short(tiny_config: RunConfig) -> RunConfig:
    """Two steps, the first of them the best."""
    return override(
        tiny_config, {"train.max_step": 2, "train.eval_interval": 1, "train.max_eval_steps": 1}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.same_length": True, "train.eval_tgt_len": 20},
            r"train.eval_tgt_len: expected fewer than 20 tokens .* got 20",
        ),
        ({"model.same_length": True, "train.eval_tgt_len": 64}, "train.eval_tgt_len"),
        ({"train.batch_chunk": 5}, "batch_chunk"),
    ],
)
def test_settings_that_must_fail_are_refused_before_encoding(
    tmp_path: Path, short: RunConfig, changes: dict[str, object], message: str
) -> None:
    cache = tmp_path / "cache"
    config = override(short, {"data.cache_dir": str(cache), **changes})
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "out")
    assert not cache.exists()


def test_same_length_may_leave_validation_one_token_of_memory(short: RunConfig) -> None:
    config = override(short, {"model.same_length": True, "train.eval_tgt_len": 19})
    assert validation_lengths(config)[1].mem_len == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"train.eval_tgt_len": 5_000},
        {"train.eval_batch_size": 2_000},
        {"evaluate.tgt_len": 5_000},
        {"evaluate.batch_size": 2_000},
        {"evaluate.batch_size": 2_000, "evaluate.split": "valid"},
    ],
    ids=str,
)
def test_a_split_too_short_to_score_is_refused_before_the_first_step(
    tmp_path: Path, short: RunConfig, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    monkeypatch.setattr(Trainer, "advance", lambda self: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match="shorter than one segment"):
        train(override(short, changes), tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_resuming_into_the_folder_of_another_run_is_refused(
    tmp_path: Path, short: RunConfig
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(short, first)
    train(short, second)
    before = contents(second)
    for held in ("'last' of step 2 and 'best' of step 2", "'best' of step 2"):
        with pytest.raises(CheckpointError, match="second holds a run already") as caught:
            train(override(short, {"train.max_step": 3}), second, resume=first)
        assert f"({held})" in str(caught.value)
        assert f"resuming {first / 'last'} would replace" in str(caught.value)
        assert contents(second) == before
        shutil.rmtree(second / "last", ignore_errors=True)
        before = contents(second)


def test_resuming_an_earlier_checkpoint_keeps_later_steps(tmp_path: Path, short: RunConfig) -> None:
    train(short, tmp_path)
    shutil.copytree(tmp_path / "last", tmp_path / "kept")
    longer = override(short, {"train.max_step": 4, "train.eval_interval": 50})
    train(longer, tmp_path, resume=tmp_path)
    shutil.rmtree(tmp_path / "best")  # the validation of step 4 may have replaced it
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a run already \('last' of step 4\)"):
        train(longer, tmp_path, resume=tmp_path / "kept")
    assert contents(tmp_path) == before
    train(longer, tmp_path / "other", resume=tmp_path / "kept")
    assert open_checkpoint(tmp_path / "other").step == 4


def test_a_folder_by_another_name_is_the_same_folder(
    tmp_path: Path, short: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(short, tmp_path / "run")
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path / "run")
    longer = override(short, {"train.max_step": 3})
    train(longer, tmp_path / "link", resume=Path("last"))
    assert open_checkpoint(tmp_path / "run").step == 3


def test_a_new_run_does_not_replace_a_best_checkpoint(tmp_path: Path, short: RunConfig) -> None:
    train(short, tmp_path)
    shutil.rmtree(tmp_path / "last")
    with pytest.raises(CheckpointError, match=r"holds a run already \('best' of step \d\)"):
        train(short, tmp_path)
