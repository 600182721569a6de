"""Stage "timings": the headline cases of the benchmarks, the most important first.

First all calls of ours alone, then beside the others, at the end beside those that a compiler needs
many seconds for.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import headline
from benchmarks.cases import OURS
from benchmarks.cases.rel_attention import COMPILED_PEERS
from benchmarks.device import OneProgramAtATime, copy_rate
from benchmarks.suite import Effort, Figures, take
from tools.gpu.stages import Context

EFFORT = Effort(pairs=7, sample_seconds=1e-6, memory=False)
LEAST = 2.0  # seconds: with less, no case is started
TITLE = "ours: ms, TFLOP/s, share of the ceiling; others: time / ours"


def run(context: Context) -> None:
    """Results: "cases", by name the figures of the benchmarks, or a note that says why there are
    none; "copy_bytes_per_second", the ceiling of decoding.

    Raises:
        AssertionError: a call of ours is wrong or raises, or no time was left for any.
    """
    gc.collect()
    gc.freeze()  # later collections skip the imported modules: a third of a second each
    found: dict[str, Figures] = {}
    copy = copy_rate(context.device, 2**20 if context.is_rehearsal else 2**30)
    context.results |= {"note": headline.INKLING_NOTE, "copy_bytes_per_second": copy, "cases": {}}
    for case, peers in plan(context.device):
        if context.seconds_left() < LEAST:
            context.results["stopped"] = f"no time was left for {case.name}, {peers}"
            break
        figures = found.setdefault(case.name, Figures(case.name))
        take(case, OneProgramAtATime(), EFFORT, peers, figures)
        context.results["cases"][case.name] = dataclasses.asdict(figures)
        lines = [_line(figures, copy) for figures in found.values()]
        context.results["summary"] = [TITLE, *lines]
        context.save()
        gc.collect()
    wrong = [f"{name}: {x.notes[OURS]}" for name, x in found.items() if OURS in x.notes]
    assert not wrong, "; ".join(wrong)
    assert found, "no time was left"


def plan(device: torch.device) -> Iterator[tuple[Any, list[str]]]:
    """Cases with the contenders beside ours, in order; a case comes up to three times."""
    cases: list[Any] = headline.device_cases(device.type)
    if device.type == "cpu":  # one of each kind; no compilers
        cases = [case.tiny() for case in cases[: headline.N_FIRST]]
    yield from ((case, []) for case in cases)
    for compiled in (False, True) if device.type == "cuda" else (False,):
        for case in cases:
            others = (*case.peers, *case.yardsticks)
            if chosen := [name for name in others if (name in COMPILED_PEERS) == compiled]:
                yield case, chosen


def _line(figures: Figures, copy: float) -> str:
    name = figures.case.removeprefix("rel_attention/").replace("/bfloat16", "")
    if figures.seconds is None or figures.gflops is None:
        return f"{name:<34} {figures.notes.get(OURS)}"
    share = figures.share_of_limit
    if headline.DECODE.name in name:
        share = headline.DECODE_BYTES / figures.seconds.median / copy
    compared = figures.peers | figures.yardsticks
    others = [f"{other} {x.ratio.median:.2f}" for other, x in compared.items()]
    speed = f"{1e3 * figures.seconds.median:8.3f} {figures.gflops / 1e3:4.0f}"
    return f"{name:<34} {speed} {'–' if share is None else f'{share:.0%}':>4}  {', '.join(others)}"
