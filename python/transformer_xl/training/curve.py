"""Learning curves as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

Metric = str  # "bpc" or "ppl"
LABELS = {"bpc": "bits per character", "ppl": "perplexity per token"}


def in_metric(loss: float, metric: Metric) -> float:
    """A loss in nats per token as bits per character or as perplexity (exp(700) at most)."""
    return loss / math.log(2) if metric == "bpc" else math.exp(min(loss, 700.0))


def plot_curves(
    path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: Metric, title: str
) -> str | None:
    """Draw runs over the tokens they have seen: training as a line, validation as dots.

    A picture that cannot be drawn is no reason to end a run or to hide why it ended: nothing is
    raised. Losses that are missing or not finite are left out.

    Args:
        path: the PNG file to write.
        runs: by name, the entries of their logs: `tokens` with `train_loss` or `valid_loss`, nats.
        metric: "bpc" or "ppl" (then on a logarithmic axis).
        title: of the picture.

    Returns:
        Why the picture was not drawn, in one sentence; None if it was.
    """
    try:
        _draw(runs, metric, title).savefig(path)
    except Exception as error:  # whatever matplotlib or the disk raises
        return f"{path} was not drawn: {error}"
    return None


def _draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: Metric, title: str) -> Figure:
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    validated: list[float] = []
    for i, (name, entries) in enumerate(runs.items()):
        for kind, style in (("train", {"alpha": 0.35}), ("valid", {"marker": "o", "ms": 4})):
            points = [e for e in entries if _is_finite(e.get(f"{kind}_loss"))]
            tokens = [e["tokens"] for e in points]
            values = [in_metric(e[f"{kind}_loss"], metric) for e in points]
            axes.plot(tokens, values, color=f"C{i}", label=f"{name}, {kind}", **style)
            validated += values if kind == "valid" else []
    if len(validated) > 1 and max(validated) > 0:
        # Without limits the losses of the first steps would flatten the rest of the curves.
        axes.set_ylim(min(validated) * 0.9, max(validated) * 1.1)
    if metric == "ppl":
        axes.set_yscale("log")
    axes.set_xlabel("tokens trained on")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel(LABELS[metric])
    axes.set_title(title, parse_math=False)  # a path may contain dollar signs
    axes.grid(alpha=0.3)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)
    return figure


def _is_finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)
