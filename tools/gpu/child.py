"""Runs a stage in a process of its own, and keeps its record in a file."""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
import traceback
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tools.gpu import stages
from tools.gpu.stages import FAILED, Context, Stage, UnavailableError, write_json

Ceilings = Mapping[str, float]


class Child:
    """A running stage. It writes {"status", "error", "results"} whenever it saves."""

    def __init__(self, stage: Stage, deadline: float, device: str, ceilings: Ceilings) -> None:
        self._path = stages.BUILD / f"{stage.name}.json"
        write_json(self._path, {"status": FAILED, "error": "it did not start", "results": {}})
        arguments = (stage, self._path, deadline, device, ceilings)
        self._process = get_context("spawn").Process(target=run_stage, args=arguments)
        self._process.start()

    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    def record(self) -> dict[str, Any]:
        return dict(json.loads(self._path.read_text(encoding="utf-8")))

    def kill(self) -> None:
        """Ends the process and its workers."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        except ProcessLookupError:  # it has not begun, or has ended
            self._process.kill()
        self._process.join(1)  # not longer: a process can hang in the driver


def run_stage(stage: Stage, record: Path, deadline: float, device: str, ceilings: Ceilings) -> None:
    """Runs the stage in this process; its output goes into a file beside `record`. If it passes,
    the hashes of the verified kernels go into the package.

    Args:
        deadline: end of the stage's share on the monotonic clock, which processes share.
    """
    os.setsid()
    with record.with_suffix(".log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    results: dict[str, Any] = {}

    def save(status: str = FAILED, error: str | None = "it did not finish") -> None:
        write_json(record, {"status": status, "error": error, "results": results})

    try:
        if device != "cpu" or stage.name == "compile":
            os.environ.pop("TRITON_INTERPRET", None)
        import torch

        module, _, name = (stage.function or f"tools.gpu.{stage.name}:run").partition(":")
        run = getattr(importlib.import_module(module), name)
        gpu = torch.device(device)
        run(Context(results, save, lambda: deadline - time.monotonic(), gpu, ceilings))
        if device != "cpu" and results.get("verified"):
            from txl_kernels.backends.verification.records import write_shipped

            write_shipped(torch.cuda.get_device_name(), results["verified"])
    except UnavailableError as error:
        save(stages.SKIPPED, str(error))
    except Exception as error:
        traceback.print_exc()
        save(FAILED, f"{type(error).__name__}: {error}")
    else:
        save(stages.PASSED, None)
