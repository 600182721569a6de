"""The peak memory of a contender, measured in its own process.

    python -m benchmarks.peak_memory CASE CONTENDER

prints MiB, the growth of the resident set from just before the first run to its highest point, and
the seconds of that run.
Inputs (and a model's weights) are there before and do not count; outputs, gradients, what is
saved between passes and an optimizer's state do. A case with `result_bytes` counts neither its
outputs nor its gradients. Libraries are loaded by a tiny run before.
"""

from __future__ import annotations

import ctypes
import gc
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from benchmarks import registry
from benchmarks.cases.adaptive_softmax import SoftmaxCase

T = TypeVar("T")

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"  # Linux: sets VmHWM to the present resident set


class Peak(NamedTuple):
    """Growth of the resident set in MiB, and the seconds of the run."""

    mib: float
    seconds: float


def in_child(case: str, contender: str) -> Peak:
    """`growth` in a process of its own; RuntimeError if the process fails."""
    command = [sys.executable, "-m", __name__, case, contender, str(torch.get_num_threads())]
    root = Path(__file__).resolve().parents[1]
    child = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    if child.returncode:
        raise RuntimeError(f"{case}, {contender}: {child.stderr.strip() or 'killed'}")
    mib, seconds = child.stdout.split()[-2:]  # libraries may print before
    return Peak(float(mib), float(seconds))


def growth(case: str, contender: str) -> Peak:
    """Of the contender's first run, in this process, which should have done nothing before."""
    chosen = registry.case(case)
    with chosen.tiny().contender(contender) as run:
        run()
    results = chosen.result_bytes(contender) if isinstance(chosen, SoftmaxCase) else 0
    with chosen.contender(contender) as run:
        _, grown, seconds = around(run)
        return Peak(grown - results / 2**20, seconds)


def around(run: Callable[[], T]) -> tuple[float, float, T]:
    """MiB resident just before `run`, the growth from there to the peak during it, its result."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text(_FORGET_PEAK)
    before = _resident("VmRSS")
    result = run()
    return before, _resident("VmHWM") - before, result


def _resident(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.M)
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(*growth(sys.argv[1], sys.argv[2]))
