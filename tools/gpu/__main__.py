"""`python -m tools.gpu`: runs the stages within the budget, writes the JSON, prints the verdict."""

from __future__ import annotations

import argparse
import datetime
import functools
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tools.gpu import STARTED, machine, runner, verdict
from tools.gpu.stages import BUILD, FIRST_CALL, MARGIN, ROOT, STAGES, write_json


def main() -> int:
    options = _parse()
    reason = None if options.rehearse else machine.no_device_reason()
    if reason is not None:
        print(reason)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    report: dict[str, Any] = {"machine": machine.describe(), "budget": options.budget}
    report["stages"] = {}
    device = "cpu" if options.rehearse else "cuda"
    out = options.out or _path(report["machine"]["device"], options)
    run = runner.Run(
        waiting=options.stages,
        ends=runner.deadlines(options.stages, time.monotonic(), STARTED + options.budget - MARGIN),
        records=report["stages"],
        write=functools.partial(write_json, out, report),
        start=lambda stage, end, ceilings: runner.Child(stage, end, device, ceilings),
        started=STARTED,
    )
    try:
        run.run()
    finally:
        verdict.show(report)
        print(f"\n{time.monotonic() - STARTED:.0f} of {options.budget:.0f} s; written: {out}")
    return verdict.exit_status(report)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds for the whole command")
    parser.add_argument("--stages", default="", help=f"comma-separated; of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument(
        "--rehearse", action="store_true", help="run all on the CPU, at tiny shapes"
    )
    options = parser.parse_args()
    default = ",".join(STAGES if options.rehearse else [stage.name for stage in FIRST_CALL])
    names = (options.stages or default).split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        parser.error(f"unknown stages: {', '.join(unknown)}; choose from {', '.join(STAGES)}")
    options.suffix = "" if names == default.split(",") else "-".join(["", *names])
    options.stages = [stage for stage in STAGES.values() if stage.name in names]
    return options


def _path(device: str, options: argparse.Namespace) -> Path:
    """The first call's results have no suffix; no later call replaces them."""
    if options.rehearse:
        return BUILD / "rehearsal.json"
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    name = f"gpu-{slug}-{datetime.date.today().isoformat()}{options.suffix}.json"
    return ROOT / "benchmarks" / "results" / name


if __name__ == "__main__":
    raise SystemExit(main())
