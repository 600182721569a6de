"""Patched models under DDP, FSDP and FSDP2, in two processes each."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "transformers", minversion="5.24", reason="make test-dropins installs it and runs these tests"
)

OTHERS = ["nemo-full", "nemo-local", "espnet"]
PROCESSES = Path(__file__).with_name("processes.py")


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "fsdp2"])
def test_two_processes_train_every_class_as_one(models, wrapper):
    names = [name for name in models.cases if not name.endswith("-eager")]
    names += [name for name in OTHERS if importlib.util.find_spec(name.partition("-")[0])]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(PROCESSES), wrapper, *names],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # ESPnet prints other lines when it is imported.
    assert [line for line in done.stdout.splitlines() if line in names] == names
