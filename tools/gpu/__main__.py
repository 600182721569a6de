"""`python -m tools.gpu`: runs the stages within the budget, writes the JSON, prints the verdict."""

from __future__ import annotations

import argparse
import functools
import re
import signal
import sys
import time
from pathlib import Path

import torch

from tools.gpu import STARTED, report
from tools.gpu.runner import Run, deadlines
from tools.gpu.stages import BUILD, FIRST_CALL, MARGIN, ROOT, STAGES, write_json


def main() -> int:
    options = _parse()
    if not options.rehearse and not torch.cuda.is_available():
        print(f"make gpu needs a CUDA device, and torch {torch.__version__} finds none")
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    machine, records = report.describe_machine(), {}
    found = {"machine": machine, "budget": options.budget, "stages": records}
    out = options.out or _path(machine, options.rehearse)
    plan = [stage for stage in STAGES.values() if stage.name in options.stages]
    ends = deadlines(plan, time.monotonic(), STARTED + options.budget - MARGIN)
    write = functools.partial(write_json, out, found)
    try:
        Run("cpu" if options.rehearse else "cuda", ends, records, write).run(plan)
    finally:
        report.show(found)
        print(f"\n{time.monotonic() - STARTED:.0f} of {options.budget:.0f} s; written: {out}")
    return report.exit_status(found)


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


def _path(machine: dict[str, str], is_rehearsal: bool) -> Path:
    """Unique by device and second, so that no call replaces the results of another."""
    if is_rehearsal:
        return BUILD / "rehearsal.json"
    name = "-".join(re.findall("[a-z0-9]+", f"gpu {machine['device']} {machine['date']}".lower()))
    return ROOT / "benchmarks" / "results" / f"{name}.json"


if __name__ == "__main__":
    sys.exit(main())
