"""The picture of a run: two panels with logarithmic axes, one line for each side.

    python -m benchmarks.long_context.picture FILE.json …

draws FILE.png again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.long_context.worker import ORIGINAL, PATCHED, SIDES

# Vermilion and blue of Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = {ORIGINAL: "#D55E00", PATCHED: "#0072B2"}
MARKERS = {ORIGINAL: "s", PATCHED: "o"}
NAMES = {ORIGINAL: "Hugging Face, sdpa", PATCHED: "patched"}
INK, MUTED = "#222222", "#666666"

Record = dict[str, Any]  # a measurement or a stop of the JSON


@dataclasses.dataclass(frozen=True)
class Panel:
    """A quantity over length.

    Attributes:
        value: of a measurement; of a stop, from its prediction.
        show: a value as text.
        gain: the word after the ratio of both sides at the largest length that both reached.
        small_is_good: whether the original is the upper line.
        ticks: base and factors of the vertical axis.
    """

    title: str
    value: Callable[[Record], float]
    show: Callable[[float], str]
    gain: str
    small_is_good: bool = True
    ticks: tuple[float, tuple[float, ...]] = (10, (1, 2, 5))


def gibibytes(value: float) -> str:
    """Such as 430 MiB or 2.3 GiB."""
    return f"{value * 1024:.0f} MiB" if value < 1 else f"{value:.3g} GiB"


def seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 10 else f"{value:.2g} s"


def tokens_per_second(value: float) -> str:
    return f"{value:,.0f}"


MEMORY = Panel(
    "Peak memory beyond the weights", lambda x: x["peak_gib"], gibibytes, "less", ticks=(2, (1,))
)
SPEED = Panel(
    "Training speed, tokens/s",
    lambda x: x["length"] / x["seconds"],
    tokens_per_second,
    "as fast",
    small_is_good=False,
)
TIME = Panel("Time", lambda x: x["seconds"], seconds, "as fast")
PANELS = {"tokens": (MEMORY, SPEED), "minutes": (MEMORY, TIME)}


def plot(path: Path) -> None:
    """Writes the picture of the JSON file `path` beside it."""
    drawn(json.loads(path.read_text(encoding="utf-8"))).savefig(path.with_suffix(".png"))


def drawn(document: Record) -> Figure:
    """The picture of the JSON `document` of a run."""
    figure = Figure(figsize=(10.4, 5.2), dpi=150, facecolor="white")
    figure.subplots_adjust(left=0.075, right=0.955, top=0.755, bottom=0.19, wspace=0.33)
    work, computer = document["workload"], document["machine"]
    figure.text(0.02, 0.945, work["title"], fontsize=15, weight="bold", color=INK)
    figure.text(0.02, 0.895, work["details"], fontsize=9.5, color=MUTED)
    for axes, panel in zip(figure.subplots(1, 2), PANELS[work["unit"]], strict=True):
        _draw(axes, panel, document)
    threads = f"{computer['threads']} thread{'s' * (computer['threads'] > 1)}"
    where = (
        f"{computer['processor']}, {threads}, {computer['memory_gib']:.0f} GiB; float32, "
        f"torch {computer['torch']}, transformers {document['transformers']}; {document['date']}"
    )
    figure.text(0.02, 0.02, f"{where}\n{_stops(document)}", fontsize=8, color=MUTED)
    return figure


def length_name(length: float, unit: str) -> str:
    """Such as 32k for tokens, or 10 for minutes."""
    if unit == "tokens" and length >= 1024:
        return f"{length / 1024:g}k"
    return f"{length:g}"


def _stops(document: Record) -> str:
    """Which lengths were not run, and why."""
    unit, stops = document["workload"]["unit"], document["stops"]
    parts = [
        f"{NAMES[stop['side']]}: {length_name(stop['length'], unit)} {unit} {stop['reason']}"
        for stop in stops
    ]
    is_predicted = any(stop["seconds"] is not None for stop in stops)
    return "; ".join(parts) + ". Hollow marks are predictions." * is_predicted


def _draw(axes: Axes, panel: Panel, document: Record) -> None:
    by_side = {
        side: [run for run in document["measurements"] if run["side"] == side] for side in SIDES
    }
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for side, runs in by_side.items():
        if runs:
            stops = [stop for stop in document["stops"] if stop["side"] == side]
            _line(axes, panel, side, runs, stops)
    if panel is MEMORY:
        _machine_line(axes, document)
    _ratio(axes, panel, by_side, document["workload"]["unit"])
    _finish(axes, panel, document["workload"])


def _line(axes: Axes, panel: Panel, side: str, runs: list[Record], stops: list[Record]) -> None:
    """The measured points with their values, the predicted point, and the name of the side."""
    color, marker = COLORS[side], MARKERS[side]
    points = [(run["length"], panel.value(run)) for run in runs]
    predicted = [(s["length"], panel.value(s)) for s in stops if s["seconds"] is not None]
    style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 6.5}
    axes.plot(*zip(*points, strict=True), **style, linewidth=2.2, zorder=3)
    for point in predicted:
        line = zip(points[-1], point, strict=True)
        axes.plot(*line, color=color, linestyle=":", linewidth=1.6)
        axes.plot(*point, **style, markerfacecolor="white")
    place = _place(side, panel)
    for i, (x, y) in enumerate((*points, *predicted)):
        sign = "~" if i >= len(points) else ""
        _text(axes, x, y, sign + panel.show(y), place, color=color)
    # The original's line leaves room at its end, the patched one's at its beginning.
    x, y = (*points, *predicted)[-1] if side == ORIGINAL else points[0]
    beyond = (place[0], place[1] + (14 if place[1] > 0 else -14))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    _text(axes, x, y, NAMES[side], beyond, color=color, size=10.5, weight="bold", bbox=box)


def _place(side: str, panel: Panel) -> tuple[int, int]:
    """Where the labels of a side are, in points from theirs: on its free side of rising lines
    (memory and time) and of falling ones (speed)."""
    is_original = side == ORIGINAL
    if panel.small_is_good:
        return (-8, 6) if is_original else (8, -6)
    return (-8, -6) if is_original else (7, 7)


def _text(axes: Axes, x: float, y: float, text: str, place: tuple[int, int], **font: Any) -> None:
    """`text` beside a point, on a white edge that interrupts the lines below it."""
    style: dict[str, Any] = {
        "size": 8.5,
        "ha": "left" if place[0] > 0 else "right",
        "va": "center",
    } | font
    edge = [withStroke(linewidth=2.5, foreground="white")]
    axes.annotate(
        text, (x, y), place, textcoords="offset points", zorder=4, path_effects=edge, **style
    )


def _machine_line(axes: Axes, document: Record) -> None:
    """A horizontal line at the machine's whole memory."""
    total = document["machine"]["memory_gib"]
    axes.axhline(total, color=MUTED, linewidth=1, linestyle="--")
    style: dict[str, Any] = {"size": 8.5, "color": MUTED, "ha": "left", "va": "center"}
    axes.annotate(
        f"{total:.0f} GiB:\nmachine",
        (1, total),
        (4, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        **style,
    )


def _ratio(axes: Axes, panel: Panel, by_side: dict[str, list[Record]], unit: str) -> None:
    """The gain at the largest length that both sides reached: an arrow, and a line of the title."""
    values = [{run["length"]: panel.value(run) for run in by_side[side]} for side in SIDES]
    common = values[0].keys() & values[1].keys()
    if not common:
        return
    x = max(common)
    original, patched = (value[x] for value in values)
    ratio = original / patched if panel.small_is_good else patched / original
    arrow = {"arrowstyle": "-|>", "color": MUTED, "linewidth": 1, "shrinkA": 6, "shrinkB": 6}
    axes.annotate("", (x, patched), (x, original), arrowprops=arrow, zorder=2)
    axes.annotate(
        f"{ratio:.1f}× {panel.gain} at {length_name(x, unit)} {unit}",
        (0, 1),
        (0, 9),
        xycoords="axes fraction",
        textcoords="offset points",
        color=INK,
        size=9.5,
    )


def _finish(axes: Axes, panel: Panel, work: Record) -> None:
    """Titles, ticks and the frame."""
    lengths, unit = work["lengths"], work["unit"]
    axes.set_title(panel.title, loc="left", fontsize=11, weight="bold", color=INK, pad=24)
    axes.set_xlabel("tokens" if unit == "tokens" else "minutes of audio", color=INK)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: length_name(x, unit)))
    base, factors = panel.ticks
    axes.yaxis.set_major_locator(LogLocator(base, factors, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: panel.show(y)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.margins(x=0.2, y=0.2)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0, labelsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        plot(Path(name))
