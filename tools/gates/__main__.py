"""Compile the launches of all shipped Triton kernels for all supported GPUs and check the code.

Needs no GPU. The table shows KiB of shared memory per block and, after it, bytes of spilled
registers per thread.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from tools.gates import checks, compiling, shipped, spills
from txl_kernels.backends.triton import CHECKED_TRITON_VERSIONS, interprets

_VERSION = str(triton.__version__)
# Filled before the worker processes are forked: launches cannot be pickled.
_jobs: list[tuple[int, shipped.Shipped]] = []


class Row(NamedTuple):
    """The result for one launch on one architecture. Without memory if it does not compile."""

    launch: str
    arch: int
    failures: list[str]
    shared: int = 0
    spills: int = 0
    exception: spills.Spill | None = None  # that the launch needs

    def cell(self) -> str:
        """Shared memory and spills, as the table shows them."""
        text = f"{self.shared / 1024:.0f}" + (f" +{self.spills}" if self.spills else "")
        return f"[bold red]{text} ✗[/]" if self.failures else text


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a check fails."""
    options = _options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    started = time.monotonic()
    warnings.filterwarnings("ignore", module="triton")  # in the worker processes too
    if _VERSION not in CHECKED_TRITON_VERSIONS:
        checked = " and ".join(CHECKED_TRITON_VERSIONS)
        console.print(f"Triton {_VERSION} is not among the checked versions ({checked}).")
    _jobs[:] = [
        (arch, found)
        for arch in options.arch
        for found in shipped.shipped_launches(shipped.shipped_calls(), arch)
        if any(_is_selected(call, options) for call in found.calls)
    ]
    n, context = len(_jobs), multiprocessing.get_context("fork")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        results, is_shown = pool.map(_compile, range(n)), console.is_terminal
        rows = list(track(results, "compiling", n, console=console, disable=not is_shown))
    failures = [f"{row.launch} on sm_{row.arch}: {text}" for row in rows for text in row.failures]
    if not options.headline and options.only == "*":
        used = {(row.exception, row.arch) for row in rows}
        failures += spills.unneeded(used, options.arch, _VERSION)
    console.print(_table(rows, options.arch))
    console.print(f"{n} compilations with Triton {_VERSION} in {time.monotonic() - started:.0f} s")
    for failure in failures:
        console.print(f"[bold red]failed[/] {escape(failure)}", highlight=False, soft_wrap=True)
    if options.json:
        options.json.write_text(_json(rows), encoding="utf-8")
    return int(bool(failures) or not rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    arches = sorted(checks.SHARED_LIMIT)
    parser = argparse.ArgumentParser(prog="python -m tools.gates", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=arches, default=arches, metavar="SM")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of calls, as a glob")
    parser.add_argument("--headline", action="store_true", help="only the most common calls")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    if interprets():
        parser.error("TRITON_INTERPRET is set: such a process cannot compile kernels")
    return parser.parse_args(arguments)


def _is_selected(call: shipped.Call, options: argparse.Namespace) -> bool:
    is_named = fnmatch.fnmatchcase(call.name, options.only)
    return is_named and (call.headline or not options.headline)


def _compile(job: int) -> Row:
    arch, found = _jobs[job]
    try:
        binary = compiling.compile_launch(found.launch)
    except Exception as error:  # a failed compilation must not hide the other results
        text = f"does not compile: {type(error).__name__}: {str(error)[:300]}"
        return Row(found.name, arch, [text])
    limit, exception = checks.spill_limit(found.launch), None
    if binary.code.stack > limit and (exception := spills.find(found.name, arch, _VERSION)):
        limit = exception.n_bytes
    failures = checks.failures(found.launch, binary, limit)
    return Row(found.name, arch, failures, binary.shared, binary.code.stack, exception)


def _table(rows: Sequence[Row], arches: Sequence[int]) -> Table:
    table = Table(title=f"shared memory (KiB) +spills (bytes), Triton {_VERSION}", box=None)
    table.add_column("launch", overflow="fold")
    for arch in arches:
        table.add_column(f"sm_{arch}", justify="right", no_wrap=True)
    by_name = sorted(rows, key=lambda row: row.launch)
    for name, group in itertools.groupby(by_name, key=lambda row: row.launch):
        cells = {row.arch: row.cell() for row in group}
        table.add_row(name, *(cells.get(arch, "") for arch in arches))
    return table


def _json(rows: Sequence[Row]) -> str:
    """One row per line, so that differences are readable."""
    names = ("launch", "arch", "triton", "shared", "spills")
    values = ((row.launch, row.arch, _VERSION, row.shared, row.spills) for row in rows)
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in values]
    return "[\n" + ",\n".join(lines) + "\n]\n"


if __name__ == "__main__":
    sys.exit(main())
