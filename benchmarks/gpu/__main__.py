"""`python -m benchmarks.gpu`: run the stages, write JSON after each, print the summary."""

from __future__ import annotations

import argparse
import datetime
import re
from pathlib import Path

from benchmarks.gpu import machine, stages, summary

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    options = _parse()
    described = machine.describe()
    out = options.out or RESULTS / _file_name(str(described["gpu"]))
    report = stages.run_all(options.only or stages.NAMES, out, described, options.seconds)
    summary.show(report)
    print(f"written: {out}")
    return stages.exit_status(report)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=stages.NAMES, help="some of the stages")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument(
        "--seconds", type=float, default=stages.TOTAL_SECONDS, help="for all stages together"
    )
    return parser.parse_args()


def _file_name(gpu: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return f"gpu-{slug}-{datetime.date.today().isoformat()}.json"


if __name__ == "__main__":
    raise SystemExit(main())
