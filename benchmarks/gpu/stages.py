"""Runs the stages of `make gpu`, each in a process of its own, and records each as it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOTAL_SECONDS = 460.0  # of the eight minutes; the rest is for starting, stopping, writing


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the run: module `benchmarks.gpu.<name>` has a function `run`.

    `seconds` is the most it may take; what it found by then is kept.
    """

    name: str
    seconds: float


# First what the others need, then what must be right, then speed, last what may not attach.
STAGES = (
    Stage("build", 150),
    Stage("parity", 150),
    Stage("determinism", 45),
    Stage("graphs", 60),
    Stage("timings", 170),
    Stage("sanitizer", 90),
)
NAMES = tuple(stage.name for stage in STAGES)

PASSED, FAILED, UNAVAILABLE = "passed", "failed", "unavailable"


class UnavailableError(Exception):
    """What a stage needs is not here; the message says what. Not a failure of the kernels."""


def run_all(
    names: Sequence[str], out: Path, machine: Mapping[str, object], total: float = TOTAL_SECONDS
) -> dict[str, Any]:
    """Runs the stages named, in order; `out` is written anew after each.

    Returns:
        {"machine": ..., "stages": {name: {"status", "seconds", "error", "results"}}}
    """
    report: dict[str, Any] = {"machine": dict(machine), "stages": {}}
    ends = time.monotonic() + total
    for stage in STAGES:
        if stage.name not in names:
            continue
        print(f"{stage.name} …", flush=True)
        left = ends - time.monotonic()
        record = run_stage(stage.name, min(stage.seconds, left))
        report["stages"][stage.name] = record
        write_json(out, report)
        note = f": {record['error']}" if record["error"] else ""
        print(f"{stage.name} {record['status']} in {record['seconds']:.0f} s{note}", flush=True)
    return report


def run_stage(name: str, seconds: float, module: str = "benchmarks.gpu.child") -> dict[str, Any]:
    """A stage in a process of its own, ended with all its children after `seconds`."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        if seconds <= 0:
            return _record(FAILED, 0.0, "no time was left for it", {})
        child = subprocess.Popen(
            [sys.executable, "-m", module, name, str(found)],
            cwd=ROOT,
            env=environment(),
            start_new_session=True,
        )
        try:
            status = child.wait(seconds)
            error = None if status == 0 else f"its process ended with status {status}"
        except subprocess.TimeoutExpired:
            error = f"not done after {seconds:.0f} s"
        finally:
            _end(child)
        record = json.loads(found.read_text()) if found.exists() else {}
    took = time.monotonic() - started
    if error is None and record:
        return _record(record["status"], took, record["error"], record["results"])
    return _record(FAILED, took, error or "it left no record", record.get("results", {}))


def environment() -> dict[str, str]:
    """This process's environment, with the checkout's packages first and Triton compiling."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    places = [str(ROOT), str(ROOT / "python"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    return env


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes beside and renames, so that a run cut short leaves the last whole document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def exit_status(report: Mapping[str, Any]) -> int:
    """0 where every stage passed or could not be run here for a reason beyond the kernels; a run
    without a GPU proves nothing and is 1 too."""
    states = [record["status"] for record in report["stages"].values()]
    measured = any(
        record["status"] == PASSED for name, record in report["stages"].items() if name != "build"
    )
    return int(FAILED in states or not measured)


def _record(status: str, seconds: float, error: str | None, results: Any) -> dict[str, Any]:
    return {
        "status": status,
        "seconds": round(seconds, 1),
        "error": error,
        "results": results,
    }


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends the child's whole session: it may have started workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
