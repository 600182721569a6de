"""The output of a run: a progress bar, `log.jsonl`, TensorBoard and `curve.png`."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

from transformer_xl.data.files import check_regular, is_int, linked, parse_json, to_json
from transformer_xl.evaluation import Score
from transformer_xl.training.curve import Metric, in_metric, plot_curves

LOG = "log.jsonl"
CURVE = "curve.png"
# A closed terminal or pipe is no reason to end a run. For a pipe, rich raises SystemExit.
OUTPUT_LOST = (OSError, SystemExit)


class Report:
    """A context that shows a run and writes its record into the folder `out`.

    Args:
        metric: "bpc" or "ppl".
        step, max_step: where the run begins and ends; later entries of an earlier log are removed.
        validation_due: whether the validation of `step` is still due; entries of it are removed.
        tokens_per_step: targets of one step.
        console: where to show it; a bar if that is a terminal, else a line for each entry.
        shown: False in all processes but the main one, which then neither show nor write.
    """

    def __init__(
        self,
        out: Path,
        *,
        metric: Metric,
        step: int,
        max_step: int,
        tokens_per_step: int,
        console: Console,
        validation_due: bool = False,
        shown: bool = True,
    ) -> None:
        self.out, self.metric, self.shown = out, metric, shown
        self.max_step, self._tokens_per_step = max_step, tokens_per_step
        self._console = console
        self._progress = _bar(console, disable=not (shown and console.is_terminal))
        self._task = self._progress.add_task("", total=max_step, completed=step, news="")
        if shown:
            out.mkdir(parents=True, exist_ok=True)
            _cut_log(out / LOG, step, validation_due)
            self._tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Report:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(*OUTPUT_LOST):
            self._progress.stop()
        if self.shown:
            with contextlib.suppress(OSError):  # would hide why the run ended
                self._tensorboard.close()
            try:
                curves = {self.out.name: read_log(self.out)}
            except (OSError, ValueError) as unreadable:
                self.say(escape(f"{CURVE} was not drawn: {unreadable}"))
                return
            if problem := plot_curves(self.out / CURVE, curves, self.metric, str(self.out)):
                self.say(escape(problem))

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)

    def trained(self, step: int, loss: float, lr: float, tokens_per_second: float) -> None:
        """Show and record the mean training loss since the last call, in nats per token."""
        entry = {"train_loss": loss, "lr": lr, "tokens_per_second": tokens_per_second}
        self._record(step, entry)
        news = f"loss {loss:.3f}  {self._value(loss)}  {tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, news=news)
        if not self._console.is_terminal:
            self.say(f"step {step:,}/{self.max_step:,}  {news}  lr {lr:.2e}")

    def validated(self, step: int, score: Score, best: bool) -> None:
        """Show and record a score on the valid split."""
        self._record(step, {"valid_loss": score.loss, "protocol": score.protocol})
        mark = "  [green]best so far[/]" if best else ""
        self.say(f"step {step:,}/{self.max_step:,}  [bold]valid {self._value(score.loss)}[/]{mark}")

    def say(self, text: str) -> None:
        """Print one line of rich's markup, if there is still a terminal or a file to print to."""
        if self.shown:
            with contextlib.suppress(*OUTPUT_LOST):
                self._console.print(text, markup=True, emoji=False, highlight=False, soft_wrap=True)

    def _value(self, loss: float) -> str:
        return f"{self.metric} {in_metric(loss, self.metric):.{3 if self.metric == 'bpc' else 2}f}"

    def _record(self, step: int, entry: dict[str, Any]) -> None:
        if not self.shown:
            return
        heading = {"step": step, "tokens": step * self._tokens_per_step}
        with (self.out / LOG).open("a", encoding="utf-8") as log:
            log.write(to_json(heading | entry) + "\n")
        for name, value in entry.items():
            if isinstance(value, float):
                self._tensorboard.add_scalar(name, value, step)
                if name.endswith("_loss"):
                    converted = in_metric(value, self.metric)
                    tag = name.replace("loss", self.metric)
                    self._tensorboard.add_scalar(tag, converted, step)


def read_log(out: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's log without lines that a kill cut short or that are damaged.

    Raises:
        ValueError: the log is no regular file.
    """
    path = out / LOG
    if not path.exists():
        return []
    check_regular(path)
    entries = []
    for line in path.read_bytes().splitlines():
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and is_int(entry.get("step")):
            entries.append(entry)
    return entries


def _cut_log(path: Path, step: int, validation_due: bool) -> None:
    """Remove the entries that the run will write again: those after `step`, and the validation of
    `step` if it is due."""
    kept = [
        entry
        for entry in read_log(path.parent)
        if entry["step"] < step
        or (entry["step"] == step and not (validation_due and "valid_loss" in entry))
    ]
    path = linked(path)
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_text("".join(to_json(entry) + "\n" for entry in kept), encoding="utf-8")
    except OSError:  # a full disk
        new.unlink(missing_ok=True)
        raise
    if path.exists():
        shutil.copymode(path, new)
    new.replace(path)  # a kill leaves the old log or the new one


def _bar(console: Console, *, disable: bool) -> Progress:
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[news]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=disable,
    )
