"""A run's record: log, TensorBoard, learning curve."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from transformer_xl.evaluation import Score
from transformer_xl.training.report import LOG, Report, in_metric, read_log


def report(out: Path, console: Console, step: int = 0, metric: str = "bpc") -> Report:
    return Report(out, metric=metric, step=step, max_step=40, tokens_per_step=32, console=console)


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def shown(of: Console) -> str:
    assert isinstance(of.file, io.StringIO)
    return of.file.getvalue()


SCORE = Score(loss=math.log(2), n_tokens=10, seconds=1.0, protocol="as trained")


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
def test_a_person_sees_loss_metric_speed(tmp_path: Path, terminal: bool) -> None:
    out = console(terminal)
    with report(tmp_path, out) as running:
        running.advance(10)
        running.trained(10, 2 * math.log(2), 1e-3, 1234.5)
        running.validated(10, SCORE, best=True)
    text = shown(out)
    for part in ("loss 1.386", "bpc 2.000", "1,234 tokens/s", "valid bpc 1.000", "best so far"):
        assert part in text, part
    assert ("ETA" in text) == terminal


def test_everything_is_recorded(tmp_path: Path) -> None:
    with report(tmp_path, console()) as running:
        running.trained(10, 1.5, 1e-3, 100.0)
        running.validated(10, SCORE, best=False)
    assert read_log(tmp_path) == [
        {"step": 10, "tokens": 320, "train_loss": 1.5, "lr": 1e-3, "tokens_per_second": 100.0},
        {"step": 10, "tokens": 320, "valid_loss": SCORE.loss, "protocol": "as trained"},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        *("train_loss", "train_bpc", "lr", "tokens_per_second"),
        *("valid_loss", "valid_bpc"),
    }
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_resuming_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    lines = [{"step": step, "tokens": step, "train_loss": 1.0} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "tok'
    (tmp_path / LOG).write_text(text)
    with report(tmp_path, console(), step=2):
        pass
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2]


def test_other_processes_stay_silent(tmp_path: Path) -> None:
    out = console()
    with Report(
        tmp_path / "run",
        metric="ppl",
        step=0,
        max_step=1,
        tokens_per_step=1,
        console=out,
        shown=False,
    ) as running:
        running.trained(1, 1.0, 1.0, 1.0)
        running.validated(1, SCORE, best=True)
    assert shown(out) == ""
    assert not (tmp_path / "run").exists()


def test_metrics() -> None:
    assert in_metric(math.log(8), "bpc") == pytest.approx(3)
    assert in_metric(math.log(8), "ppl") == pytest.approx(8)
