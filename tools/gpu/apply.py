"""`python -m tools.gpu.apply RESULT.json`: writes the sweep's rows into the launch table."""

from __future__ import annotations

import sys
from pathlib import Path

from tools.gpu.stages import read_json
from txl_kernels.backends.triton import launch_table


def main(result: Path) -> None:
    """Replaces the rows and prints them."""
    rows = read_json(result)["stages"]["sweep"]["results"]["rows"]
    launch_table.replace_rows(launch_table.PATH, rows)
    print(*rows, f"{len(rows)} rows written to {launch_table.PATH}", sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
