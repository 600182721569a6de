"""One run in a process of its own, whose memory holds nothing else.

    python -m benchmarks.long_context.worker REQUEST

prints an `Answer` as JSON. REQUEST is the JSON that `in_child` makes.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import peak_memory
from benchmarks.long_context.limits import GIB, Measurement
from benchmarks.long_context.workloads import WORKLOADS, Workload

ORIGINAL, PATCHED = "original", "patched"
SIDES = (ORIGINAL, PATCHED)


class Answer(NamedTuple):
    """A measurement, and the norms that must be equal for both sides."""

    measurement: Measurement
    results: list[float]


class OverLimitError(Exception):
    """The run was ended because it used more memory or time than it was allowed to."""


def in_child(
    workload: Workload, length: float, side: str, room_gib: float, *, threads: int, seconds: float
) -> Answer:
    """Runs `workload` in a child.

    Args:
        room_gib: the child's memory; an allocation beyond it fails.
        seconds: the child is ended after this time.

    Raises:
        OverLimitError: with the reason as it is shown to readers.
        RuntimeError: the child failed.
    """
    request = {
        "workload": workload.name,
        "fields": dataclasses.asdict(workload),
        "length": length,
        "side": side,
        "threads": threads,
        "room_gib": room_gib,
    }
    command = [sys.executable, "-m", __name__, json.dumps(request)]
    root = Path(__file__).resolve().parents[2]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, cwd=root, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise OverLimitError(f"took more than {seconds:.0f} s") from None
    if child.returncode:
        if "allocate memory" in child.stderr or "bad_alloc" in child.stderr:
            raise OverLimitError(f"needed more than {room_gib:.0f} GiB")
        problem = child.stderr.strip() or f"ended with status {child.returncode}"
        raise RuntimeError(f"{workload.name}, {length:g} {workload.unit}, {side}: {problem}")
    measurement, results = json.loads(child.stdout.splitlines()[-1])
    return Answer(Measurement(*measurement), results)


def measure(workload: Workload, length: float, side: str) -> Answer:
    """One run in this process, which should have done nothing before.

    A tiny run loads all libraries first.
    """
    is_patched = side == PATCHED
    tiny = workload.tiny()
    tiny.prepare(tiny.lengths[0], is_patched=is_patched)()
    run = workload.prepare(length, is_patched=is_patched)

    def timed() -> tuple[list[float], float]:
        started = time.perf_counter()
        results = run()
        return results, time.perf_counter() - started

    start, grown, (results, seconds) = peak_memory.around(timed)
    start_gib, peak_gib = (mib * 2**20 / GIB for mib in (start, grown))
    return Answer(Measurement(side, length, seconds, peak_gib, start_gib), results)


def main(request: dict[str, Any]) -> None:
    torch.set_num_threads(request["threads"])
    room = int(request["room_gib"] * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (room, room))
    fields = request["fields"]
    workload = WORKLOADS[request["workload"]](fields["n_layer"], tuple(fields["lengths"]))
    print(json.dumps(measure(workload, request["length"], request["side"])))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
