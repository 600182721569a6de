"""Two processes stop together between logged steps, and one waits for the other's encoding."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from transformer_xl.checkpoint import open_checkpoint
from transformer_xl.config import RunConfig, override

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# Runs the command; collectives fail after 3 s if the encoding is slow. After each step a process
# creates a file whose name contains its rank and its id.
TRAIN = """
import os, pathlib, sys, time
from torch.distributed import distributed_c10d
from transformer_xl.data import corpus
from transformer_xl.training.trainer import Trainer
from transformer_xl import cli
from datetime import timedelta

seconds = float(os.environ["ENCODING_SECONDS"])
if seconds:
    distributed_c10d.default_pg_timeout = timedelta(seconds=3)
encode, advance = corpus.encode, Trainer.advance

def slow(*arguments):
    print("encoding", flush=True)
    time.sleep(seconds)
    return encode(*arguments)

def advanced(trainer):
    advance(trainer)
    pathlib.Path(os.environ["MARKS"], f"{os.environ['RANK']}-{os.getpid()}").touch()

corpus.encode, Trainer.advance = slow, advanced
sys.argv[0] = "transformer-xl"
cli.main()
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command under torchrun, and kills it at the end of the test."""
    script, marks = tmp_path / "train.py", tmp_path / "marks"
    script.write_text(TRAIN)
    marks.mkdir()
    processes = []

    def start(*arguments: str, encoding_seconds: float = 0) -> subprocess.Popen[str]:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "MARKS": str(marks),
            "ENCODING_SECONDS": str(encoding_seconds),
        }
        command = [sys.executable, "-m", *TORCHRUN, str(script), "train", *arguments]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def trained(process: subprocess.Popen[str], marks: Path) -> list[int]:
    """Waits until both processes have made a step; returns their ids in the order of ranks."""
    while len(found := sorted(marks.iterdir())) < 2:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    return [int(path.name.split("-")[1]) for path in found]


Arguments = Callable[[RunConfig, Path], list[str]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, "launcher"),
        (signal.SIGINT, "launcher"),
        (signal.SIGTERM, "one process"),  # a process has one handler for both signals
    ],
    ids=["SIGTERM-launcher", "SIGINT-launcher", "SIGTERM-one_process"],
)
def test_they_stop_between_logged_steps_with_a_checkpoint(
    number: signal.Signals,
    to: str,
    started: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    tiny_config: RunConfig,
    train_arguments: Arguments,
) -> None:
    rare = ("train.log_interval", "train.eval_interval", "train.checkpoint_interval")
    config = override(tiny_config, dict.fromkeys((*rare, "train.max_step"), 10**6))
    process = started(*train_arguments(config, tmp_path / "run"))
    ids = trained(process, tmp_path / "marks")
    os.kill(process.pid if to == "launcher" else ids[1], number)
    begun = time.monotonic()
    shown = process.communicate(timeout=120)[0]
    assert time.monotonic() - begun < 25, shown  # torchrun kills after 30 s
    assert "stopped after step" in shown, shown
    found = open_checkpoint(tmp_path / "run")
    assert 0 < found.step < 10**6
    assert [len(found.rank_tensors(rank, 2)) > 1 for rank in (0, 1)] == [True, True]


@pytest.mark.slow
def test_an_encoding_longer_than_the_groups_timeout(
    started: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    tiny_config: RunConfig,
    train_arguments: Arguments,
) -> None:
    cache = tmp_path / "cache"
    config = override(tiny_config, {"train.max_step": 2, "data.cache_dir": str(cache)})
    process = started(*train_arguments(config, tmp_path / "run"), encoding_seconds=8)
    shown = process.communicate(timeout=240)[0]
    assert process.returncode == 0, shown[-3000:]
    assert shown.count("encoding") == 1
    assert open_checkpoint(tmp_path / "run").step == 2
    assert len(list(cache.iterdir())) == 1
