"""`make wheel` installs and tests the package in a checkout whose path has spaces."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Creates the files that the commands of `make wheel` would create, and writes a line for each call.
PYTHON = """#!/bin/sh
printf '[%s]' "$@" >> "$LOG"; echo >> "$LOG"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  *build_sdist*) mkdir -p build/wheel; touch build/wheel/transformer_xl-0.tar.gz ;;
esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_wheel_is_tested_in_a_path_with_spaces(tmp_path):
    checkout = tmp_path / "a check out"
    python = checkout / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (checkout / "csrc").mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", checkout)
    command = ["make", "-o", "venv/.installed-dev", "wheel", "VENV=venv", "PYTHON=venv/bin/python"]
    log = tmp_path / "log"
    done = subprocess.run(
        command, cwd=checkout, env={**os.environ, "LOG": str(log)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *_, install, smoke = log.read_text().splitlines()
    assert "[--no-cache-dir]" in install
    assert install.endswith("[build/wheel/transformer_xl-0.tar.gz]")
    assert smoke.endswith(f"[{checkout}/tests/packaging/smoke.py]")
