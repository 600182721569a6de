"""`python -m tools.gpu.child STAGE RECORD DEADLINE DEVICE CEILINGS`: runs one stage, here."""

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
    stage: str, record: Path, deadline: float, device: str, ceilings: dict[str, float]
) -> None:
    """Writes {"status", "error", "results"} to `record`, whatever happens.

    Args:
        deadline: end of the stage's share on the monotonic clock, which processes share.
    """
    results: dict[str, Any] = {}

    def save(status: str = FAILED, error: str | None = "it did not finish") -> None:
        write_json(record, {"status": status, "error": error, "results": results})

    save()
    try:
        import torch

        module = importlib.import_module(f"tools.gpu.{stage}")
        context = Context(
            results=results,
            save=save,
            seconds_left=lambda: deadline - time.monotonic(),
            device=torch.device(device),
            ceilings=ceilings,
        )
        module.run(context)
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
    name, path, end, place, rates = sys.argv[1:]
    main(name, Path(path), float(end), place, json.loads(rates))
