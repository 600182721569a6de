"""Learning curves of every kind of log are drawn, and a failure to draw raises nothing."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from transformer_xl.training import curve, report
from transformer_xl.training.curve import in_metric, plot_curves

METRICS = pytest.mark.parametrize("metric", ["bpc", "ppl"])


def entries(losses: list[float | None]) -> list[dict[str, Any]]:
    return [
        {"tokens": 10 * i, f"{kind}_loss": loss}
        for i, loss in enumerate(losses)
        for kind in ("train", "valid")
    ]


@METRICS
@pytest.mark.parametrize(
    "losses",
    [
        [],
        [math.nan, math.nan],
        [1.0, math.nan, 2.0],
        [3.0, math.inf],
        [2.0, None, 1.0],  # NaN, as JSON writes it
        [710.0, 800.0],
        [1e300, 1e305],
        [0.0, 0.0],
        [2.0, 2.0],
    ],
    ids=str,
)
def test_every_loss_is_drawn_or_left_out(
    tmp_path: Path, metric: str, losses: list[float | None]
) -> None:
    path = tmp_path / "curve.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot_curves(path, {"run": entries(losses)}, metric, "a run") is None
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_names_with_dollar_signs_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    assert plot_curves(path, {r"$\oops$": entries([1.0])}, "bpc", r"runs/$\oops$") is None


@METRICS
def test_a_picture_that_cannot_be_written_is_reported(tmp_path: Path, metric: str) -> None:
    path = tmp_path / "nowhere" / "curve.png"
    reason = plot_curves(path, {"run": entries([1.0, 2.0])}, metric, "a run")
    assert reason is not None
    assert reason.startswith(f"{path} was not drawn: ")


@pytest.mark.parametrize("error", [None, FloatingPointError("the training loss is nan")])
def test_a_failure_to_draw_neither_ends_nor_hides_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no fonts [here]")

    monkeypatch.setattr(curve, "_draw", fail)
    console = Console(file=io.StringIO(), width=300)
    running = report.Report(
        tmp_path, metric="bpc", step=0, max_step=1, tokens_per_step=1, console=console
    )
    if error is None:
        with running:
            pass
    else:
        with pytest.raises(FloatingPointError, match="the training loss is nan"), running:
            raise error
    assert isinstance(console.file, io.StringIO)
    assert "curve.png was not drawn: no fonts [here]" in console.file.getvalue()


def test_metrics() -> None:
    assert in_metric(math.log(8), "bpc") == pytest.approx(3)
    assert in_metric(math.log(8), "ppl") == pytest.approx(8)
    assert in_metric(1e6, "ppl") == math.exp(700)
