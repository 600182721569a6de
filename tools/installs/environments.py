"""Environments that have pip and the torch of another environment, without downloading torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

# Prints the versions, and the files and folders of torch and of the packages that it requires.
_QUESTION = """
import importlib.metadata as metadata, json, pathlib, platform, re
found, waiting = {}, ["torch"]
while waiting:
    name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
    if name in found:
        continue
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        found[name] = []
        continue
    tops = {pathlib.PurePosixPath(file).parts[0] for file in distribution.files or ()}
    root = pathlib.Path(distribution.locate_file(""))
    found[name] = [str(root / top) for top in tops - {"..", "__pycache__"}]
    required = [x for x in distribution.requires or () if "extra ==" not in x]
    waiting += [re.match(r"[\\w.-]+", x)[0] for x in required]
version = metadata.version("torch") if found["torch"] else None
print(json.dumps([platform.python_version(), version, sum(found.values(), [])]))
"""


class Interpreter(NamedTuple):
    """A Python that has torch."""

    path: Path
    python: str  # its version
    torch: str
    entries: tuple[Path, ...]  # of torch and of the packages that it requires


def interpreter(path: Path) -> Interpreter:
    """An interpreter by its path.

    Raises:
        ValueError: it does not run, or has no torch.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - a symbolic link is an environment
    try:
        command = [str(path), "-I", "-c", _QUESTION]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1]
        raise ValueError(f"python: expected an interpreter, got {path} ({why})") from error
    python, torch, entries = json.loads(done.stdout)
    if torch is None:
        raise ValueError(f"python: expected an interpreter that has torch, {path} has none")
    return Interpreter(path, python, torch, tuple(map(Path, entries)))


def create(folder: Path, base: Interpreter, log: IO[str]) -> Path:
    """Makes an environment with pip and links to torch's files; returns its interpreter."""
    run((base.path, "-m", "venv", "--clear", folder), log)
    python = folder / "bin" / "python"
    question = "import sysconfig; print(sysconfig.get_path('purelib'))"
    answer = subprocess.run(
        [str(python), "-c", question], check=True, capture_output=True, text=True
    )
    site = Path(answer.stdout.strip())
    # torch requires setuptools, so the links contain it; venv may have installed another version.
    for own in site.glob("setuptools*"):
        shutil.rmtree(own)
    for entry in base.entries:
        if not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    return python


def run(
    command: Sequence[str | Path],
    log: IO[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Runs a command and writes it and its output to the log.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    log.write(f"$ {' '.join(map(str, command))}\n")
    log.flush()
    subprocess.run(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        check=True,
    )
