"""Describes the GPU, the versions and the commit, for the JSON."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib import metadata
from typing import Any

from tools.gpu.stages import ROOT

try:
    import torch
except ImportError as error:
    raise SystemExit(f"make gpu needs torch ({error}): choose a PYTHON=… that has it") from None


def no_device_reason() -> str | None:
    """One sentence if torch cannot use a GPU here, else None."""
    if torch.cuda.is_available():
        return None
    why = "is built without CUDA" if torch.version.cuda is None else "finds none"
    return f"make gpu needs a CUDA device, but torch {torch.__version__} {why}"


def describe() -> dict[str, Any]:
    """The machine and the checkout; "device" is "CPU" if there is no GPU."""
    described: dict[str, Any] = {"device": "CPU"}
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        described = {
            "device": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_mib": found.total_memory >> 20,
            "shared_memory_bytes": found.shared_memory_per_block_optin,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return described | {
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed": bool(_output("git", "status", "--porcelain", "-uno")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _output(*command: str) -> str | None:
    """The command's output; None if it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
