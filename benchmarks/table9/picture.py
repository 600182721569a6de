"""The picture: milliseconds per token over the attention length, a panel for each width.

    python -m benchmarks.table9.picture FILE.json …

draws FILE.png again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.cases import OURS
from benchmarks.cases.layer import HF, HIDDEN_STATES
from benchmarks.table9.costs import VANILLA_CACHED, VANILLA_EAGER, VANILLA_SDPA
from benchmarks.table9.document import README_LAYERS, figure

# Colour (Okabe and Ito's palette), marker and name of each model, the slowest first.
STYLES = {
    VANILLA_EAGER: ("#CC79A7", "v", "vanilla, recomputed, eager"),
    VANILLA_SDPA: ("#D55E00", "s", "vanilla, recomputed, SDPA"),
    HF: ("#E69F00", "D", "Hugging Face's TransfoXL"),
    HIDDEN_STATES: ("#56B4E9", "^", "ours, hidden states"),
    VANILLA_CACHED: ("#009E73", "P", "vanilla, cached, first window only"),
    OURS: ("#0072B2", "o", "ours, KeyValueWindow"),
}
INK, MUTED = "#222222", "#666666"

Record = dict[str, Any]


def main() -> None:
    for name in sys.argv[1:]:
        plot(Path(name))


def plot(path: Path) -> None:
    """Writes the picture of the JSON file `path` beside it."""
    drawn(json.loads(path.read_text(encoding="utf-8"))).savefig(path.with_suffix(".png"))


def drawn(document: Record) -> Figure:
    """The picture of the JSON `document` of a run."""
    presets = list(dict.fromkeys(row["preset"] for row in document["rows"]))
    drawing = Figure(figsize=(5.2 * max(len(presets), 1.6), 5.4), dpi=150, facecolor="white")
    drawing.subplots_adjust(left=0.08, right=0.97, top=0.84, bottom=0.27, wspace=0.2)
    drawing.text(0.02, 0.94, "Cost of a token in evaluation", fontsize=15, weight="bold", color=INK)
    panels = drawing.subplots(1, len(presets), squeeze=False)[0]
    for axes, preset in zip(panels, presets, strict=True):
        n_layer = README_LAYERS[preset]
        rows = [
            row for row in document["rows"] if (row["preset"], row["n_layer"]) == (preset, n_layer)
        ]
        _draw(axes, sorted(rows, key=lambda row: int(row["length"])))
        axes.set_title(f"{preset}, {n_layer} layers", loc="left", fontsize=11, color=INK)
    panels[0].set_ylabel("ms per token", color=INK)
    lines, names = panels[0].get_legend_handles_labels()
    drawing.legend(
        lines,
        names,
        loc="lower center",
        ncols=3,
        fontsize=9,
        frameon=False,
        bbox_to_anchor=(0.5, 0.06),
    )
    drawing.text(0.02, 0.02, _where(document), fontsize=8, color=MUTED)
    return drawing


def _where(document: Record) -> str:
    machine = document["machine"]
    is_quiet = all(row["quiet"] for row in document["rows"])
    return (
        f"{machine['processor']}, {machine['threads']} threads, float32, torch "
        f"{machine['torch']}, batch 1; {document['date']}"
        f"{'' if is_quiet else '; the machine was not quiet'}"
    )


def _draw(axes: Axes, rows: list[Record]) -> None:
    """A line for each model, and how many times the vanilla model with SDPA costs ours."""
    for name, (color, marker, label) in STYLES.items():
        points = [
            (row["length"], row["seconds"][name]["median"] * 1e3)
            for row in rows
            if name in row["seconds"]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=label)
    for row in rows:
        x, y = row["length"], row["seconds"][VANILLA_SDPA]["median"] * 1e3
        axes.annotate(
            f"{figure(row['ratio'][VANILLA_SDPA]['median'])}×",
            (x, y),
            (0, -14),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=STYLES[VANILLA_SDPA][0],
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xticks([row["length"] for row in rows])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("attention length in tokens", color=INK)
    axes.grid(axis="y", alpha=0.3)
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
