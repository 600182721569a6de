"""The machine for the JSON; the printed verdict, timeline and findings of a finished run."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from importlib import metadata
from subprocess import getoutput
from typing import Any

import torch

from tools.gpu.stages import FAILED, NOT_RUN, PASSED, SKIPPED

WIDTH, LINES, BAR = 110, 40, 40  # columns; lines of one stage; columns of the budget in a bar


def describe_machine() -> dict[str, Any]:
    """The GPU, the versions and the commit; "device" is "CPU" if there is no GPU."""
    described: dict[str, Any] = {"device": "CPU"}
    if torch.cuda.is_available():
        driver = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        described = {"device": torch.cuda.get_device_name(), "driver": getoutput(driver)}
        described["properties"] = str(torch.cuda.get_device_properties())
    return described | {
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "commit": getoutput("git rev-parse HEAD"),
        "changed": bool(getoutput("git status --porcelain -uno")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def exit_status(report: Mapping[str, Any]) -> int:
    """1 if a stage failed or none passed, else 0."""
    states = {record["status"] for record in report["stages"].values()}
    return int(FAILED in states or PASSED not in states)


def show(report: Mapping[str, Any]) -> None:
    """Prints the verdict, the machine, the timeline, then each stage's error and findings."""
    stages, machine = report["stages"], report["machine"]
    print(f"\nVERDICT: {'FAILED' if exit_status(report) else 'PASSED'}")
    for status in (FAILED, PASSED, SKIPPED, NOT_RUN):
        if names := [name for name, record in stages.items() if record["status"] == status]:
            print(f"  {status}: {', '.join(names)}")
    commit = f"commit {str(machine['commit'])[:12]}{' with changes' * machine['changed']}"
    print(
        f"\n{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}, {commit}\n"
    )
    print(*timeline(stages, report["budget"]), sep="\n")
    for name, record in stages.items():
        text = "\n".join([record["error"] or "", *record.get("results", {}).get("summary", [])])
        lines = [f"  {line}"[:WIDTH] for line in text.splitlines() if line]
        if lines:
            print("", name, *lines[:LINES], sep="\n")


def timeline(stages: Mapping[str, Mapping[str, Any]], budget: float) -> Iterator[str]:
    """A row for each stage, in seconds since the start, with a bar."""
    yield f"{'stage':<13} {'start':>6} {'end':>6}  {'status':<8} |{f'0 to {budget:.0f} s':<{BAR}}|"
    for name, record in stages.items():
        start, end = record["start"], record["start"] + record["seconds"]
        first, last = (min(BAR, round(x / budget * BAR)) for x in (start, end))
        bar = " " * first + "#" * (last - first)
        yield f"{name:<13} {start:>6.1f} {end:>6.1f}  {record['status']:<8} |{bar:<{BAR}}|"
