"""Stage "sweep": times launch configurations of the attention kernels; the fastest become rows.

`python -m tools.gpu.apply RESULT.json` writes these rows into the launch table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.device import timer
from benchmarks.headline import TRAIN
from benchmarks.inputs import random_inputs
from benchmarks.measure import sample
from tools.gpu.stages import Context, UnavailableError
from txl_kernels import rel_attention
from txl_kernels.backends.triton import interprets, launch_table
from txl_kernels.backends.triton.launch_table import AttentionConfig, Key

FWD, DKDV, DQDR = KERNELS = "rel_attention_fwd", "rel_attention_bwd_dkdv", "rel_attention_bwd_dqdr"
HEAD_SIZES = tuple(shape.D for shape in TRAIN)
MOST = 12  # configurations of a kernel, the shipped one included
TOLERANCE = 2e-2  # relative difference, by the norm, to the shipped configuration's results
GAIN = 0.02  # a row is replaced only if another one is faster by this fraction


def run(context: Context) -> None:
    """Results: milliseconds, or the error, of each configuration; the rows that are faster.

    Raises:
        UnavailableError: a rehearsal without Triton's interpreter.
        AssertionError: a shipped configuration fails, or one computes another result.
    """
    if context.is_rehearsal and not interprets():
        raise UnavailableError("a rehearsal of the sweep needs TRITON_INTERPRET=1")
    rows = context.results.setdefault("rows", [])
    problems = []
    for D, kernel in itertools.product(HEAD_SIZES[: 1 if context.is_rehearsal else None], KERNELS):
        if context.seconds_left() < 2:
            break
        try:
            rows += _faster_rows(context, kernel, D)
        except Exception as problem:
            problems.append(f"{kernel} D {D}: {type(problem).__name__}: {problem}"[:300])
        context.save()
    context.results["summary"] = [f"{len(rows)} rows are faster than the shipped ones"]
    context.results["summary"] += [f"{x['kernel']} D {x['head_size']}: {x['why']}" for x in rows]
    assert not problems, "; ".join(problems)


def _faster_rows(context: Context, kernel: str, D: int) -> list[dict[str, Any]]:
    """Times the configurations; the row of the fastest one if it is faster than the shipped one."""
    row_class = launch_table.launch_class(context.device)
    limit = 2**30 if context.is_rehearsal else launch_table.device_limits(context.device)[1]
    notes = context.results.setdefault("times_ms", {}).setdefault(f"{kernel}/D{D}", {})
    call = attention_calls(D, context.device)[kernel != FWD]
    expected, times = call(), {}
    shipped, *others = candidates(kernel, row_class, D, limit)
    for config in [shipped, *others[: 1 if context.is_rehearsal else None]]:
        if context.seconds_left() < 1 and times:
            break
        try:
            with configured(kernel, row_class, D, config):
                error = max(map(_difference, call(), expected))
                timed = timer([call], context.device)
                times[config] = round(1e3 * sample(timed, min_seconds=0.03), 4)
        except Exception as problem:  # such as too much shared memory
            notes[str(tuple(config))] = f"{type(problem).__name__}: {problem}"[:200]
            continue
        notes[str(tuple(config))] = times[config]
        assert error <= TOLERANCE, f"{tuple(config)} differs by {error:.1e} of the norm"
        context.save()
    best = min(times, key=lambda config: times[config] * (1 + GAIN * (config != shipped)))
    if best == shipped:
        return []
    key = {"kernel": kernel, "class": row_class, "variant": "plain", "bits": 16, "head_size": D}
    why = f"{times[best]} ms; {tuple(shipped)}: {times.get(shipped)} ms"
    return [key | best._asdict() | {"why": why}]


def candidates(kernel: str, row_class: str, D: int, limit: int) -> list[AttentionConfig]:
    """The shipped configuration and those most similar to it that may fit in shared memory."""
    shipped = launch_table.rows()[_key(kernel, row_class, D)]
    grid = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3))

    def fits(config: AttentionConfig) -> bool:
        own, other = config[:2] if kernel != DKDV else config[1::-1]
        # A kernel rotates rows that are no longer than its tile has columns.
        return own <= other and 2 * D * (own + 3 * config.num_stages * other) <= limit

    def distance(config: AttentionConfig) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(config, shipped, strict=True))

    others = sorted(filter(fits, itertools.starmap(AttentionConfig, grid)), key=distance)
    return list(dict.fromkeys([shipped, *others]))[:MOST]


def configured(
    kernel: str, row_class: str, D: int, config: AttentionConfig
) -> AbstractContextManager[object]:
    """Within it the kernel's row is `config`."""
    return mock.patch.dict(launch_table.rows(), {_key(kernel, row_class, D): config})


def _key(kernel: str, row_class: str, D: int) -> Key:
    """The row of a call with 16-bit inputs and no option that changes the row."""
    if row_class == "interpreter":
        return Key(kernel, row_class, "plain")
    return Key(kernel, row_class, "plain", 16, D)


def attention_calls(D: int, device: torch.device) -> list[Callable[[], list[Tensor]]]:
    """The forward and the backward pass of a training segment after a memory of its length."""
    (shape,) = (shape for shape in TRAIN if shape.D == D)
    # Triton's interpreter computes garbage in bfloat16.
    tiny = device.type == "cpu"
    dtype = torch.float16 if tiny else torch.bfloat16
    shape = shape.tiny() if tiny else shape
    inputs = random_inputs(shape, dtype, requires_grad=True, device=device)

    def attend() -> Tensor:
        out: Tensor = rel_attention(**inputs._asdict(), causal=True, backend="triton")
        return out

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [attend()]

    out = attend()
    dout, leaves = torch.randn_like(out), inputs.leaves()
    return [forward, lambda: list(torch.autograd.grad(out, leaves, dout, retain_graph=True))]


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative, by the norm; infinite if a result is not finite."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if math.isfinite(error) else math.inf
