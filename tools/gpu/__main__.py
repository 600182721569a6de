"""`python -m tools.gpu`: runs the stages within the budget, writes the JSON, prints the verdict."""

from __future__ import annotations

import argparse
import datetime
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tools.gpu import machine, runner, verdict
from tools.gpu.stages import BUILD, FIRST_CALL, ROOT, STAGES, write_json

STARTED = time.monotonic()
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    options = _parse()
    reason = None if options.rehearse else machine.no_device_reason()
    if reason is not None:
        print(reason)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    device = "cpu" if options.rehearse else "cuda"
    report: dict[str, Any] = {
        "machine": machine.describe(),
        "budget": options.budget,
        "stages": {},
    }
    out = options.out or _path(report["machine"]["device"], options)
    write_json(out, report)
    run = runner.Run(
        [stage for stage in STAGES.values() if stage.name in options.stages],
        report,
        out,
        lambda name, deadline, ceilings: runner.Child(name, deadline, device, ceilings),
        started=STARTED,
        budget=options.budget,
    )
    try:
        run.run()
    finally:
        status = runner.exit_status(report)
        verdict.show(report, status)
        print(f"\n{time.monotonic() - STARTED:.0f} of {options.budget:.0f} s; written: {out}")
    return status


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds for the whole command")
    parser.add_argument("--stages", default="", help=f"comma-separated; of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument(
        "--rehearse", action="store_true", help="all stages on the CPU, at tiny shapes"
    )
    options = parser.parse_args()
    first_call = [stage.name for stage in FIRST_CALL]
    default = list(STAGES) if options.rehearse else first_call
    options.stages = options.stages.split(",") if options.stages else default
    options.suffix = "" if options.stages == first_call else "-".join(["", *options.stages])
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
        parser.error(f"unknown stages: {', '.join(unknown)}; choose from {', '.join(STAGES)}")
    return options


def _path(device: str, options: argparse.Namespace) -> Path:
    """The result of a first call has no suffix, so that a later call does not replace it."""
    if options.rehearse:
        return BUILD / "rehearsal.json"
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return RESULTS / f"gpu-{slug}-{datetime.date.today().isoformat()}{options.suffix}.json"


if __name__ == "__main__":
    raise SystemExit(main())
