"""Starts the stages, ends those that overrun, and writes the JSON while they run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tools.gpu.stages import (
    BUILD,
    FAILED,
    MARGIN,
    NOT_RUN,
    PASSED,
    ROOT,
    STAGES,
    Stage,
    read_json,
    write_json,
)

LEAST = 5.0  # seconds: with less, a stage is not started
GRACE = 2.0  # seconds after a stage's deadline until its process is killed
POLL = 0.1

Record = dict[str, Any]


class Process(Protocol):
    """A running stage."""

    def exit_status(self) -> int | None:
        """None while it runs."""

    def record(self) -> Record:
        """What it has written so far: {"status", "error", "results"}."""

    def kill(self) -> None:
        """Ends the process and its workers."""


class Clock(NamedTuple):
    """The monotonic clock, which a test replaces."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Child:
    """A stage in a process, and a session, of its own."""

    def __init__(self, stage: str, deadline: float, device: str, ceilings: Mapping[str, float]):
        BUILD.mkdir(parents=True, exist_ok=True)
        self._path = BUILD / f"{stage}.json"
        self._path.unlink(missing_ok=True)
        arguments = [stage, str(self._path), str(deadline), device, json.dumps(ceilings)]
        with (BUILD / f"{stage}.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tools.gpu.child", *arguments],
                cwd=ROOT,
                env=environment(device),
                start_new_session=True,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def exit_status(self) -> int | None:
        return self._process.poll()

    def record(self) -> Record:
        return read_json(self._path)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver
            self._process.wait(1)


class Run:
    """All stages of one run.

    Args:
        plan: the stages in order.
        report: its "stages" receive {"status", "error", "results", "start", "seconds"} by name.
        out: the JSON, which is written whenever a stage has saved.
        start: starts a stage, given its name, its deadline and the ceilings.
        started: when the command began, on the clock.
        budget: seconds for the whole command; all stages end `MARGIN` before.
    """

    def __init__(
        self,
        plan: Sequence[Stage],
        report: dict[str, Any],
        out: Path,
        start: Callable[[str, float, Mapping[str, float]], Process],
        *,
        started: float,
        budget: float,
        clock: Clock | None = None,
    ) -> None:
        self._waiting, self._ends = list(plan), deadlines(plan, started, budget)
        self._report, self._out, self._start, self._started = report, out, start, started
        self._now, self._sleep = clock or Clock()
        self._records: dict[str, Record] = report["stages"]
        self._running: dict[str, Process] = {}

    def run(self) -> None:
        """Returns when all stages have ended."""
        try:
            while self._waiting or self._running:
                for name, process in list(self._running.items()):
                    self._look_after(name, process)
                for stage in list(self._waiting):
                    if self._may_start(stage):
                        self._begin(stage)
                self._sleep(POLL)
        finally:
            for name, process in self._running.items():
                process.kill()
                self._finish(name, FAILED, "the run was interrupted")

    def _look_after(self, name: str, process: Process) -> None:
        """Writes what the stage has saved, and ends it if it has finished or overruns."""
        status, saved = process.exit_status(), process.record()
        if not saved.items() <= self._records[name].items():
            self._records[name] |= saved
            write_json(self._out, self._report)
        if status is None and self._now() < self._ends[name] + GRACE:
            return
        process.kill()
        del self._running[name]
        if status is None:
            self._finish(name, FAILED, "it was ended at the end of its share")
        elif status != 0:
            self._finish(name, FAILED, f"its process ended with status {status}")
        else:
            self._finish(name, self._records[name]["status"], self._records[name]["error"])

    def _may_start(self, stage: Stage) -> bool:
        """One stage runs at a time, in order, beside those in the background."""
        beside = [name for name in self._running if STAGES[name].background]
        first = next(other for other in self._waiting if not other.background or other is stage)
        if first is not stage or (len(self._running) > len(beside) and not stage.background):
            return False
        ready = [self._records[name].get("results", {}).get("ready", ()) for name in beside]
        is_late = self._now() - self._started >= stage.patience
        is_ready = is_late or all(stage.name in names for names in ready)
        return not beside or (is_ready and not stage.alone)

    def _begin(self, stage: Stage) -> None:
        self._waiting.remove(stage)
        begin = round(self._now() - self._started, 1)
        self._records[stage.name] = {"status": FAILED, "error": "it left no record", "start": begin}
        if self._ends[stage.name] - self._now() < LEAST:
            self._finish(stage.name, NOT_RUN, "no time was left")
            return
        measured = self._records.get("ceilings", {}).get("results", {})
        ceilings = {key: rate for key, rate in measured.items() if key.endswith("per_second")}
        self._running[stage.name] = self._start(stage.name, self._ends[stage.name], ceilings)

    def _finish(self, name: str, status: str, error: str | None) -> None:
        now, record = self._now() - self._started, self._records[name]
        record |= {"status": status, "error": error, "seconds": round(now - record["start"], 1)}
        write_json(self._out, self._report)
        print(f"{now:4.0f} s  {name} {status}{f': {error}' if error else ''}"[:160], flush=True)


def deadlines(plan: Sequence[Stage], started: float, budget: float) -> dict[str, float]:
    """When each stage's share ends. A larger budget lengthens all shares by the same factor; a
    smaller one leaves the last stages without time."""
    foreground = [stage for stage in plan if not stage.background]
    total = sum(stage.seconds for stage in foreground or plan)
    factor = max(1.0, (budget - MARGIN) / max(total, 1.0))
    found, end = {}, started
    for stage in plan:
        if not stage.background:
            end += factor * stage.seconds
        share = started + factor * stage.seconds if stage.background else end
        found[stage.name] = min(share, started + budget - MARGIN)
    return found


def exit_status(report: Mapping[str, Any]) -> int:
    """1 if a stage failed or none passed, else 0."""
    states = {record["status"] for record in report["stages"].values()}
    return int(FAILED in states or PASSED not in states)


def environment(device: str) -> dict[str, str]:
    """This process's environment with the checkout's packages first; on a GPU Triton compiles."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env = dict(os.environ) if device == "cpu" else kept
    paths = [str(ROOT), str(ROOT / "python"), env.get("PYTHONPATH", "")]
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
