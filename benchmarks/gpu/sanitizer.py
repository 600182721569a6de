"""Stage "sanitizer": small calls under compute-sanitizer, where it is there and attaches."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu import device
from benchmarks.gpu.stages import ROOT, UnavailableError

TOOLS = ("memcheck", "racecheck")
# Of the checks of parity, in float16: those with one of these words in their name.
CALLS = ("transformer_xl", "wild_lengths", "head_41", "dropout", "rel_shift", "decode", "two_tails")
MOST_DECODING = 3
_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
_CANNOT_ATTACH = re.compile(
    r"(?:unable|failed|error).*(?:attach|debugger|injection|permission)", re.I
)
_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def run(results: dict[str, Any], save: Callable[[], None]) -> None:
    """Results: errors by tool.

    Raises:
        UnavailableError: no CUDA device, no compute-sanitizer, or it does not attach here.
        AssertionError: it found errors.
    """
    device.require()
    tool = find()
    # Each tensor in an allocation of its own: within torch's larger ones nothing is outside.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in TOOLS:
        command = [tool, "--tool", check, sys.executable, "-m", __name__]
        done = subprocess.run(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
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
        raise UnavailableError("compute-sanitizer is not installed")
    return found


def errors(output: str) -> int:
    """The number that compute-sanitizer's summary names.

    Raises:
        UnavailableError: there is no summary, as where it cannot attach.
    """
    summary = _SUMMARY.search(output)
    if summary is None:
        reason = _CANNOT_ATTACH.search(output)
        said = reason[0] if reason else _tail(output)
        raise UnavailableError(f"compute-sanitizer does not attach here: {said}")
    return int(summary[1] or summary[2])


def calls() -> None:
    """What is run under it: a few small cases, forward and backward, on every backend there is."""
    from benchmarks.gpu import parity

    for name, check in chosen(parity.checks("cuda")):
        with contextlib.suppress(parity.NotServedError):
            print(name, flush=True)
            check()


def chosen(checks: Iterable[tuple[str, Callable[[], None]]]) -> Iterator[tuple[str, Any]]:
    """The checks in float16 that `CALLS` names, and few of those that decode."""
    decoding = 0
    for name, check in checks:
        decoding += name.startswith("decode") and "float16" in name.split()
        wanted = "float16" in name.split() and any(word in name for word in CALLS)
        if wanted and (not name.startswith("decode") or decoding <= MOST_DECODING):
            yield name, check


def _tail(text: str) -> str:
    return " | ".join(text.strip().splitlines()[-3:])


if __name__ == "__main__":
    calls()
    print(f"{Path(__file__).stem}: calls done")
