"""`python -m tools.gpu.child FUNCTION RECORD DEADLINE DEVICE CEILINGS`: runs one stage, here."""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tools.gpu.stages import FAILED, PASSED, SKIPPED, Context, UnavailableError, write_json


def main(
    function: str, record: Path, deadline: float, device: str, ceilings: dict[str, float]
) -> None:
    """Writes {"status", "error", "results"} to `record`, whatever happens.

    Args:
        deadline: end of the stage's share on the monotonic clock, which processes share.
    """
    results: dict[str, Any] = {}

    def save(status: str = FAILED, error: str | None = "it did not finish") -> None:
        write_json(record, {"status": status, "error": error, "results": results})

    def seconds_left() -> float:
        return deadline - time.monotonic()

    save()
    try:
        import torch

        module, _, name = function.partition(":")
        run = getattr(importlib.import_module(module), name)
        run(Context(results, save, seconds_left, torch.device(device), ceilings))
    except UnavailableError as error:
        save(SKIPPED, str(error))
    except Exception as error:
        traceback.print_exc()
        save(FAILED, f"{type(error).__name__}: {error}")
    else:
        save(PASSED, None)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5]))
