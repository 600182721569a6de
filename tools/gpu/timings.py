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
from benchmarks.inputs import AttentionShape
from benchmarks.measure import Quartiles, take_rounds
from tools.gpu.stages import Context

ROUNDS, FEW_ROUNDS = 11, 3
LONG = 0.1  # seconds of one round: of longer ones only few are taken
LEAST = 2.0  # seconds: with less, no case is started
NOTE = (
    "inkling: as the Triton kernels can run it; each query head has keys of its own, and the "
    "position term is a product of 128 dimensions instead of 16"
)
Rows = dict[str, dict[str, Any]]


def run(context: Context) -> None:
    """Results: "cases", by name a row for each contender with milliseconds, TFLOP/s, the share of
    the measured ceiling and the ratio of its time to ours, or a note that says why it has none.

    Raises:
        AssertionError: a call of ours is wrong or raises, or no time was left for any.
    """
    cases: dict[str, Rows] = context.results.setdefault("cases", {})
    context.results["note"] = NOTE
    for case, contenders in plan(context.device):
        if context.seconds_left() < LEAST:
            context.results["stopped"] = f"no time was left for {case.name}, {contenders[-1]}"
            break
        rows = cases.setdefault(case.name, {})
        measure(case, contenders, rows, context.ceilings)
        context.results["summary"] = list(summary(cases))
        context.save()
        gc.collect()
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
    context.save()
    failed = [
        f"{name}: {rows[OURS]['note']}" for name, rows in cases.items() if "ms" not in rows[OURS]
    ]
    assert not failed, "; ".join(failed)
    assert cases, "no time was left"


def plan(device: torch.device) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Cases with the contenders to time, in order; a case comes up to three times."""
    cases: list[Any] = headline.device_cases(device.type)
    if device.type == "cpu":
        cases = [case.tiny() for case in cases]
    for case in cases:
        yield case, (OURS,)
    for is_compiled in (False, True) if device.type == "cuda" else (False,):
        for case in cases:
            others = (*case.peers, *case.yardsticks)
            chosen = [name for name in others if (name in COMPILED_PEERS) == is_compiled]
            if chosen:
                yield case, (OURS, *chosen)


def measure(case: Any, names: Sequence[str], rows: Rows, ceilings: Mapping[str, float]) -> None:
    """Fills the rows of the contenders; ours keeps the figures of its first time."""
    with contextlib.ExitStack() as stack:
        timed = {}
        for name in names:
            try:
                if name not in rows:
                    case.check(name)
                timed[name] = stack.enter_context(case.contender(name))
                timed[name]()
            except Exception as error:
                timed.pop(name, None)
                rows.setdefault(name, {"note": _sentence(error)})
        try:
            once = sum(run() for run in timed.values())
            wanted = ROUNDS if once < LONG else FEW_ROUNDS
            rounds = take_rounds(
                tuple(timed.values()), OneProgramAtATime(), wanted=wanted, sample_seconds=1e-6
            )
        except Exception as error:
            for name in timed:
                rows.setdefault(name, {"note": _sentence(error)})
            return
    for n, name in enumerate(timed):
        if name in rows:
            continue
        seconds = rounds.seconds(n)
        rows[name] = _row(case, name, seconds, ceilings)
        if n > 0 and OURS in timed:
            ratios = [taken.seconds[n] / taken.seconds[0] for taken in rounds.kept]
            rows[name]["over_ours"] = statistics.median(ratios)


def _row(case: Any, name: str, seconds: Quartiles, ceilings: Mapping[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "ms": {key: 1e3 * value for key, value in dataclasses.asdict(seconds).items()}
    }
    rate = case.flop_of(name) / seconds.median
    row["tflops"] = rate / 1e12
    if case.shape.name == headline.DECODE.name:
        rate, ceiling = _bytes(case.shape) / seconds.median, "copy_bytes_per_second"
        row["terabytes_per_second"] = rate / 1e12
    else:
        ceiling = "gemm_flop_per_second"
    if ceiling in ceilings:
        row["of_ceiling"] = rate / ceilings[ceiling]
    return row


def _bytes(shape: AttentionShape) -> int:
    """Read in decoding, in 16 bits: keys and values once, r once for each head."""
    return 2 * shape.H * shape.D * (2 * shape.B * shape.n_keys + shape.n_rows)


def summary(cases: Mapping[str, Rows]) -> Iterator[str]:
    """A line for each case: ours, and the times of the others as multiples of ours."""
    yield "ours: ms, TFLOP/s, share of the ceiling; the others: their time / ours"
    for name, rows in cases.items():
        ours = rows[OURS]
        shape = name.removeprefix("rel_attention/").replace("/bfloat16", "")
        if "ms" not in ours:
            yield f"{shape:<36} {ours['note']}"
            continue
        share = f"{ours['of_ceiling']:.0%}" if "of_ceiling" in ours else "–"
        others = ", ".join(
            f"{other} {row['over_ours']:.2f}" for other, row in rows.items() if "over_ours" in row
        )
        ms = ours["ms"]["median"]
        yield f"{shape:<34} {ms:8.3f} {ours['tflops']:4.0f} {share:>4}  {others}"


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
