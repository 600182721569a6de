"""Fuzz every file format that the project reads, each for some minutes, guided by coverage.

An input must be read, or refused with a documented error that names the file: no other exception,
no crash, no hang, and memory within a small multiple of the file. An input that breaks this rule is
kept in the folder `faults`, with a report beside it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

NAMES = ("tokens", "checkpoint", "trainer", "vocabulary", "tokenizer")
NAMES += ("config", "archive", "text", "log", "record", "window")
SECONDS_PER_INPUT = 60  # of wall time, after which libFuzzer ends the process
EXECUTED = re.compile(r"stat::number_of_executed_units:\s*(\d+)|#(\d+)\s")


class Result(NamedTuple):
    """What the fuzzing of one format gave."""

    name: str
    executions: int
    seconds: float
    faults: list[str]


def fuzz(name: str, seconds: float, folder: Path) -> Result:
    """Fuzz one format in processes of their own; one that crashes is followed by another."""
    place = folder / name
    for stale in ("faults", "files"):
        shutil.rmtree(place / stale, ignore_errors=True)
    (place / "faults").mkdir(parents=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started, executions = time.monotonic(), 0
    with (place / "log").open("w", encoding="utf-8") as log:
        while (left := seconds - (time.monotonic() - started)) > 1:
            options = [f"-max_total_time={int(left)}", "-print_final_stats=1", "-rss_limit_mb=0"]
            options += [f"-timeout={SECONDS_PER_INPUT}", "-max_len=65536"]
            command = [sys.executable, "-m", "tools.fuzz.worker", name, str(place), *options]
            done = subprocess.run(
                command, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
            )
            log.write(done.stderr)
            counts = [int(total or at) for total, at in EXECUTED.findall(done.stderr)]
            executions += max(counts, default=0)
            if not counts:  # it ended before its first input
                sys.stderr.write(done.stderr)
                raise SystemExit(f"{name}: the fuzzer does not start (exit {done.returncode})")
    reports = sorted((place / "faults").rglob("*.txt"))
    faults = ["; ".join(path.read_text("utf-8").splitlines()[:2]) for path in reports]
    ends = (place / "faults").glob(f"{name}-*-*")
    faults += [f"{path.name}: the process ended" for path in ends if "-slow-unit-" not in path.name]
    return Result(name, executions, time.monotonic() - started, faults)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 1 if there are faults."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for each format")
    parser.add_argument("--formats", nargs="+", choices=NAMES, default=NAMES, metavar="FORMAT")
    parser.add_argument("--jobs", type=int, default=1, help="formats at a time")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="corpora and faults")
    given = parser.parse_args(arguments)
    run = partial(fuzz, seconds=given.minutes * 60, folder=given.out)
    found = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        for result in pool.map(run, given.formats):
            found += len(result.faults)
            print(
                f"{result.name:<12}{result.executions:>10,} inputs in {result.seconds:5.0f} s, "
                f"{len(result.faults)} faults",
                flush=True,
            )
            for fault in result.faults:
                print(f"    {fault}")
    if found:
        print(f"{found} faults; the inputs are in {given.out}/FORMAT/faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
