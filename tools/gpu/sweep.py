"""Stage "sweep": times launch configurations of the attention kernels; the fastest become rows.

`python -m tools.gpu.sweep RESULT.json` writes these rows into the launch table.
"""

from __future__ import annotations

import itertools
import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import OURS
from benchmarks.cases.rel_attention import AttentionCase
from benchmarks.headline import TRAIN
from benchmarks.measure import sample
from tools.gpu.runner import Context, UnavailableError
from txl_kernels import backends
from txl_kernels.backends.triton import interprets, launch_table
from txl_kernels.backends.triton.launch_table import AttentionConfig, Key

KERNELS = ("rel_attention_fwd", "rel_attention_bwd_dkdv", "rel_attention_bwd_dqdr")
HEAD_SIZES = tuple(shape.D for shape in TRAIN)
# Queries and keys of a tile, warps, stages. `skew` needs tiles with no more queries than keys.
GRID = itertools.product(((32, 64), (64, 64), (64, 128)), ((4, 1), (4, 2), (8, 2)))
CONFIGS = tuple(AttentionConfig(*tile, *others) for tile, others in GRID)
TOLERANCE = 2e-2  # relative difference, by the norm, to the shipped configuration's results
GAIN = 0.02  # a row is replaced only if another one is faster by this fraction


def run(context: Context) -> None:
    """Results: milliseconds, or the error, of each configuration; the rows that are faster."""
    if context.is_rehearsal and not interprets():
        raise UnavailableError("a rehearsal of the sweep needs TRITON_INTERPRET=1")
    context.results |= {"times_ms": {}, "rows": [], "summary": []}
    for D, kernel in itertools.product(HEAD_SIZES[: 1 if context.is_rehearsal else None], KERNELS):
        if context.seconds_left() > 2:
            with mock.patch.dict(backends._AUTO, {context.device.type: ("triton",)}):
                _sweep(context, kernel, D)


def _sweep(context: Context, kernel: str, D: int) -> None:
    """Times the configurations; adds the row of the fastest one if it is faster than the shipped
    one. Results that differ from the shipped configuration's are errors."""
    key = row_key(kernel, launch_table.launch_class(context.device), D)
    notes = context.results["times_ms"].setdefault(f"{kernel}/D{D}", {})
    case = training_case(D, "forward" if kernel == KERNELS[0] else "backward", context.device)
    expected, times = case.results(OURS), {}
    shipped = launch_table.rows()[key]
    others = [config for config in CONFIGS if config != shipped]
    for config in [shipped, *others[: 1 if context.is_rehearsal else None]]:
        if times and context.seconds_left() < 1:
            break
        try:
            with configured(key, config), case.contender(OURS) as timed:
                error = max(map(_difference, case.results(OURS), expected))
                assert error <= TOLERANCE, f"its result differs by {error:.1e} of the norm"
                times[config] = notes[str(tuple(config))] = round(1e3 * sample(timed, 0.03), 4)
        except Exception as problem:  # such as too much shared memory
            notes[str(tuple(config))] = f"{type(problem).__name__}: {problem}"[:200]
    best = min(times, key=lambda config: times[config] * (1 + GAIN * (config != shipped)))
    if best != shipped:
        why = f"{times[best]} ms; {tuple(shipped)}: {times.get(shipped)} ms"
        row = {"kernel": kernel, "class": key.launch_class, "variant": "plain", "bits": 16}
        row |= {"head_size": D, **best._asdict(), "why": why}
        context.results["rows"].append(row)
    context.results["summary"].append(f"{kernel} D {D}: {notes}")
    context.save()


def row_key(kernel: str, row_class: str, D: int) -> Key:
    """The row of a call with 16-bit inputs and no option that changes the row."""
    if row_class == "interpreter":
        return Key(kernel, row_class, "plain")
    return Key(kernel, row_class, "plain", 16, D)


def configured(key: Key, config: AttentionConfig) -> AbstractContextManager[object]:
    """Within it the row is `config`."""
    return mock.patch.dict(launch_table.rows(), {key: config})


def training_case(D: int, direction: Any, device: torch.device) -> AttentionCase:
    """A training segment after a memory of its length."""
    (shape,) = (shape for shape in TRAIN if shape.D == D)
    if device.type == "cpu":  # Triton's interpreter computes garbage in bfloat16
        return AttentionCase(shape.tiny(), torch.float16, direction)
    return AttentionCase(shape, torch.bfloat16, direction, device.type)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative, by the norm; infinite if a result is not finite."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(difference.nan_to_num(nan=torch.inf))


def write_rows(result: Path, table: Path = launch_table.PATH) -> None:
    """Replaces the rows of the table and prints them; their reason names the device."""
    report = json.loads(result.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = report["stages"]["sweep"]["results"]["rows"]
    rows = [row | {"why": f"{report['machine']['device']}: {row['why']}"} for row in rows]
    launch_table.replace_rows(table, rows)
    print(*rows, f"{len(rows)} rows written to {table}", sep="\n")


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]))
