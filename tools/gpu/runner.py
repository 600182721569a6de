"""Starts the stages, ends those that overrun, and writes the JSON while they run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from tools.gpu.child import Child
from tools.gpu.stages import FAILED, NOT_RUN, Stage

LEAST = 5.0  # seconds of a stage; with less before the end of the run, it is not started
GRACE = 2.0  # seconds after a stage's deadline until its process is killed
POLL = 0.1

Record = dict[str, Any]  # {"status", "error", "results", "start", "seconds"}


@dataclasses.dataclass
class Run:
    """All stages of one run.

    Attributes:
        plan: the stages in order.
        ends: the deadline of each, on the clock.
        records: receives the record of each stage.
        write: writes the JSON, whenever a stage has saved.
        start: starts a stage, given its deadline and the ceilings.
        started: when the command began, on the clock.
    """

    plan: Sequence[Stage]
    ends: dict[str, float]
    records: dict[str, Record]
    write: Callable[[], None]
    start: Callable[[Stage, float, Record], Child]
    started: float
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    running: dict[Stage, Child] = dataclasses.field(default_factory=dict)

    def run(self) -> None:
        """Runs the stages in order, beside those in the background; returns when all have ended."""
        try:
            for stage in self.plan:
                while not (stage.is_background or self._is_ready(stage)):
                    self._look_after_all()
                self._begin(stage)
                while not stage.is_background and stage in self.running:
                    self._look_after_all()
            while self.running:
                self._look_after_all()
        finally:
            for stage, child in self.running.items():
                child.kill()
                self._finish(stage, FAILED, "the run was interrupted")

    def _look_after_all(self) -> None:
        self.sleep(POLL)
        for stage, child in list(self.running.items()):
            self._look_after(stage, child)

    def _is_ready(self, stage: Stage) -> bool:
        """Whether all stages in the background list this one, or it has waited long enough."""
        ready = [self.records[x.name].get("results", {}).get("ready", ()) for x in self.running]
        is_late = self.now() - self.started >= stage.patience
        return is_late or all(stage.name in names for names in ready)

    def _begin(self, stage: Stage) -> None:
        now, last = self.now(), max(self.ends.values())
        start = round(now - self.started, 1)
        self.records[stage.name] = {"status": FAILED, "error": "no record", "start": start}
        if last - now < LEAST:
            self._finish(stage, NOT_RUN, "no time was left")
            return
        end = self.ends[stage.name] = min(last, max(self.ends[stage.name], now + LEAST))
        measured = self.records.get("ceilings", {}).get("results", {})
        ceilings = {key: rate for key, rate in measured.items() if key.endswith("per_second")}
        self.running[stage] = self.start(stage, end, ceilings)

    def _look_after(self, stage: Stage, child: Child) -> None:
        """Writes what the stage has saved, and ends it if it has finished or overruns."""
        status, record, saved = child.exit_status(), self.records[stage.name], child.record()
        if record != record | saved:
            record |= saved
            self.write()
        if status is None and self.now() < self.ends[stage.name] + GRACE:
            return
        child.kill()
        del self.running[stage]
        if status == 0:
            self._finish(stage, record["status"], record["error"])
        else:
            how = "at the end of its share" if status is None else f"with status {status}"
            self._finish(stage, FAILED, f"its process was ended {how}")

    def _finish(self, stage: Stage, status: str, error: str | None) -> None:
        now, record = self.now() - self.started, self.records[stage.name]
        record |= {"status": status, "error": error, "seconds": round(now - record["start"], 1)}
        self.write()
        print(
            f"{now:4.0f} s  {stage.name} {status}{f': {error}' if error else ''}"[:110], flush=True
        )


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
