"""The process of one stage: `python -m tools.gpu.child FUNCTION DEVICE DEADLINE RECORD`."""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from tools.gpu.stages import FAILED, PASSED, SKIPPED, Context, UnavailableError, write_json


def run_stage(function: str, device: str, deadline: float, record: Path) -> None:
    """Runs the stage and writes {"status", "error", "results"} whenever it saves. If it passes on
    a GPU, the hashes of the verified kernels go into the package.

    Args:
        deadline: end of the stage's share on the monotonic clock, which processes share.
    """
    results: dict[str, Any] = {}

    def save(status: str = FAILED, error: str | None = "it did not finish") -> None:
        write_json(record, {"status": status, "error": error, "results": results})

    try:
        module, _, name = function.partition(":")
        run = getattr(importlib.import_module(module), name)
        run(Context(results, save, lambda: deadline - time.monotonic(), torch.device(device)))
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


if __name__ == "__main__":
    run_stage(sys.argv[1], sys.argv[2], float(sys.argv[3]), Path(sys.argv[4]))
