"""`python -m benchmarks.gpu.child STAGE FILE`: one stage, in this process; its record in FILE."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import FAILED, PASSED, UNAVAILABLE, Unavailable, write_json


def main(stage: str, path: Path) -> None:
    """Runs the stage; `results` grows while it does, and is written whatever happens."""
    results: dict[str, Any] = {}

    def save(status: str, error: str | None) -> None:
        write_json(path, {"status": status, "error": error, "results": results})

    save(FAILED, "it did not finish")
    try:
        module = importlib.import_module(f"benchmarks.gpu.{stage}")
        module.run(results, lambda: save(FAILED, "it did not finish"))
    except Unavailable as error:
        save(UNAVAILABLE, str(error))
    except Exception as error:
        traceback.print_exc()
        save(FAILED, f"{type(error).__name__}: {error}")
    else:
        save(PASSED, None)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
