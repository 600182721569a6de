"""Prints a finished run: the verdict first, then the timeline, then each stage's findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tools.gpu.stages import FAILED, NOT_RUN, PASSED, SKIPPED

WIDTH, LINES, BAR = 110, 40, 40  # columns; lines of one stage; columns of the budget in a bar


def exit_status(report: Mapping[str, Any]) -> int:
    """1 if a stage failed or none passed, else 0."""
    states = {record["status"] for record in report["stages"].values()}
    return int(FAILED in states or PASSED not in states)


def show(report: Mapping[str, Any]) -> None:
    """Prints all of it."""
    stages, machine = report["stages"], report["machine"]
    print(f"\nVERDICT: {'FAILED' if exit_status(report) else 'PASSED'}")
    for status in (FAILED, PASSED, SKIPPED, NOT_RUN):
        names = [name for name, record in stages.items() if record["status"] == status]
        print(*[f"  {status}: {', '.join(names)}\n"] * bool(names), end="")
    print(f"\n{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}, commit "
          f"{str(machine['commit'])[:12]}{' with changes' * machine['changed']}\n")  # fmt: skip
    print(*timeline(stages, report["budget"]), sep="\n")
    for name, record in stages.items():
        text = "\n".join([record["error"] or "", *record.get("results", {}).get("summary", [])])
        lines = [f"  {line}"[:WIDTH] for line in text.splitlines() if line]
        print(*[f"\n{name}", *lines[:LINES]] if lines else [], sep="\n", end="\n" * bool(lines))


def timeline(stages: Mapping[str, Mapping[str, Any]], budget: float) -> Iterator[str]:
    """A row for each stage, in seconds since the start, with a bar."""
    yield f"{'stage':<12} {'start':>6} {'end':>6}  {'status':<8} |{f'0 to {budget:.0f} s':<{BAR}}|"
    for name, record in stages.items():
        start, end = record["start"], record["start"] + record["seconds"]
        first, last = (min(BAR, round(x / budget * BAR)) for x in (start, end))
        bar = " " * first + "#" * (last - first)
        yield f"{name:<12} {start:>6.1f} {end:>6.1f}  {record['status']:<8} |{bar:<{BAR}}|"
