"""`python -m tools.gpu`: runs the stages within the budget, writes the JSON, prints the verdict."""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch

from tools.gpu import STARTED, machine, runner, verdict
from tools.gpu.child import Child
from tools.gpu.stages import BUILD, FIRST_CALL, MARGIN, ROOT, STAGES, write_json


def main() -> int:
    options = _parse()
    if not options.rehearse and not torch.cuda.is_available():
        print(f"make gpu needs a CUDA device, and torch {torch.__version__} finds none")
        return 1
    sys.path[:0] = paths = [str(ROOT), str(ROOT / "python")]  # of the stages' processes too
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    described, records = machine.describe(), {}
    report = {"machine": described, "budget": options.budget, "stages": records}
    device = "cpu" if options.rehearse else "cuda"
    out = options.out or _path(described["device"], options)
    run = runner.Run(
        plan=options.stages,
        ends=runner.deadlines(options.stages, time.monotonic(), STARTED + options.budget - MARGIN),
        records=records,
        write=functools.partial(write_json, out, report),
        start=lambda stage, end, ceilings: Child(stage, end, device, ceilings),
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
    first_call = [stage.name for stage in FIRST_CALL]
    names = options.stages.split(",") if options.stages else first_call
    if options.rehearse and not options.stages:
        names = list(STAGES)
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        parser.error(f"unknown stages: {', '.join(unknown)}; choose from {', '.join(STAGES)}")
    options.stages = [stage for stage in STAGES.values() if stage.name in names]
    options.suffix = "" if names == first_call else "-".join(["", *names])
    return options


def _path(device: str, options: argparse.Namespace) -> Path:
    """The results of a first call have no suffix, and no later call replaces them."""
    if options.rehearse:
        return BUILD / "rehearsal.json"
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    name = f"gpu-{slug}-{datetime.date.today().isoformat()}{options.suffix}.json"
    return ROOT / "benchmarks" / "results" / name


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # multiprocessing would wait for a child that hangs in the driver
