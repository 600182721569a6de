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
BUILD = ROOT / "build" / "gpu"  # the native build, and a log of each stage
MARGIN = 6.0  # seconds of the budget for ending the last stage, writing and printing

PASSED, FAILED, SKIPPED, NOT_RUN = "passed", "failed", "skipped", "not run"


class UnavailableError(Exception):
    """This machine cannot run the stage; the message is the reason. Not a failure of a kernel."""


@dataclasses.dataclass
class Context:
    """The interface between the runner and a stage.

    Attributes:
        results: this stage's part of the JSON. `results["summary"]`, a list of lines, is printed
            after the verdict if the stage sets it; `results["verified"]`, a dict from the hash of
            a kernel to its name, lists kernels that passed and need no self-test on this device.
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


@dataclasses.dataclass(frozen=True)
class Stage:
    """Module `tools.gpu.<name>`, which has a function `run(context)`.

    Attributes:
        seconds: its share; time that earlier stages did not use is added.
        background: it runs beside the other stages, from the start.
        patience: seconds since the start of the run, until which the stage waits for the stage
            compile to list it as "ready": its launches are compiled.
        alone: it starts when no stage runs in the background, since it measures times.
    """

    name: str
    seconds: float
    background: bool = False
    patience: float = 0.0
    alone: bool = False


FIRST_CALL = (
    Stage("compile", 75, background=True),
    Stage("ceilings", 10),
    Stage("parity", 80, patience=40),
    Stage("timings", 80, alone=True),
    Stage("sweep", 50, alone=True),
    Stage("memory", 20 - MARGIN, alone=True),
)
LATER = (
    Stage("full_parity", 240, alone=True),
    Stage("ncu", 100, alone=True),
    Stage("sanitizer", 200, alone=True),
    Stage("training", 120, alone=True),
    Stage("cpu_threads", 120, alone=True),
)
STAGES = {stage.name: stage for stage in (*FIRST_CALL, *LATER)}


def read_json(path: Path) -> dict[str, Any]:
    """The document at `path`; an empty one if there is none."""
    document: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return document


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a temporary file and renames it, so that `path` is always a whole document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
