"""The interpreters that the wheel has a module `_C` for."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MINORS = range(10, 15)  # 3.10 to 3.14
_QUESTION = """
import pathlib, sys, sysconfig
headers = pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()
print(sys.implementation.name, sys.version_info[1], sysconfig.get_config_var("SOABI"), headers)
"""


class Python(NamedTuple):
    """An interpreter: its path, the 11 of Python 3.11, the tag of its modules' file names."""

    path: str
    minor: int
    abi: str


def named(paths: list[str]) -> list[Python]:
    """The interpreters at these paths, or with these names on PATH.

    Raises:
        SystemExit: one does not run, is not supported, or a version appears twice.
    """
    pythons = []
    for path in paths:
        python = _ask(path)
        if python is None:
            raise SystemExit(
                f"wheels: --python must be CPython 3.{MINORS[0]} to 3.{MINORS[-1]} with its "
                f"headers, which {path} is not, or it does not run"
            )
        pythons.append(python)
    minors = [python.minor for python in pythons]
    if len(set(minors)) != len(minors):
        raise SystemExit(f"wheels: --python has a version twice: {' '.join(paths)}")
    return sorted(pythons, key=lambda python: python.minor)


def found() -> list[Python]:
    """An interpreter of each supported version, from PATH or pyenv; prints which are missing."""
    pythons = []
    for minor in MINORS:
        answers = (_ask(path) for path in _candidates(minor))
        python = next((answer for answer in answers if answer and answer.minor == minor), None)
        if python is not None:
            pythons.append(python)
        else:
            print(f"no Python 3.{minor} was found: the wheel has no _C for it, only the kernels")
    if not pythons:
        raise SystemExit("wheels: no supported Python with headers was found; use --python")
    return pythons


def _candidates(minor: int) -> Iterator[str]:
    on_path = shutil.which(f"python3.{minor}")
    if on_path:
        yield on_path
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for path in sorted(pyenv.glob(f"versions/3.{minor}.*/bin/python3.{minor}"), reverse=True):
        yield str(path)


def _ask(path: str) -> Python | None:
    """An interpreter that runs, is supported and has its headers; otherwise None."""
    try:
        answer = subprocess.run([path, "-c", _QUESTION], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    name, minor, abi, headers = answer.stdout.split()
    if name != "cpython" or int(minor) not in MINORS or headers != "True":
        return None
    # CMake ignores a path that is not absolute, and searches for another interpreter.
    return Python(str(Path(shutil.which(path) or path).absolute()), int(minor), abi)
