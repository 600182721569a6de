"""A run that is killed at a random moment and resumed equals an uninterrupted run."""

from __future__ import annotations

import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from transformer_xl.checkpoint import CheckpointError, open_checkpoint
from transformer_xl.config import RunConfig, override
from transformer_xl.training import train
from transformer_xl.training.report import read_log


def train_losses(out: Path) -> list[tuple[int, float]]:
    return [(e["step"], e["train_loss"]) for e in read_log(out) if "train_loss" in e]


MAIN = [sys.executable, "-m", "transformer_xl.cli", "train"]
Arguments = Callable[[RunConfig, Path], list[str]]


def kill_at_step(arguments: list[str], out: Path, step: int) -> None:
    """Starts a run and kills it after it has logged `step`, at any point of a later step."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        while not any(entry["step"] >= step for entry in read_log(out)):
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def test_killed_and_resumed_is_bit_identical(
    tmp_path: Path, tiny_config: RunConfig, train_arguments: Arguments
) -> None:
    config = override(
        tiny_config,
        {"model.dropout": 0.1, "train.max_step": 150, "train.checkpoint_interval": 3},
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished = train(config, whole)
    assert finished.step == 150
    moment = random.randrange(6, 55)
    print(f"killed after step {moment}")
    kill_at_step([*MAIN, *train_arguments(config, killed)], killed, moment)
    assert 6 <= max(entry["step"] for entry in read_log(killed)) < 150
    resumed = train(config, killed, resume=killed)
    assert resumed.step == 150
    assert train_losses(killed) == train_losses(whole)
    assert resumed.best_loss == finished.best_loss


def test_interrupt_stops_after_the_step_with_a_checkpoint(
    tmp_path: Path, tiny_config: RunConfig, train_arguments: Arguments
) -> None:
    config = override(tiny_config, {"train.max_step": 5000, "train.checkpoint_interval": 5000})
    arguments = train_arguments(config, tmp_path / "run")
    process = subprocess.Popen([*MAIN, *arguments], stdout=subprocess.PIPE, text=True)
    while not read_log(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped after step" in shown
    assert "--resume" in shown
    assert (tmp_path / "run" / "last" / "state.json").exists()


@pytest.mark.slow
def test_a_closed_terminal_stops_the_run_with_a_checkpoint(
    tmp_path: Path, tiny_config: RunConfig, train_arguments: Arguments
) -> None:
    """The kernel sends SIGHUP, and every later output to the terminal fails."""
    config = override(tiny_config, {"train.max_step": 5000, "train.checkpoint_interval": 5000})
    arguments = [*MAIN, *train_arguments(config, tmp_path / "run")]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if these tests run under nohup
        os.execv(arguments[0], arguments)
    while not read_log(tmp_path / "run"):
        os.read(terminal, 1 << 16)
    os.close(terminal)
    os.waitpid(pid, 0)
    saved = open_checkpoint(tmp_path / "run")
    assert read_log(tmp_path / "run")[-1]["step"] == saved.step < 5000


def test_a_run_is_not_overwritten(tmp_path: Path, tiny_config: RunConfig) -> None:
    config = override(tiny_config, {"train.max_step": 1})
    train(config, tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds a run already"):
        train(config, tmp_path / "run")


def test_fine_tuning_begins_with_the_weights_alone(tmp_path: Path, tiny_config: RunConfig) -> None:
    train(tiny_config, tmp_path / "first")
    again = override(tiny_config, {"model.mem_len": 4, "train.max_step": 1})
    train(again, tmp_path / "second", init_from=tmp_path / "first")
    last, tuned = train_losses(tmp_path / "first")[-1], train_losses(tmp_path / "second")[0]
    assert tuned[0] == 1
    assert tuned[1] < last[1] + 0.5 < 4.5  # an untrained model has ln 256 = 5.5


def test_fine_tuning_needs_the_same_vocabulary(tmp_path: Path, tiny_config: RunConfig) -> None:
    one_step = override(tiny_config, {"train.max_step": 1})
    train(one_step, tmp_path / "bytes")
    characters = override(one_step, {"data.tokenizer": "char"})
    with pytest.raises(CheckpointError, match="has another vocabulary"):
        train(characters, tmp_path / "characters", init_from=tmp_path / "bytes")


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, tiny_config: RunConfig) -> None:
    config = override(tiny_config, {"train.lr": 1e6, "train.clip": 0, "train.warmup_step": 0})
    with pytest.raises(FloatingPointError, match=r"the training loss is (nan|inf) at step"):
        train(override(config, {"model.init_std": 1e18}), tmp_path / "run")
