"""What a run's record says of where it ran: GPU, driver, versions, commit, date.

Asked without torch's CUDA, so that the process which runs the stages holds no context.
"""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

NO_GPU = "no CUDA device"
_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "triton", "numpy")


def describe() -> dict[str, object]:
    """The machine and the checkout, as JSON takes them."""
    gpu, driver, memory = _gpu()
    return {
        "gpu": gpu,
        "driver": driver,
        "memory": memory,
        "cuda_compiler": _nvcc(),
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: _version(name) for name in _PACKAGES},
        "commit": _output("git", "-C", str(_ROOT), "rev-parse", "HEAD"),
        "changed": bool(_output("git", "-C", str(_ROOT), "status", "--porcelain", "-uno")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _gpu() -> tuple[str, str | None, str | None]:
    query = "--query-gpu=name,driver_version,memory.total"
    answer = _output("nvidia-smi", query, "--format=csv,noheader")
    fields = [field.strip() for field in (answer or "").partition("\n")[0].split(",")]
    return (fields[0], fields[1], fields[2]) if len(fields) == 3 else (NO_GPU, None, None)


def _nvcc() -> str | None:
    found = re.search(r"release .*", _output("nvcc", "--version") or "")
    return found[0] if found else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
