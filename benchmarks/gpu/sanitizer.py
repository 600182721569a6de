"""Stage "sanitizer": small calls under compute-sanitizer, where it is there and attaches."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import device
from benchmarks.gpu.stages import ROOT, Unavailable

TOOLS = ("memcheck", "racecheck")
CASES = ("transformer_xl", "wild_lengths", "head_41", "one_query", "dropout")
_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
_CANNOT_ATTACH = re.compile(
    r"(?:unable|failed|error).*(?:attach|debugger|injection|permission)", re.I
)
_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def run(results: dict[str, Any], save: Callable[[], None]) -> None:
    """Results: errors by tool.

    Raises:
        Unavailable: no CUDA device, no compute-sanitizer, or it does not attach here.
        AssertionError: it found errors.
    """
    device.require()
    tool = find()
    for check in TOOLS:
        command = [tool, "--tool", check, sys.executable, "-m", __name__]
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        results[check] = errors(done.stdout)
        save()
        assert results[check] == 0, f"{check}: {_tail(done.stdout)}"
        assert done.returncode == 0, f"{check}: the calls failed: {_tail(done.stdout)}"


def find() -> str:
    """Path of compute-sanitizer."""
    found = shutil.which("compute-sanitizer")
    for place in _PLACES:
        found = found or shutil.which("compute-sanitizer", path=place)
    if found is None:
        raise Unavailable("compute-sanitizer is not installed")
    return found


def errors(output: str) -> int:
    """The number that compute-sanitizer's summary names.

    Raises:
        Unavailable: there is no summary, as where it cannot attach.
    """
    summary = _SUMMARY.search(output)
    if summary is None:
        reason = _CANNOT_ATTACH.search(output)
        said = reason[0] if reason else _tail(output)
        raise Unavailable(f"compute-sanitizer does not attach here: {said}")
    return int(summary[1] or summary[2])


def calls() -> None:
    """What is run under it: a few small cases, forward and backward, on every backend there is."""
    from benchmarks.gpu import parity

    for name, check in parity.checks("cuda"):
        case, _, rest = name.removeprefix("rel_attention ").partition("-")
        if case in CASES and "float16" in rest.split()[1:2]:
            try:
                check()
            except parity.NotServedError:
                continue


def _tail(text: str) -> str:
    return " | ".join(text.strip().splitlines()[-3:])


if __name__ == "__main__":
    calls()
    print(f"{Path(__file__).stem}: calls done")
