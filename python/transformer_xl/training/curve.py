"""Learning curves as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

LABELS = {"bpc": "bits per character", "ppl": "perplexity per token"}


def plot_curves(
    path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, title: str
) -> None:
    """Draw runs over the tokens they have seen: training as a line, validation as dots.

    Args:
        runs: by name, the entries of their logs: `tokens` with `train_loss` or `valid_loss`, nats.
        metric: "bpc" or "ppl" (then on a logarithmic axis).
    """
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    validated: list[float] = []
    for i, (name, entries) in enumerate(runs.items()):
        for kind, style in (("train", {"alpha": 0.35}), ("valid", {"marker": "o", "ms": 4})):
            points = [e for e in entries if f"{kind}_loss" in e]
            tokens = [e["tokens"] for e in points]
            losses = np.array([e[f"{kind}_loss"] for e in points])
            values = losses / math.log(2) if metric == "bpc" else np.exp(losses)
            axes.plot(tokens, values, color=f"C{i}", label=f"{name}, {kind}", **style)
            validated += values.tolist() if kind == "valid" else []
    if len(validated) > 1:  # the first steps, far above, would flatten the rest
        axes.set_ylim(min(validated) * 0.9, max(validated) * 1.1)
    if metric == "ppl":
        axes.set_yscale("log")
    axes.set_xlabel("tokens trained on")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel(LABELS[metric])
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
