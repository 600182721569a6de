"""The stages of `make gpu`, and the runner, which gives each one a process and its share of the
budget, and ends those that overrun."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tools.gpu import STARTED
from txl_kernels.backends.triton import interprets
from txl_kernels.testing.interpreter import faster_interpreter

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"  # record and log of each stage
MARGIN = 6.0  # seconds of the budget for ending the last stage, writing and printing
PASSED, FAILED, SKIPPED, NOT_RUN = "passed", "failed", "skipped", "not run"
LEAST = 5.0  # seconds of a stage; with less before the end of the run, it is not started
GRACE = 2.0  # seconds after a stage's deadline until its process is killed
POLL = 0.1
CHILD = "import sys; from tools.gpu.runner import run_stage; run_stage(*sys.argv[1:])"


class UnavailableError(Exception):
    """This machine cannot run the stage; the message is the reason. Not a failure of a kernel."""


@dataclasses.dataclass
class Context:
    """The interface between the runner and a stage. A stage raises UnavailableError if this machine
    cannot run it, and another error if a check fails.

    Attributes:
        results: this stage's part of the JSON. The lines of "summary" are printed; "verified" has
            {hash: name} of the kernels that need no self-test on this kind of device.
        save: keeps `results` in case the stage is ended; call it after each finding.
        seconds_left: seconds until this stage's share of the budget ends.
        device: the GPU; in a rehearsal the CPU, on which a stage runs the same code at tiny shapes.
    """

    results: dict[str, Any]
    save: Callable[[], None]
    seconds_left: Callable[[], float]
    device: torch.device

    @property
    def is_rehearsal(self) -> bool:
        return self.device.type == "cpu"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        function: "module:name"; it receives a `Context`.
        seconds: its share; time that earlier stages did not use is added.
        beside: an earlier stage that may still run when this one starts; all others have ended.
    """

    name: str
    function: str
    seconds: float
    beside: str | None = None


FIRST_CALL = (
    Stage("compile", "tools.gpu.compile:run", 60),
    Stage("ceilings", "tools.gpu.timings:ceilings", 25, beside="compile"),
    Stage("compile_sweep", "tools.gpu.compile:run_sweep", 40),
    Stage("parity", "tools.gpu.parity:run", 40, beside="compile_sweep"),
    Stage("timings", "tools.gpu.timings:run", 70),
    Stage("sweep", "tools.gpu.sweep:run", 50),
    Stage("memory", "tools.gpu.memory:run", 20 - MARGIN),
)
LATER = (
    Stage("full_parity", "tools.gpu.programs:full_parity", 240),
    Stage("ncu", "tools.gpu.programs:ncu", 100),
    Stage("sanitizer", "tools.gpu.programs:sanitizer", 200),
    Stage("training", "tools.gpu.training:run", 120),
    Stage("cpu_threads", "tools.gpu.timings:cpu_threads", 120),
)
STAGES = {stage.name: stage for stage in (*FIRST_CALL, *LATER)}


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a temporary file and renames it, so that `path` is always a whole document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def run_stage(function: str, device: str, deadline: str, record: str) -> None:
    """Runs a stage in this process and writes {"status", "error", "results"} whenever it saves. If
    it passes on a GPU, the hashes of the verified kernels go into the package.

    `deadline` is the end of its share on the monotonic clock, which processes share.
    """
    results: dict[str, Any] = {}

    def save(status: str = FAILED, error: str | None = "it did not finish") -> None:
        write_json(Path(record), {"status": status, "error": error, "results": results})

    try:
        module, _, name = function.partition(":")
        run = getattr(importlib.import_module(module), name)
        end = float(deadline)
        interpreted = faster_interpreter() if device == "cpu" and interprets() else None
        with interpreted or contextlib.nullcontext():
            run(Context(results, save, lambda: end - time.monotonic(), torch.device(device)))
        if device != "cpu" and results.get("verified"):
            from txl_kernels.backends.verification.records import write_shipped

            write_shipped(torch.cuda.get_device_name(), results["verified"])
    except UnavailableError as error:
        save(SKIPPED, str(error))
    except Exception as error:
        traceback.print_exc()
        save(FAILED, f"{type(error).__name__}: {error}")
    else:
        save(PASSED, None)


class StageProcess:
    """A running stage; its record and its output are files in build/gpu."""

    def __init__(self, stage: Stage, deadline: float, device: str) -> None:
        self._record = BUILD / f"{stage.name}.json"
        write_json(self._record, {"status": FAILED, "error": "it did not start", "results": {}})
        paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        if device != "cpu" or stage.name.startswith("compile"):
            environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-c", CHILD, stage.function, device]
        command += [str(deadline), str(self._record)]
        with self._record.with_suffix(".log").open("wb") as log:
            output = {"stdout": log, "stderr": log, "start_new_session": True}
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, **output)
        self.exit_status = self._process.poll

    def record(self) -> dict[str, Any]:
        return dict(json.loads(self._record.read_text(encoding="utf-8")))

    def kill(self) -> None:
        """Ends the process and its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)  # not longer: a process can hang in the driver


@dataclasses.dataclass
class Run:
    """All stages of one run."""

    device: str  # "cuda"; "cpu" in a rehearsal
    deadlines: dict[str, float]  # of each stage, on the monotonic clock
    records: dict[str, dict[str, Any]]  # receives start, seconds, status, error and results
    write: Callable[[], None]  # writes the JSON
    running: dict[str, StageProcess] = dataclasses.field(default_factory=dict)

    def run(self, plan: Sequence[Stage]) -> None:
        """Runs the stages in order; returns when all have ended."""
        try:
            for stage in plan:
                while self.running.keys() - {stage.beside}:
                    self._wait()
                self._begin(stage)
            while self.running:
                self._wait()
        finally:
            for name in list(self.running):
                self._end(name, "the run was interrupted")

    def _begin(self, stage: Stage) -> None:
        name, now, last = stage.name, time.monotonic(), max(self.deadlines.values())
        self.records[name] = {"start": round(now - STARTED, 1)}
        if last - now < LEAST:
            self._finish(name, {"status": NOT_RUN, "error": "no time was left"})
            return
        self.deadlines[name] = min(last, max(self.deadlines[name], now + LEAST))
        self.running[name] = StageProcess(stage, self.deadlines[name], self.device)

    def _wait(self) -> None:
        """Waits for a moment; then ends the stages that have finished or overrun."""
        time.sleep(POLL)
        for name, process in list(self.running.items()):
            status = process.exit_status()
            if status is not None:
                self._end(name, f"its process ended with status {status}" if status else None)
            elif time.monotonic() >= self.deadlines[name] + GRACE:
                self._end(name, "it was ended at the end of its share")

    def _end(self, name: str, error: str | None) -> None:
        process = self.running.pop(name)
        process.kill()
        failure = {"status": FAILED, "error": error} if error else {}
        self._finish(name, process.record() | failure)

    def _finish(self, name: str, found: dict[str, Any]) -> None:
        record, now = self.records[name], time.monotonic() - STARTED
        record |= {"seconds": round(now - record["start"], 1), **found}
        self.write()
        error = f": {record['error']}" if record["error"] else ""
        print(f"{now:4.0f} s  {name} {record['status']}{error}"[:110], flush=True)


def deadlines(plan: Sequence[Stage], begin: float, end: float) -> dict[str, float]:
    """When each stage's share ends. More time lengthens all shares by the same factor; less leaves
    the last stages without time."""
    starts: dict[str | None, float] = {}
    ends: dict[str, float] = {}
    for stage in plan:
        starts[stage.name] = starts.get(stage.beside, max(ends.values(), default=0.0))
        ends[stage.name] = starts[stage.name] + stage.seconds
    factor = max(1.0, (end - begin) / max(ends.values()))
    return {name: min(begin + factor * seconds, end) for name, seconds in ends.items()}
