"""Both sides at increasing lengths, until the next run would take too much time or memory."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path

from benchmarks import result_file, room
from benchmarks.cases import WrongResultError
from benchmarks.long_context.limits import (
    GIB,
    Limits,
    Measurement,
    Stop,
    forecast,
    stop_before,
)
from benchmarks.long_context.worker import SIDES, Answer, OverLimitError
from benchmarks.long_context.workloads import Workload

GATE = 1e-3  # the largest relative difference of the norms of both sides, in float32
SMALLEST_NORM = 1e-9  # smaller ones are rounding errors of zero

Measure = Callable[[Workload, float, str, float], Answer]  # the last argument: GiB that it may use
Progress = Callable[[Measurement | Stop, "Results"], None]


@dataclasses.dataclass
class Results:
    """All runs of a workload.

    Attributes:
        differences: by length, the largest relative difference of the norms of both sides.
        total_seconds: of the whole program.
    """

    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    stops: list[Stop] = dataclasses.field(default_factory=list)
    differences: dict[str, float] = dataclasses.field(default_factory=dict)
    total_seconds: float = 0.0

    def of(self, side: str) -> list[Measurement]:
        return [run for run in self.measurements if run.side == side]


def climb(
    workload: Workload,
    limits: Limits,
    measure: Measure,
    progress: Progress = lambda done, results: None,
) -> Results:
    """Measures both sides at each length of `workload`, in turns.

    Args:
        progress: is called after each run or stop with it and all results until then.

    Raises:
        WrongResultError: the results of both sides differ.
    """
    started = time.perf_counter()
    results = Results()
    for length in workload.lengths:
        numbers = []
        for side in SIDES:
            if any(stop.side == side for stop in results.stops):
                continue
            outcome = _attempt(workload, length, results.of(side), side, limits, measure)
            results.total_seconds = time.perf_counter() - started
            if isinstance(outcome, Stop):
                results.stops.append(outcome)
                progress(outcome, results)
                continue
            results.measurements.append(outcome.measurement)
            numbers.append(outcome.results)
            if len(numbers) == len(SIDES):
                results.differences[f"{length:g}"] = compare(numbers, length)
            progress(outcome.measurement, results)
    return results


def _attempt(
    workload: Workload,
    length: float,
    earlier: Sequence[Measurement],
    side: str,
    limits: Limits,
    measure: Measure,
) -> Answer | Stop:
    """The run of one length, unless it is predicted or found to exceed the limits."""
    room_gib = room.free() / GIB - limits.reserve_gib
    if stop := stop_before(length, earlier, limits, room_gib):
        return stop
    try:
        return measure(workload, length, side, room_gib)
    except OverLimitError as error:
        seconds, peak = forecast(earlier, length) if earlier else (None, None)
        return Stop(side, length, seconds, peak, str(error), started=True)


def compare(numbers: Sequence[Sequence[float]], length: float) -> float:
    """The largest relative difference of two lists of norms.

    Raises:
        WrongResultError: it exceeds GATE.
    """
    original, patched = numbers
    pairs = zip(original, patched, strict=True)
    difference = max(abs(y - x) / max(x, SMALLEST_NORM) for x, y in pairs)
    if not difference <= GATE:  # NaN is an error too
        raise WrongResultError(
            f"at {length:g} the results of both sides differ by {difference:.1e}, "
            f"more than {GATE:.0e}"
        )
    return difference


def write_json(
    path: Path,
    machine: Mapping[str, object],
    workload: Workload,
    limits: Limits,
    results: Results,
) -> None:
    """Writes the results with the machine."""
    document = {
        "date": date.today().isoformat(),
        "machine": {**machine, "memory_gib": room.meminfo("MemTotal") / GIB},
        "transformers": importlib.metadata.version("transformers"),
        "workload": {"name": workload.name, "unit": workload.unit, "title": workload.title}
        | {"details": workload.details, **dataclasses.asdict(workload)},
        "limits": limits._asdict(),
        "measurements": [run._asdict() for run in results.measurements],
        "stops": [stop._asdict() for stop in results.stops],
        "differences": results.differences,
        "total_seconds": results.total_seconds,
    }
    result_file.write_json(path, document)
