"""Stage "cpu_threads": the CPU kernels with more and more threads."""

from __future__ import annotations

import os

import torch

from benchmarks import registry
from benchmarks.cases import OURS
from benchmarks.measure import sample
from tools.gpu.stages import Context

CASES = ("wt103_base_train/", "wt103_base_softmax/*/loss", "enwik8_base_4layers/*/train_step")


def run(context: Context) -> None:
    """Results: by case, the median milliseconds of one run of ours by number of threads."""
    tiny = context.is_rehearsal
    counts = [n for n in (1, 2, 4, 8, 16) if n <= (os.cpu_count() or 1)]
    lines = context.results.setdefault("summary", [])
    for case in registry.select(registry.timed_cases(), CASES)[: 1 if tiny else None]:
        if context.seconds_left() < 10:
            break
        times: dict[int, float] = {}
        with (case.tiny() if tiny else case).contender(OURS) as timed:
            for threads in counts:
                torch.set_num_threads(threads)
                timed()
                times[threads] = round(1e3 * sample(timed, min_seconds=0.5), 3)
        context.results[case.name] = times
        lines.append(f"{case.name}: ms by threads {times}")
        context.save()
