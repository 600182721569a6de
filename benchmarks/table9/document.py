"""The table as Markdown: `python -m benchmarks.table9.document FILE.json` updates README.md and
docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import OURS
from benchmarks.cases.layer import HF, HIDDEN_STATES
from benchmarks.table9.contenders import WHOLE
from benchmarks.table9.costs import PAPER, VANILLA_CACHED, VANILLA_EAGER, VANILLA_SDPA
from benchmarks.tables import NOTHING, ROOT, renew

MARK = "table9"
# Rows of README.md: each preset with its own number of layers.
README_LAYERS = {"enwik8_large": 24, "enwik8_base": 12}

README_COLUMNS = (
    "widths",
    "layers",
    "attention length",
    "ours, ms per token",
    "vanilla / ours",
    "by operations",
    "in the paper, on a GPU",
)
DOCS_COLUMNS = (
    "widths",
    "layers",
    "attention length",
    "ours, ms per token",
    "vanilla, SDPA / ours",
    "by operations",
    "in the paper",
    "vanilla, eager / ours",
    "vanilla, cached / ours",
    "hf / ours",
    "by operations",
    "hidden states / ours",
    "by operations",
    "whole model of ours, ms per token",
)

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table9.document", description=__doc__
    )
    parser.add_argument("results", type=Path, help="JSON file of `python -m benchmarks table9`")
    path: Path = parser.parse_args().results
    document = json.loads(path.read_text(encoding="utf-8"))
    renew(ROOT / "README.md", MARK, readme_table(document, path.name))
    renew(ROOT / "docs" / "benchmarks.md", MARK, markdown(document, path.name))


def readme_table(document: Record, source: str) -> str:
    """Ours and the vanilla Transformer with SDPA, and the picture of all models."""
    rows = [
        _line(
            *_first_cells(row),
            _ratio(row, VANILLA_SDPA),
            _by_operations(row, VANILLA_SDPA),
            _paper(row),
        )
        for row in document["rows"]
        if README_LAYERS[row["preset"]] == row["n_layer"]
    ]
    picture = f"benchmarks/results/{Path(source).with_suffix('.png')}"
    image = f"![Milliseconds per token against the attention length]({picture})"
    return "\n".join([*_head(README_COLUMNS), *rows, "", _caption(document, source), "", image])


def markdown(document: Record, source: str) -> str:
    """Every row, with the quartiles of the ratios."""
    rows = [
        _line(
            *_first_cells(row),
            _spread(row, VANILLA_SDPA),
            _by_operations(row, VANILLA_SDPA),
            _paper(row),
            _spread(row, VANILLA_EAGER),
            _spread(row, VANILLA_CACHED),
            _spread(row, HF),
            _by_operations(row, HF),
            _spread(row, HIDDEN_STATES),
            _by_operations(row, HIDDEN_STATES),
            _ms(row, WHOLE),
        )
        for row in document["rows"]
    ]
    notes = [f"Not measured: {name}: {note}." for name, note in document["notes"].items()]
    return "\n".join([*_head(DOCS_COLUMNS), *rows, "", _caption(document, source), *notes])


def figure(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _head(columns: Sequence[str]) -> list[str]:
    return [_line(*columns), f"|{'---|' * len(columns)}"]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _first_cells(row: Record) -> tuple[str, ...]:
    return (f"`{row['preset']}`", str(row["n_layer"]), f"{row['length']:,}", _ms(row, OURS))


def _ms(row: Record, model: str) -> str:
    if model not in row["seconds"]:
        return NOTHING
    return _mark(row) + figure(row["seconds"][model]["median"] * 1e3)


def _ratio(row: Record, model: str) -> str:
    if model not in row["ratio"]:
        return NOTHING
    return _mark(row) + figure(row["ratio"][model]["median"])


def _spread(row: Record, model: str) -> str:
    if model not in row["ratio"]:
        return NOTHING
    found = row["ratio"][model]
    return f"{_ratio(row, model)} [{figure(found['q1'])}, {figure(found['q3'])}]"


def _by_operations(row: Record, model: str) -> str:
    return figure(row["flop_ratio"][model])


def _paper(row: Record) -> str:
    return f"{PAPER[row['length']]:,}" if row["length"] in PAPER else NOTHING


def _mark(row: Record) -> str:
    return "" if row["quiet"] else "~"


def _caption(document: Record, source: str) -> str:
    machine = document["machine"]
    return (
        f"Measured on an {machine['processor']}, {machine['threads']} threads, float32, torch "
        f'{machine["torch"]}, batch 1. "By operations": the ratio of the '
        f"floating-point operations. `~`: the machine was not quiet. "
        f"From `benchmarks/results/{source}`."
    )


if __name__ == "__main__":
    main()
