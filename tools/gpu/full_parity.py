"""Stage "full_parity": all GPU tests, in several processes."""

from __future__ import annotations

import os
import sys

from tools.gpu import command
from tools.gpu.stages import Context

MOST_PROCESSES = 8  # each holds a CUDA context of about half a GiB


def run(context: Context) -> None:
    """Results: the end of pytest's output, and its count of tests.

    Raises:
        AssertionError: a test failed, or time ran out.
    """
    processes = min(MOST_PROCESSES, os.cpu_count() or 1)
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    rehearsal = context.device.type == "cpu"
    options = ["--collect-only"] if rehearsal else ["-n", str(processes), "--maxfail=50"]
    status, printed = command.run([*pytest, *options], context.seconds_left() - 2)
    lines = command.tail(printed, 60).splitlines()
    context.results["output"] = lines
    context.results["summary"] = [line for line in lines if line.startswith("FAILED")][:20]
    context.results["summary"] += lines[-1:]
    context.save()
    assert status == 0, "time ran out" if status is None else f"pytest ended with status {status}"
