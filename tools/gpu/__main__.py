"""`python -m tools.gpu`: runs the stages within the budget, writes the JSON, prints the verdict."""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import re
import signal
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from subprocess import getoutput
from typing import Any

import torch

from tools.gpu import STARTED, runner
from tools.gpu.runner import BUILD, FAILED, FIRST_CALL, MARGIN, PASSED, ROOT, STAGES

WIDTH, LINES, BAR = 110, 40, 40  # columns; lines of one stage; columns of the budget in a bar


def main() -> int:
    options = _parse()
    if not options.rehearse and not torch.cuda.is_available():
        print(f"make gpu needs a CUDA device, and torch {torch.__version__} finds none")
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    machine, records = describe_machine(), {}
    found = {"machine": machine, "budget": options.budget, "stages": records}
    # Unique by device and second, so that no call replaces the results of another.
    words = re.findall("[a-z0-9]+", f"gpu {machine['device']} {machine['date']}".lower())
    folder = BUILD if options.rehearse else ROOT / "benchmarks" / "results"
    out = options.out or folder / f"{'-'.join(words)}.json"
    plan = [stage for stage in STAGES.values() if stage.name in options.stages]
    ends = runner.deadlines(plan, time.monotonic(), STARTED + options.budget - MARGIN)
    write = functools.partial(runner.write_json, out, found)
    try:
        runner.Run("cpu" if options.rehearse else "cuda", ends, records, write).run(plan)
    finally:
        show(found)
        print(f"\n{time.monotonic() - STARTED:.0f} of {options.budget:.0f} s; written: {out}")
    return exit_status(found)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds for the whole command")
    parser.add_argument("--stages", default="", help=f"comma-separated; of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args()
    default = STAGES if options.rehearse else [stage.name for stage in FIRST_CALL]
    options.stages = options.stages.split(",") if options.stages else default
    if unknown := [name for name in options.stages if name not in STAGES]:
        parser.error(f"unknown stages: {', '.join(unknown)}; choose from {', '.join(STAGES)}")
    return options


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
    by_status = sorted((record["status"], name) for name, record in stages.items())
    for status, names in itertools.groupby(by_status, key=lambda pair: pair[0]):
        print(f"  {status}: {', '.join(name for _, name in names)}")
    print("", *(f"{key}: {value}" for key, value in machine.items()), "", sep="\n")
    budget = report["budget"]
    print(f"{'stage':<13} {'start':>6} {'end':>6}  status   |{f'0 to {budget:.0f} s':<{BAR}}|")
    for name, record in stages.items():
        start, end = record["start"], record["start"] + record["seconds"]
        first, last = (min(BAR, round(x / budget * BAR)) for x in (start, end))
        bar = " " * first + "#" * (last - first)
        print(f"{name:<13} {start:>6.1f} {end:>6.1f}  {record['status']:<8} |{bar:<{BAR}}|")
    for name, record in stages.items():
        text = [record["error"] or "", *record.get("results", {}).get("summary", [])]
        lines = [f"  {line}"[:WIDTH] for line in "\n".join(text).splitlines() if line]
        if lines:
            print("", name, *lines[:LINES], sep="\n")


if __name__ == "__main__":
    sys.exit(main())
