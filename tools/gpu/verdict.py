"""Prints a finished run: the verdict first, then the timeline, then what each stage found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tools.gpu.stages import FAILED, NOT_RUN, PASSED, SKIPPED

WIDTH, LINES = 110, 40  # columns; lines for one stage
BAR = 40


def show(report: Mapping[str, Any], exit_status: int) -> None:
    """Prints all of it."""
    stages, machine = report["stages"], report["machine"]
    print(f"\nVERDICT: {'FAILED' if exit_status else 'PASSED'}")
    for status in (FAILED, PASSED, SKIPPED, NOT_RUN):
        names = [name for name, record in stages.items() if record["status"] == status]
        if names:
            print(f"  {status}: {', '.join(names)}")
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton"))
    changes = " with changes" if machine["changed"] else ""
    print(f"\n{machine['device']}, {versions}, commit {str(machine['commit'])[:12]}{changes}\n")
    print("\n".join(timeline(stages, report["budget"])))
    for name, record in stages.items():
        lines = [record["error"]] if record["error"] else []
        lines += record.get("results", {}).get("summary") or []
        if lines:
            print(f"\n{name}")
        for line in "\n".join(lines).splitlines()[:LINES]:
            print(f"  {line}"[:WIDTH])


def timeline(stages: Mapping[str, Mapping[str, Any]], budget: float) -> Iterator[str]:
    """A table with one row for each stage, in seconds since the start, and a bar."""
    yield f"{'stage':<12} {'start':>6} {'end':>6}  {'status':<8} |{f'0 to {budget:.0f} s':<{BAR}}|"
    for name, record in stages.items():
        start, end = record["start"], record["start"] + record["seconds"]
        first, last = (min(BAR, round(x / budget * BAR)) for x in (start, end))
        bar = " " * first + "#" * (last - first)
        yield f"{name:<12} {start:>6.1f} {end:>6.1f}  {record['status']:<8} |{bar:<{BAR}}|"
