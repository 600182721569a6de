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
    """The interface between the runner and a stage.

    Attributes:
        results: this stage's part of the JSON. Lines in `results["summary"]` are printed after the
            verdict. `results["verified"]` maps the hash of each kernel that passed, and needs no
            self-test on this kind of device, to its name.
        save: writes `results` to the JSON; call it after each finding.
        seconds_left: seconds until this stage's share of the budget ends.
        device: the GPU; in a rehearsal the CPU, on which a stage runs the same code at tiny shapes.
        ceilings: "copy_bytes_per_second" and "gemm_flop_per_second"; empty if not measured.
    """

    results: dict[str, Any]
    save: Callable[[], None]
    seconds_left: Callable[[], float]
    device: torch.device
    ceilings: Mapping[str, float]

    @property
    def is_rehearsal(self) -> bool:
        return self.device.type == "cpu"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the run: `function`, as "module:name"; `run` in the module of its name if empty.

    Attributes:
        seconds: its share; time that earlier stages did not use is added.
        is_background: it runs beside the other stages, from the start.
        patience: seconds since the start, until which it waits for a stage in the background to
            list it in its results as "ready"; by default until that stage has ended.
    """

    name: str
    seconds: float
    function: str = ""
    is_background: bool = False
    patience: float = float("inf")


FIRST_CALL = (
    Stage("compile", 75, is_background=True),
    Stage("ceilings", 25, patience=0),
    Stage("parity", 65, "tools.gpu.verified:parity", patience=40),
    Stage("timings", 80),
    Stage("sweep", 50),
    Stage("memory", 20 - MARGIN),
)
LATER = (
    Stage("full_parity", 240, "tools.gpu.programs:full_parity"),
    Stage("ncu", 100, "tools.gpu.programs:ncu"),
    Stage("sanitizer", 200, "tools.gpu.programs:sanitizer"),
    Stage("training", 120),
    Stage("cpu_threads", 120),
)
STAGES = {stage.name: stage for stage in (*FIRST_CALL, *LATER)}


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a temporary file and renames it, so that `path` is always a whole document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
