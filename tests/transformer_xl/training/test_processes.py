"""Two processes that split the streams train as one with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from transformer_xl.config import RunConfig, override
from transformer_xl.training import train
from transformer_xl.training.report import read_log

# accelerate starts several processes on a CPU only through MPI, or when told that they have GPUs.
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--main_process_port", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ],
}


def launch(launcher: str, *arguments: str) -> None:
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "transformer_xl.cli", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def losses(out: Path, kind: str) -> list[float]:
    return [entry[kind] for entry in read_log(out) if kind in entry]


def test_two_processes_give_the_loss_of_one(
    tmp_path: Path, tiny_config: RunConfig, train_arguments: Callable[[RunConfig, Path], list[str]]
) -> None:
    """20 steps: ten under torchrun, ten resumed under accelerate launch."""
    config = override(
        tiny_config,
        {"train.max_step": 20, "train.scheduler": "constant", "train.eval_interval": 10},
    )
    train(config, tmp_path / "one")
    out = tmp_path / "two"
    launch("torchrun", *train_arguments(override(config, {"train.max_step": 10}), out))
    launch("accelerate", "train.max_step=20", "--resume", str(out))
    assert losses(out, "train_loss") == pytest.approx(
        losses(tmp_path / "one", "train_loss"), abs=1e-5
    )
    assert losses(out, "valid_loss") == pytest.approx(
        losses(tmp_path / "one", "valid_loss"), abs=1e-5
    )
    files = {path.name for path in (out / "last").glob("rank-*")}
    assert files == {"rank-0.safetensors", "rank-1.safetensors"}
