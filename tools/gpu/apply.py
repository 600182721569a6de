"""`python -m tools.gpu.apply RESULT.json`: writes the sweep's rows into the launch table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from txl_kernels.backends.triton import launch_table


def main(result: Path, table: Path = launch_table.PATH) -> None:
    """Replaces the rows and prints them; their reason names the device."""
    report = json.loads(result.read_text(encoding="utf-8"))
    rows: list[dict[str, object]] = report["stages"]["sweep"]["results"]["rows"]
    rows = [row | {"why": f"{report['machine']['device']}: {row['why']}"} for row in rows]
    launch_table.replace_rows(table, rows)
    print(*rows, f"{len(rows)} rows written to {table}", sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
