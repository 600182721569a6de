"""`python -m benchmarks.long_context`: measures both sides, prints a table, draws a picture."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.long_context import worker
from benchmarks.long_context.ladder import Results, climb, write_json
from benchmarks.long_context.limits import Limits, Measurement, Stop
from benchmarks.long_context.picture import NAMES, gibibytes, length_name, plot
from benchmarks.long_context.worker import ORIGINAL, PATCHED, SIDES
from benchmarks.long_context.workloads import WORKLOADS, Workload

# A child is ended after this multiple of the limit, because predictions may be wrong, and the
# seconds in which it loads libraries and makes weights.
PATIENCE, LOADING = 3, 120
HEADS = {ORIGINAL: "sdpa", PATCHED: "patched"}


def main() -> None:
    options = _parse()
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit("this environment has no transformers; make demo-long makes one that has")
    workload = WORKLOADS[options.workload]()
    if options.layers:
        workload = dataclasses.replace(workload, n_layer=options.layers)
    if options.lengths:
        workload = dataclasses.replace(workload, lengths=tuple(sorted(options.lengths)))
    torch.set_num_threads(options.threads)  # for the rates of the machine
    limits = Limits(options.limit, options.reserve)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    console.print(f"{workload.title}: {workload.details}")
    measure = functools.partial(
        worker.in_child, threads=options.threads, seconds=PATIENCE * limits.seconds + LOADING
    )
    written = options.out / f"long_context_{workload.name}.json"
    described = machine.describe()

    def keep(done: Measurement | Stop, results: Results) -> None:
        """Prints one line and writes all results, which an interrupted program keeps."""
        console.print(line(done, workload))
        write_json(written, described, workload, limits, results)

    results = climb(workload, limits, measure, keep)
    console.print(table(results, workload), *notes(results, workload), sep="\n")
    plot(written)
    seconds = results.total_seconds
    console.print(f"written: {written} and .png, after {seconds:.0f} s", soft_wrap=True)


def line(done: Measurement | Stop, workload: Workload) -> str:
    """One line of progress."""
    where = f"{length_name(done.length, workload.unit)} {workload.unit}, {NAMES[done.side]}"
    if isinstance(done, Stop):
        return f"{where}: {'' if done.started else 'not run, '}{done.reason}"
    return f"{where}: {done.seconds:.1f} s, {gibibytes(done.peak_gib)} beyond the weights"


def table(results: Results, workload: Workload) -> Table:
    """A row for each length, both sides, and how many times the patched one is better."""
    in_tokens = workload.unit == "tokens"
    title = f"{NAMES[ORIGINAL]}, and patched; memory beyond the weights"
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.add_column(workload.unit, justify="right")
    for side in SIDES:
        for column in ("s", "tokens/s" if in_tokens else "s/minute", "peak GiB"):
            drawn.add_column(f"{HEADS[side]}\n{column}", justify="right")
    drawn.add_column("times as\nfast", justify="right")
    drawn.add_column("times less\nmemory", justify="right")
    for length in workload.lengths:
        runs = {run.side: run for run in results.measurements if run.length == length}
        cells = [f"{length:,g}"]
        for side in SIDES:
            cells += _cells(runs.get(side), in_tokens)
        if len(runs) == len(SIDES):
            original, patched = runs[ORIGINAL], runs[PATCHED]
            cells += [f"{original.seconds / patched.seconds:.1f}"]
            cells += [f"{original.peak_gib / patched.peak_gib:.1f}"]
        if runs:
            drawn.add_row(*cells)
    return drawn


def notes(results: Results, workload: Workload) -> list[str]:
    """Why a side has no more rows, and how well the results agree."""
    lines = [line(stop, workload) for stop in results.stops]
    if results.differences:
        largest = max(results.differences.values())
        lines.append(f"largest relative difference of the results of both sides: {largest:.0e}")
    return lines


def _cells(run: Measurement | None, in_tokens: bool) -> list[str]:
    if run is None:
        return ["–"] * 3
    rate = run.length / run.seconds if in_tokens else run.seconds / run.length
    rates = f"{rate:,.0f}" if in_tokens else f"{rate:.1f}"
    return [f"{run.seconds:.1f}", rates, f"{run.peak_gib:.2f}"]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_context", description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--out", type=Path, default=Path("runs/long_context"), help="folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, help="layers of the model")
    parser.add_argument("--lengths", type=float, nargs="+", help="tokens, or minutes of audio")
    parser.add_argument("--limit", type=float, default=100, help="seconds of the longest run")
    parser.add_argument("--reserve", type=float, default=2, help="GiB of memory to keep free")
    return parser.parse_args()


if __name__ == "__main__":
    main()
