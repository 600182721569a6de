"""Stages "ceilings", "timings" and "cpu_threads", with the measurements of the benchmarks."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import headline, registry
from benchmarks.cases import OURS
from benchmarks.cases.rel_attention import COMPILED_PEERS
from benchmarks.device import copy_rate, matmul_rate
from benchmarks.measure import OneProgramAtATime, sample
from benchmarks.suite import Effort, Figures, take
from tools.gpu.runner import Context

EFFORT = Effort(pairs=7, sample_seconds=1e-6, memory=False)
LEAST = 2.0  # seconds: with less, no case is started
TITLE = "ours: ms, TFLOP/s, share of the ceiling; others: time / ours"
CPU_CASES = ("wt103_base_train/", "wt103_base_softmax/*/loss", "enwik8_base_4layers/*/train_step")


def ceilings(context: Context) -> None:
    """The rates that bound every kernel. Results: bytes/s of a copy, FLOP/s of a product."""
    copy = context.results["copy_bytes_per_second"] = copy_rate(context.device)
    product = matmul_rate(context.device, torch.bfloat16, 64 if context.is_rehearsal else 8192)
    context.results["matmul_flop_per_second"] = product
    line = f"copy {copy / 1e12:.2f} TB/s; bfloat16 product {product / 1e12:.0f} TFLOP/s"
    context.results["summary"] = [line]


def run(context: Context) -> None:
    """Results: "cases", by name the figures of the benchmarks, or a note with the reason why
    there are none; "copy_bytes_per_second", the ceiling of decoding."""
    gc.collect()
    gc.freeze()  # later collections skip the imported modules: a third of a second each
    found: dict[str, Figures] = {}
    copy = copy_rate(context.device)
    context.results |= {"copy_bytes_per_second": copy, "cases": {}}
    for case, others in plan(context.device):
        if context.seconds_left() < LEAST:
            context.results["stopped"] = f"no time was left for {case.name}, {others}"
            break
        figures = found.setdefault(case.name, Figures(case.name))
        take(case, OneProgramAtATime(), EFFORT, others, figures)
        context.results["cases"][case.name] = dataclasses.asdict(figures)
        context.results["summary"] = [TITLE, *(_line(figures, copy) for figures in found.values())]
        context.save()
        gc.collect()
    wrong = [f"{name}: {x.notes[OURS]}" for name, x in found.items() if OURS in x.notes]
    assert not wrong, "; ".join(wrong)
    assert found, "no time was left"


def plan(device: torch.device) -> Iterator[tuple[Any, list[str]]]:
    """Cases with the contenders beside ours: first all cases alone, then with the others, at the
    end with those that a compiler needs many seconds for."""
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
    share = figures.share_of_limit or 0.0
    if headline.DECODE.name in name:
        share = headline.DECODE_BYTES / figures.seconds.median / copy
    compared = figures.peers | figures.yardsticks
    others = [f"{other} {x.ratio.median:.2f}" for other, x in compared.items()]
    speed = f"{1e3 * figures.seconds.median:8.3f} {figures.gflops / 1e3:4.0f} {share:4.0%}"
    return f"{name:<34} {speed}  {', '.join(others)}"


def cpu_threads(context: Context) -> None:
    """Results: by case on the CPU, the milliseconds of one run of ours by number of threads."""
    cases = registry.select(registry.timed_cases(), CPU_CASES)
    for case in [cases[0].tiny()] if context.is_rehearsal else cases:
        times: dict[int, float] = {}
        with case.contender(OURS) as timed:
            for threads in (1, 2, 4, 8, 16):
                if threads <= (os.cpu_count() or 1) and context.seconds_left() > 5:
                    torch.set_num_threads(threads)
                    timed()
                    times[threads] = round(1e3 * sample(timed, min_seconds=0.5), 3)
        context.results[case.name] = times
        line = f"{case.name}: ms by threads {times}"
        context.results.setdefault("summary", []).append(line)
        context.save()
