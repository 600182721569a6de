"""The stages of `make gpu`, their shares of the budget, and the context that each one receives."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"  # the native build; record and log of each stage
MARGIN = 6.0  # seconds of the budget for ending the last stage, writing and printing
PASSED, FAILED, SKIPPED, NOT_RUN = "passed", "failed", "skipped", "not run"


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
