"""Starts the stages, ends those that overrun, and writes the JSON while they run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tools.gpu.stages import BUILD, FAILED, NOT_RUN, ROOT, Stage

LEAST = 5.0  # seconds of a stage; with less before the end of the run, it is not started
GRACE = 2.0  # seconds after a stage's deadline until its process is killed
POLL = 0.1

Record = dict[str, Any]  # {"status", "error", "results", "start", "seconds"}


class Child:
    """A stage in a process, and a session, of its own."""

    def __init__(self, stage: Stage, deadline: float, device: str, ceilings: Record) -> None:
        BUILD.mkdir(parents=True, exist_ok=True)
        self._path = BUILD / f"{stage.name}.json"
        self._path.unlink(missing_ok=True)
        function = stage.function or f"tools.gpu.{stage.name}:run"
        arguments = [function, str(self._path), str(deadline), device, json.dumps(ceilings)]
        paths = (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", ""))
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if device != "cpu" or stage.name == "compile":
            env.pop("TRITON_INTERPRET", None)
        with (BUILD / f"{stage.name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tools.gpu.child", *arguments],
                cwd=ROOT,
                env=env,
                start_new_session=True,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def record(self) -> Record:
        """The status, error and results that the stage has saved so far."""
        return dict(json.loads(self._path.read_text("utf-8"))) if self._path.exists() else {}

    def kill(self) -> None:
        """Ends the process and its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver
            self._process.wait(1)


@dataclasses.dataclass
class Run:
    """All stages of one run.

    Attributes:
        waiting: the stages that have not started, in order.
        ends: the deadline of each, on the clock.
        records: receives the record of each stage.
        write: writes the JSON, whenever a stage has saved.
        start: starts a stage, given its deadline and the ceilings.
        started: when the command began, on the clock.
    """

    waiting: list[Stage]
    ends: dict[str, float]
    records: dict[str, Record]
    write: Callable[[], None]
    start: Callable[[Stage, float, Record], Child]
    started: float
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    running: dict[Stage, Child] = dataclasses.field(default_factory=dict)

    def run(self) -> None:
        """Returns when all stages have ended."""
        try:
            while self.waiting or self.running:
                for stage, child in list(self.running.items()):
                    self._look_after(stage, child)
                for stage in list(self.waiting):
                    if self._may_start(stage):
                        self._begin(stage)
                self.sleep(POLL)
        finally:
            for stage, child in self.running.items():
                child.kill()
                self._finish(stage.name, FAILED, "the run was interrupted")

    def _may_start(self, stage: Stage) -> bool:
        """One stage runs at a time, in order, beside those in the background."""
        if stage.is_background:
            return True
        beside = [x for x in self.running if x.is_background]
        first = next(x for x in self.waiting if not x.is_background)
        ready = [self.records[x.name].get("results", {}).get("ready", ()) for x in beside]
        is_ready = all(stage.name in names for names in ready)
        is_late = self.now() - self.started >= stage.patience
        return stage is first and len(self.running) == len(beside) and (is_ready or is_late)

    def _begin(self, stage: Stage) -> None:
        self.waiting.remove(stage)
        now, last = self.now(), max(self.ends.values())
        start = round(now - self.started, 1)
        self.records[stage.name] = {"status": FAILED, "error": "no record", "start": start}
        if last - now < LEAST:
            return self._finish(stage.name, NOT_RUN, "no time was left")
        end = self.ends[stage.name] = min(last, max(self.ends[stage.name], now + LEAST))
        measured = self.records.get("ceilings", {}).get("results", {})
        ceilings = {key: rate for key, rate in measured.items() if key.endswith("per_second")}
        self.running[stage] = self.start(stage, end, ceilings)
        return None

    def _look_after(self, stage: Stage, child: Child) -> None:
        """Writes what the stage has saved, and ends it if it has finished or overruns."""
        status, record = child.exit_status(), self.records[stage.name]
        before = dict(record)
        record |= child.record()
        if record != before:
            self.write()
        if status is None and self.now() < self.ends[stage.name] + GRACE:
            return
        child.kill()
        del self.running[stage]
        if status == 0:
            self._finish(stage.name, record["status"], record["error"])
        elif status is None:
            self._finish(stage.name, FAILED, "it was ended at the end of its share")
        else:
            self._finish(stage.name, FAILED, f"its process ended with status {status}")

    def _finish(self, name: str, status: str, error: str | None) -> None:
        now, record = self.now() - self.started, self.records[name]
        record |= {"status": status, "error": error, "seconds": round(now - record["start"], 1)}
        self.write()
        print(f"{now:4.0f} s  {name} {status}{f': {error}' if error else ''}"[:110], flush=True)


def deadlines(plan: Sequence[Stage], begin: float, end: float) -> dict[str, float]:
    """When each stage's share ends. More time lengthens all shares by the same factor; less leaves
    the last stages without time."""
    foreground = [stage for stage in plan if not stage.is_background]
    factor = max(1.0, (end - begin) / sum(stage.seconds for stage in foreground or plan))
    found, total = {}, 0.0
    for stage in plan:
        total += 0.0 if stage.is_background else stage.seconds
        share = stage.seconds if stage.is_background else total
        found[stage.name] = min(begin + factor * share, end)
    return found
