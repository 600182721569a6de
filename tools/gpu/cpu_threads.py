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
    """Results: by case, the median seconds of one run of ours by number of threads."""
    rehearsal = context.device.type == "cpu"
    counts = [n for n in (1, 2, 4, 8, 16) if n <= (os.cpu_count() or 1)]
    lines = context.results.setdefault("summary", [])
    for case in registry.select(registry.timed_cases(), CASES)[: 1 if rehearsal else None]:
        times = context.results.setdefault(case.name, {})
        with (case.tiny() if rehearsal else case).contender(OURS) as timed:
            for threads in counts:
                torch.set_num_threads(threads)
                timed()
                times[threads] = sample(timed, min_seconds=0.01 if rehearsal else 0.5)
        shown = ", ".join(f"{n}: {1e3 * seconds:.2f}" for n, seconds in times.items())
        lines.append(f"{case.name}: ms by threads {shown}")
        context.save()
        if context.seconds_left() < 5:
            break
