"""`python -m benchmarks`: measure the cases, print one table, write JSON and a plot.

`python -m benchmarks table9` measures Table 9 of the paper instead.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks import headline, machine, registry
from benchmarks.cases import OURS
from benchmarks.measure import SAMPLE_SECONDS, WANTED_ROUNDS, OneProgramAtATime, Probe
from benchmarks.plot import plot
from benchmarks.report import print_report, write_json
from benchmarks.step_profile import profile_step
from benchmarks.suite import Effort, Figures, take, take_memory, take_once
from benchmarks.table9 import command as table9
from txl_kernels.backends import cuda_device

RESULTS = Path(__file__).parent / "results"
WIDTH = 172  # columns, without a terminal


def main() -> None:
    if sys.argv[1:2] == ["table9"]:
        table9.main(sys.argv[2:])
        return
    options = _parse()
    on_gpu = options.device == "cuda"
    timed = headline.device_cases() if on_gpu else registry.timed_cases()
    timed = registry.select(timed, options.cases)
    memory = registry.select(() if on_gpu else registry.memory_cases(), options.cases)
    long = registry.select(() if on_gpu else registry.long_cases(), options.cases)
    chosen = [*timed, *memory, *long]
    if options.list:
        print(*(case.name for case in chosen), sep="\n")
        return
    if not chosen:
        raise SystemExit(f"no case matches {' '.join(options.cases)}; --list shows all")
    timed, long = registry.runnable(timed), registry.runnable(long)
    n_absent = len(chosen) - len(timed) - len(memory) - len(long)
    absent = f"left out: {n_absent} drop-ins, which need `make bench-dropins-env`"
    if n_absent == len(chosen):
        raise SystemExit(absent)
    if on_gpu and (reason := cuda_device.unavailable_reason()):
        raise SystemExit(f"--device cuda: {reason}")
    torch.set_num_threads(options.threads)
    console = Console(width=options.width or (None if sys.stdout.isatty() else WIDTH))
    effort = Effort(options.pairs, options.sample_seconds, memory=not options.no_memory)
    described = machine.describe(options.device)
    probe = OneProgramAtATime() if on_gpu else Probe()
    slug = machine.Processor(str(described["processor"]), ()).slug
    stem = f"{slug}-{datetime.date.today().isoformat()}{'-malloc' * bool(machine.allocator())}"
    written = options.out / f"{stem}.json"
    results = []
    for case in track(timed, "timing", console=console):
        results.append(take(case, probe, effort))
        write_json(written, described, results)  # a run that is stopped keeps its finished cases
    for case in memory if effort.memory else ():
        results.append(Figures(case.name))
        take_memory(case, (OURS,), results[-1])
    for case in long:
        results.append(take_once(case, probe))
        write_json(written, described, results)
    profile = []
    if any(case.name.endswith("train_step") for case in timed):
        profile = profile_step(registry.model_shapes()[0], torch.float32)

    print_report(console, described, results, profile)
    if n_absent:
        console.print(absent)
    everything = write_json(written, described, results, profile)
    plot(options.out / f"{stem}.png", everything, str(described["processor"]))
    console.print(f"written: {options.out / stem}.json and .png", highlight=False)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "cases", nargs="*", default=["*"], help="parts of names, such as enwik8_base/float32"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the headline cases on a GPU"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--pairs", type=int, default=WANTED_ROUNDS, help="quiet pairs per peer")
    parser.add_argument("--quick", action="store_true", help="3 pairs of short samples")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, help="columns of the table")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and plot")
    options = parser.parse_args()
    options.sample_seconds = SAMPLE_SECONDS
    if options.quick:
        options.pairs, options.sample_seconds = 3, 0.01
    return options


if __name__ == "__main__":
    main()
