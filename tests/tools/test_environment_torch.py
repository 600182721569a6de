"""The Makefile's checks of the torch that `make test TORCH=…` installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import environment_torch

ROOT = Path(__file__).resolve().parents[2]
METADATA = """Name: torch
Version: 2.15.0
Requires-Dist: filelock
Requires-Dist: cuda-bindings<14,>=13.0.3; platform_system == "Linux"
Requires-Dist: nvidia-nccl-cu13==2.30.7; platform_system == "Linux"
Requires-Dist: triton~=3.9.0; platform_system == "Linux"
Requires-Dist: sympy>=1.13.3
"""
# Stands for the environment's Python: writes down pip's arguments, and installs a version of torch.
PYTHON = """#!/bin/sh
case "$*" in
  *" install "*) printf '[%s]' "$@" >> "$LOG"; echo "$INSTALLS" > "$VERSION" ;;
  *) exec "{python}" -c '
import sys, pathlib
sys.path.insert(0, "{root}")
from tools import environment_torch as module
module.installed = lambda: pathlib.Path("{version}").read_text().strip() or None
module.import_error = lambda *_: None
module.remove_requirements = lambda *_: None
sys.exit(module.main(sys.argv[2]))' "$@" ;;
esac
"""


@pytest.mark.parametrize(
    ("version", "arguments", "error"),
    [
        ("2.11.0", "torch==2.11.0", None),
        ("2.13.0+cpu", "torch==2.13.0", None),
        ("2.15.0", "--no-deps torch==2.15.0 nvidia-cublas==13.4", None),
        ("2.15.0", "'torch>=2.11' numpy==2.0", None),
        ("3.0.0", "", None),
        (
            "2.10.1+cpu",
            "torch==2.10.1",
            "torch 2.10.1+cpu is not supported: expected 2.11 or newer",
        ),
        ("1.13.0", "", "torch 1.13.0 is not supported"),
        (
            "2.13.0+cpu",
            "torch==2.15.0",
            "/env has torch 2.13.0+cpu, but TORCH= requires torch 2.15.0",
        ),
        (None, "numpy", "TORCH='numpy' installs no torch: expected torch>=2.11"),
    ],
)
def test_a_version_gives_one_sentence(version, arguments, error):
    actual = environment_torch.version_error(version, arguments, Path("/env"))
    if error is None:
        assert actual is None
    else:
        assert actual.startswith(error)
        assert "\n" not in actual


def test_a_torch_that_does_not_load_gives_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    error = environment_torch.import_error("2.15.0", Path("/env"))
    assert error.startswith(
        "torch 2.15.0 does not load (ImportError: libcudart.so.13: cannot open)"
    )
    assert "\n" not in error


def test_requirements_of_cuda_and_of_a_triton_are_removed(monkeypatch, tmp_path):
    info = tmp_path / "site" / "torch-2.15.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(str(info.parent))
    environment_torch.remove_requirements(tmp_path / "another")
    assert (info / "METADATA").read_text() == METADATA
    environment_torch.remove_requirements(tmp_path)
    kept = [line for line in METADATA.splitlines() if "filelock" in line or "sympy" in line]
    assert (info / "METADATA").read_text().splitlines()[2:] == kept


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("option", "installs", "error"),
    [
        ("--no-deps torch==2.15.0 'nvidia-cublas>=13'", "2.15.0", None),
        ("torch==2.10.0", "2.10.0", "torch 2.10.0 is not supported: expected 2.11 or newer"),
    ],
)
def test_make_passes_every_argument_to_pip(option, installs, error, tmp_path):
    checkout = tmp_path / "a check out"
    python = checkout / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (checkout / "csrc").mkdir()
    version, log = tmp_path / "version", tmp_path / "log"
    version.write_text("")
    python.write_text(PYTHON.format(python=sys.executable, root=ROOT, version=version))
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", checkout)
    done = subprocess.run(
        ["make", "torch", "VENV=venv", f"TORCH={option}"],
        cwd=checkout,
        env={
            **os.environ,
            "LOG": str(log),
            "VERSION": str(version),
            "INSTALLS": installs,
        },
        capture_output=True,
        text=True,
    )
    assert log.read_text().endswith(
        "[install]" + "".join(f"[{x}]" for x in option.replace("'", "").split())
    )
    if error is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        (line,) = [line for line in done.stderr.splitlines() if "supported" in line]
        assert line.startswith(error)
