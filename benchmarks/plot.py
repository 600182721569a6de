"""The benchmarks as a picture: how many times faster ours is than each peer, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

TICKS = (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50)
_MARKERS = "osD^vPX*"


def plot(path: Path, cases: Sequence[dict[str, Any]], title: str) -> None:
    """Draw ratios peer / ours with their quartiles, logarithmic, one row per case of the JSON.

    Ratios that are null (NaN or infinite before they were written to the file) have no mark.
    """
    beside = {case["case"]: case["peers"] | case["yardsticks"] for case in reversed(cases)}
    shown = [name for name, others in beside.items() if others]
    names = list(dict.fromkeys(name for case in reversed(shown) for name in beside[case]))
    figure = Figure(figsize=(9, 1.6 + 0.36 * len(shown)), dpi=130, layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        points = [
            (row, beside[case][name]["ratio"])
            for row, case in enumerate(shown)
            if name in beside[case] and None not in beside[case][name]["ratio"].values()
        ]
        medians = [ratio["median"] for _, ratio in points]
        low = [ratio["median"] - ratio["q1"] for _, ratio in points]
        high = [ratio["q3"] - ratio["median"] for _, ratio in points]
        axes.errorbar(
            medians,
            [row for row, _ in points],
            xerr=(low, high),
            fmt=_MARKERS[i % len(_MARKERS)],
            markersize=6,
            capsize=2,
            label=name,
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_yticks(range(len(shown)), shown, fontsize=8)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.set_xlabel("times faster than … (peer / ours; right of 1 ours is faster)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=min(len(names), 7) or 1, fontsize=8)
    figure.savefig(path)
