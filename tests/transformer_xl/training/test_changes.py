"""What a resumed run tells: changed fields, the learning rate, and who else is in the folder."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from transformer_xl.checkpoint import CheckpointError, open_checkpoint
from transformer_xl.config import RunConfig, override
from transformer_xl.data.files import locked
from transformer_xl.training import train
from transformer_xl.training.processes import LOCK


def shown(config: RunConfig, out: Path, resume: Path | None = None) -> list[str]:
    console = Console(file=io.StringIO(), width=60)
    train(config, out, resume=resume, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    return override(tiny_config, {"train.max_step": 8, "train.eval_interval": 8})


def test_changed_fields_and_learning_rates_are_printed(config: RunConfig, tmp_path: Path) -> None:
    first = shown(config, tmp_path / "run")
    assert not any("->" in line for line in first)
    changed = override(config, {"train.max_step": 12, "train.lr": 0.02, "evaluate.mem_len": 9})
    lines = shown(changed, tmp_path / "run", resume=tmp_path / "run")
    assert [line for line in lines if "->" in line] == [
        "train.max_step: 8 -> 12",
        "train.lr: 0.01 -> 0.02",
        "evaluate.mem_len: 24 -> 9",
        # Cosine: 0 at the end of 8 steps; 5/8 of the way from step 4 to step 12.
        "learning rate of step 9: 0 -> 0.006173",
    ]


def test_nothing_is_printed_where_nothing_changed(config: RunConfig, tmp_path: Path) -> None:
    shown(config, tmp_path / "run")
    lines = shown(config, tmp_path / "run", resume=tmp_path / "run")
    assert not any("->" in line for line in lines)
    changed = override(config, {"train.log_interval": 2})
    lines = shown(changed, tmp_path / "run", resume=tmp_path / "run")
    assert [line for line in lines if "->" in line] == ["train.log_interval: 1 -> 2"]


def test_a_second_process_in_the_folder_is_refused(config: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with ThreadPoolExecutor() as pool, locked(out / LOCK):
        running = pool.submit(shown, config, out)
        with pytest.raises(CheckpointError, match=r"another process trains in .*run; wait"):
            running.result(120)
    shown(config, out)
    assert not (out / LOCK).exists()


def test_a_run_in_a_new_folder_begins_with_the_best_checkpoint(
    config: RunConfig, tmp_path: Path
) -> None:
    shown(config, tmp_path / "first")
    before = open_checkpoint(tmp_path / "first" / "best")
    worse = override(config, {"train.max_step": 10, "train.lr": 30.0, "train.clip": 0.0})
    shown(worse, tmp_path / "second", resume=tmp_path / "first")
    after = open_checkpoint(tmp_path / "second" / "best")
    assert (after.step, after.state) == (8, before.state)
    shown(config, tmp_path / "third", resume=before.path)
    assert open_checkpoint(tmp_path / "third" / "best").state == before.state


def test_the_best_checkpoint_of_another_run_is_not_copied(
    config: RunConfig, tmp_path: Path
) -> None:
    short = override(config, {"train.max_step": 2})
    for seed, name in enumerate(("first", "other")):
        shown(override(short, {"train.seed": seed}), tmp_path / name)
    (tmp_path / "first" / "best").rename(tmp_path / "gone")
    (tmp_path / "other" / "best").rename(tmp_path / "first" / "best")
    shown(short, tmp_path / "second", resume=tmp_path / "first")
    assert not (tmp_path / "second" / "best").exists()
