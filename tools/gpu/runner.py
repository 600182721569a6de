"""Starts the stages, each in a process of its own, and ends those that overrun."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tools.gpu import STARTED, stages
from tools.gpu.stages import FAILED, NOT_RUN, ROOT, Stage, write_json

LEAST = 5.0  # seconds of a stage; with less before the end of the run, it is not started
GRACE = 2.0  # seconds after a stage's deadline until its process is killed
POLL = 0.1


class StageProcess:
    """A running stage; its record and its output are files in build/gpu."""

    def __init__(self, stage: Stage, deadline: float, device: str) -> None:
        self._record = stages.BUILD / f"{stage.name}.json"
        write_json(self._record, {"status": FAILED, "error": "it did not start", "results": {}})
        paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        if device != "cpu" or stage.name.startswith("compile"):
            environment.pop("TRITON_INTERPRET", None)
        arguments = [stage.function, device, str(deadline), str(self._record)]
        with self._record.with_suffix(".log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tools.gpu.child", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.exit_status = self._process.poll

    def record(self) -> dict[str, Any]:
        return dict(json.loads(self._record.read_text(encoding="utf-8")))

    def kill(self) -> None:
        """Ends the process and its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)  # not longer: a process can hang in the driver


class Runner:
    """All stages of one run.

    Args:
        plan: the stages in order.
        device: "cuda"; "cpu" for a rehearsal.
        end: when all must have ended, on the monotonic clock.
        records: receives {"start", "seconds", "status", "error", "results"} of each stage.
        write: writes the JSON.
    """

    def __init__(
        self,
        plan: Sequence[Stage],
        device: str,
        end: float,
        records: dict[str, dict[str, Any]],
        write: Callable[[], None],
    ) -> None:
        self._plan, self._device, self._end = plan, device, end
        self._records, self._write = records, write
        self._deadlines = deadlines(plan, time.monotonic(), end)
        self._running: dict[str, StageProcess] = {}

    def run(self) -> None:
        """Returns when all stages have ended."""
        try:
            for stage in self._plan:
                while self._running.keys() - {stage.beside}:
                    self._wait()
                self._begin(stage)
            while self._running:
                self._wait()
        finally:
            for name in list(self._running):
                self._stop(name, "the run was interrupted")

    def _begin(self, stage: Stage) -> None:
        now = time.monotonic()
        self._records[stage.name] = {"start": round(now - STARTED, 1)}
        if self._end - now < LEAST:
            self._finish(stage.name, {"status": NOT_RUN, "error": "no time was left"})
            return
        deadline = min(self._end, max(self._deadlines[stage.name], now + LEAST))
        self._deadlines[stage.name] = deadline
        self._running[stage.name] = StageProcess(stage, deadline, self._device)

    def _wait(self) -> None:
        """Waits for a moment; then stops the stages that have ended or overrun."""
        time.sleep(POLL)
        for name, process in list(self._running.items()):
            status = process.exit_status()
            if status is not None:
                self._stop(name, f"its process ended with status {status}" if status else None)
            elif time.monotonic() >= self._deadlines[name] + GRACE:
                self._stop(name, "it was ended at the end of its share")

    def _stop(self, name: str, error: str | None) -> None:
        process = self._running.pop(name)
        process.kill()
        failure = {"status": FAILED, "error": error} if error else {}
        self._finish(name, process.record() | failure)

    def _finish(self, name: str, found: dict[str, Any]) -> None:
        record, now = self._records[name], time.monotonic() - STARTED
        record |= {"seconds": round(now - record["start"], 1), **found}
        self._write()
        error = f": {record['error']}" if record["error"] else ""
        print(f"{now:4.0f} s  {name} {record['status']}{error}"[:110], flush=True)


def deadlines(plan: Sequence[Stage], begin: float, end: float) -> dict[str, float]:
    """When each stage's share ends. More time lengthens all shares by the same factor; less leaves
    the last stages without time."""
    planned: dict[str, tuple[float, float]] = {}  # start and end, in seconds
    last = 0.0
    for stage in plan:
        start = planned[stage.beside][0] if stage.beside in planned else last
        planned[stage.name] = start, start + stage.seconds
        last = max(last, start + stage.seconds)
    factor = max(1.0, (end - begin) / last)
    return {name: min(begin + factor * stop, end) for name, (_, stop) in planned.items()}
