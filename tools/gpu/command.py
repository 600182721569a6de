"""Programs that stages start: where they are, and what they print."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence

from tools.gpu.stages import ROOT, UnavailableError

CUDA = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def find(name: str) -> str:
    """The program of the active Python, on PATH, or in CUDA's folders.

    Raises:
        UnavailableError: it is not installed.
    """
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath), *CUDA]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise UnavailableError(f"{name} is not installed")
    return found


def run(
    command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """The exit status, None if it was ended after `seconds`, and all that it printed."""
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        try:
            status = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                stdout=printed,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, seconds),
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
        printed.seek(0)
        return status, printed.read()


def tail(text: str, lines: int = 10) -> str:
    """The last lines that are not empty."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
