"""Compile the launches of all shipped Triton kernels for all supported GPUs and check the code.

Needs no GPU. The table shows KiB of shared memory per block and, after it, bytes of spilled
registers per thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
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
from typing import Any

import triton
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from tools.gates import checks, compiling, shipped, spills
from txl_kernels.backends.triton import CHECKED_TRITON_VERSIONS, interprets

# Filled before the worker processes are forked: launches cannot be pickled.
_jobs: list[tuple[int, shipped.Shipped]] = []


@dataclasses.dataclass(frozen=True)
class Row:
    """The result for one launch on one architecture. If it does not compile, only `failures`."""

    launch: str
    arch: int
    failures: tuple[str, ...]
    shared: int = 0
    spills: int = 0
    spill_limit: int = 0

    def cell(self) -> str:
        """Shared memory in KiB and spilled bytes, as the table shows them."""
        text = f"{self.shared / 1024:.0f}" + (f" +{self.spills}" if self.spills else "")
        return f"[bold red]{text} ✗[/]" if self.failures else text


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a check fails."""
    options = _options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    version, started = str(triton.__version__), time.monotonic()
    if version not in CHECKED_TRITON_VERSIONS:
        checked = " and ".join(CHECKED_TRITON_VERSIONS)
        console.print(f"Triton {version} is not among the checked versions ({checked}).")
    is_selected = functools.partial(_is_selected, options)
    _jobs[:] = [
        (arch, found)
        for arch in options.arch
        for found in shipped.shipped_launches(shipped.shipped_calls(), arch)
        if any(map(is_selected, found.calls))
    ]
    rows = _compile_all(console, options.processes)
    failures = [f"{row.launch} on sm_{row.arch}: {text}" for row in rows for text in row.failures]
    if not options.headline and options.only == "*":
        spilled = {(row.launch, row.arch): (row.spills, row.spill_limit) for row in rows}
        failures += spills.unneeded(spilled, version)
    console.print(_table(rows, options.arch, version))
    seconds = time.monotonic() - started
    console.print(f"{len(rows)} compilations with Triton {version} in {seconds:.0f} s")
    for failure in failures:
        console.print(f"[bold red]failed[/] {escape(failure)}", highlight=False, soft_wrap=True)
    if options.json:
        options.json.write_text(_json(rows, version), encoding="utf-8")
    return int(bool(failures) or not rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    arches = sorted(checks.SHARED_LIMIT)
    parser = argparse.ArgumentParser(prog="python -m tools.gates", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=arches, default=arches, metavar="SM")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of calls, as a glob")
    parser.add_argument("--headline", action="store_true", help="only the most common calls")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    options = parser.parse_args(arguments)
    if interprets():
        parser.error("TRITON_INTERPRET is set: such a process cannot compile kernels")
    return options


def _is_selected(options: argparse.Namespace, call: shipped.Call) -> bool:
    is_named = fnmatch.fnmatchcase(call.name, options.only)
    return is_named and (call.headline or not options.headline)


def _compile_all(console: Console, processes: int) -> list[Row]:
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        results = pool.map(_compile, range(len(_jobs)))
        return list(
            track(
                results,
                "compiling",
                total=len(_jobs),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
        )


def _compile(job: int) -> Row:
    arch, found = _jobs[job]
    name, launch = found.name, found.launch
    warnings.filterwarnings("ignore", module="triton")
    try:
        binary = compiling.compile_launch(launch)
    except Exception as error:  # a failed compilation must not hide the other results
        return Row(name, arch, (f"does not compile: {type(error).__name__}: {str(error)[:300]}",))
    accepted = spills.accepted(name, arch, str(triton.__version__))
    failures = checks.failures(launch, binary, accepted)
    limit = checks.spill_limit(launch)
    return Row(name, arch, tuple(failures), binary.shared, binary.code.stack, limit)


def _table(rows: Sequence[Row], arches: Sequence[int], version: str) -> Table:
    table = Table(title=f"shared memory (KiB) +spills (bytes), Triton {version}", box=None)
    table.add_column("launch", overflow="fold")
    for arch in arches:
        table.add_column(f"sm_{arch}", justify="right", no_wrap=True)
    by_name = sorted(rows, key=lambda row: row.launch)
    for name, group in itertools.groupby(by_name, key=lambda row: row.launch):
        cells = {row.arch: row.cell() for row in group}
        table.add_row(name, *(cells.get(arch, "") for arch in arches))
    return table


def _json(rows: Sequence[Row], version: str) -> str:
    """One row per line, so that differences are readable."""
    fields: list[dict[str, Any]] = [
        {
            "launch": row.launch,
            "arch": row.arch,
            "triton": version,
            "shared": row.shared,
            "spills": row.spills,
        }
        for row in rows
    ]
    return "[\n" + ",\n".join(map(json.dumps, fields)) + "\n]\n"


if __name__ == "__main__":
    sys.exit(main())
