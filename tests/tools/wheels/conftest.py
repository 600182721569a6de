"""Stand-ins for compiled files: tiny shared libraries with chosen names and symbols."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def compile_library() -> Callable[..., Path]:
    """Compiles C++ to a stripped shared library whose symbols are hidden."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")

    def compile_(path: Path, source: str, *options: str, strip: bool = True) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        command = ["g++", "-x", "c++", "-shared", "-fPIC", "-fvisibility=hidden", "-o", str(path)]
        subprocess.run(
            [*command, *(["-s"] if strip else []), "-", *options],
            input='#define VISIBLE __attribute__((visibility("default")))\n' + source,
            text=True,
            check=True,
        )
        return path

    return compile_
