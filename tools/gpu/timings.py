"""Stage "timings": the headline calls beside other implementations, the most important first.

First all calls of ours alone, then beside the others, at the end beside those that a compiler needs
many seconds for. Contenders run in turns, and ratios compare runs that followed each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks import headline
from benchmarks.cases import OURS
from benchmarks.cases.rel_attention import COMPILED_PEERS
from benchmarks.device import OneProgramAtATime
from benchmarks.measure import Timed, take_rounds
from tools.gpu.stages import Context

ROUNDS, FEW_ROUNDS, LONG = 11, 3, 0.1  # few rounds if one takes longer than LONG seconds
LEAST = 2.0  # seconds: with less, no case is started
COPY, PRODUCT = "copy_bytes_per_second", "gemm_flop_per_second"
Rows = dict[str, dict[str, Any]]


def run(context: Context) -> None:
    """Results: "cases", by name a row for each contender with milliseconds, TFLOP/s, the share of
    the measured ceiling and the ratio of its time to ours, or a note that says why it has none.

    Raises:
        AssertionError: a call of ours is wrong or raises, or no time was left for any.
    """
    gc.collect()
    gc.freeze()  # later collections skip the imported modules: a third of a second each
    cases: dict[str, Rows] = context.results.setdefault("cases", {})
    context.results["note"] = headline.INKLING_NOTE
    for case, contenders in plan(context.device):
        if context.seconds_left() < LEAST:
            context.results["stopped"] = f"no time was left for {case.name}, {contenders[-1]}"
            break
        measure(case, contenders, cases.setdefault(case.name, {}), context.ceilings)
        context.results["summary"] = [
            "ours: ms, TFLOP/s, share of the ceiling; others: time / ours"
        ]
        context.results["summary"] += [_line(name, rows) for name, rows in cases.items()]
        context.save()
        gc.collect()
    failed = [
        f"{name}: {rows[OURS]['note']}" for name, rows in cases.items() if "note" in rows[OURS]
    ]
    assert not failed, "; ".join(failed)
    assert cases, "no time was left"


def plan(device: torch.device) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Cases with the contenders to time, in order; a case comes up to three times."""
    on_gpu = device.type == "cuda"
    cases: list[Any] = headline.device_cases(device.type)
    cases = cases if on_gpu else [case.tiny() for case in cases]
    yield from ((case, (OURS,)) for case in cases)
    for is_compiled in (False, True) if on_gpu else (False,):
        for case in cases:
            others = (*case.peers, *case.yardsticks)
            if chosen := [name for name in others if (name in COMPILED_PEERS) == is_compiled]:
                yield case, (OURS, *chosen)


def measure(case: Any, names: Sequence[str], rows: Rows, ceilings: Mapping[str, float]) -> None:
    """Fills the rows of the contenders; ours keeps the figures of its first time."""
    timed: dict[str, Timed] = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            try:
                if name not in rows:
                    case.check(name)
                run = stack.enter_context(case.contender(name))
                run()
                timed[name] = run
            except Exception as error:
                rows.setdefault(name, {"note": sentence(error)})
        try:
            wanted = ROUNDS if sum(run() for run in timed.values()) < LONG else FEW_ROUNDS
            options = {"wanted": wanted, "sample_seconds": 1e-6}
            rounds = take_rounds(tuple(timed.values()), OneProgramAtATime(), **options)
        except Exception as error:
            for name in timed:
                rows.setdefault(name, {"note": sentence(error)})
            return
    for n, name in enumerate(timed):
        if name in rows:
            continue
        seconds = rounds.seconds(n)
        rate, ceiling = case.flop_of(name) / seconds.median, PRODUCT
        rows[name] = row = {
            "ms": {key: 1e3 * value for key, value in dataclasses.asdict(seconds).items()},
            "tflops": rate / 1e12,
        }
        if case.shape.name == headline.DECODE.name:  # it reads keys, values, and r once per head
            shape, ceiling = case.shape, COPY
            n_rows = 2 * shape.B * shape.n_keys + shape.n_rows
            rate = 2 * shape.H * shape.D * n_rows / seconds.median
        if ceiling in ceilings:
            row["of_ceiling"] = rate / ceilings[ceiling]
        if n > 0 and OURS in timed:
            ratios = [taken.seconds[n] / taken.seconds[0] for taken in rounds.kept]
            row["over_ours"] = statistics.median(ratios)


def sentence(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def _line(name: str, rows: Rows) -> str:
    ours, shape = rows[OURS], name.removeprefix("rel_attention/").replace("/bfloat16", "")
    if "note" in ours:
        return f"{shape:<34} {ours['note']}"
    others = [
        f"{other} {row['over_ours']:.2f}" for other, row in rows.items() if "over_ours" in row
    ]
    share = f"{ours['of_ceiling']:.0%}" if "of_ceiling" in ours else "–"
    figures = f"{ours['ms']['median']:8.3f} {ours['tflops']:4.0f} {share:>4}"
    return f"{shape:<34} {figures}  {', '.join(others)}"
