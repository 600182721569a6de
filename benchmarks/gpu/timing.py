"""Time on a GPU: CUDA events, several sets of inputs in turn, L2 flushed before each run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from benchmarks.measure import Quartiles

Run = Callable[[], object]

WARM_UPS = 3
SECONDS = 0.25  # of a contender's runs, at least
FEWEST, MOST = 7, 200
FILLS = 3  # of 1 GiB before each run, each a third of a millisecond at 3 TB/s


class Contender(NamedTuple):
    """Something to time: the same work on each of several sets of inputs."""

    name: str
    runs: Sequence[Run]


class Flush:
    """Writes more than L2 holds, so that the next run finds none of its inputs there.

    For about a millisecond: meanwhile the host enqueues the run behind it, whose launches would
    else be waited for between the two events.
    """

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(max(4 * size, 2**30) // 4, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        for _ in range(FILLS):
            self._buffer.fill_(1)


def rounds_for(seconds_each: float) -> int:
    """Runs that fill `SECONDS`, within `FEWEST` and `MOST`."""
    return min(max(int(SECONDS / max(seconds_each, 1e-7)), FEWEST), MOST)


def take(contenders: Sequence[Contender], flush: Callable[[], None]) -> dict[str, Quartiles]:
    """Milliseconds of each contender. They take turns, every second round in reverse order."""
    if not contenders:
        return {}
    rounds = min(rounds_for(max(_warm_up(each), 1e-7)) for each in contenders)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]
    events = {each.name: [] for each in contenders}
    for turn in range(rounds):
        for each in contenders[:: -1 if turn % 2 else 1]:
            run = each.runs[turn % len(each.runs)]
            flush()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events[each.name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: Quartiles.of(start.elapsed_time(end) for start, end in pairs)
        for name, pairs in events.items()
    }


def peak_mib(run: Run) -> float:
    """Growth of the device's allocated memory at its highest point during one run, in MiB."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth(device: torch.device, n_bytes: int = 2**30) -> float:
    """Bytes/s of a copy from device memory to device memory, read and write both counted."""
    source = torch.randint(2**31 - 1, (n_bytes // 4,), dtype=torch.int32, device=device)
    out = torch.empty_like(source)
    taken = take([Contender("copy", [lambda: out.copy_(source)])], lambda: None)
    return 2 * n_bytes / (taken["copy"].median * 1e-3)


def gemm_rate(device: torch.device, size: int = 8192) -> float:
    """FLOP/s of torch's own product of two square bfloat16 matrices of normal numbers."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    taken = take([Contender("gemm", [lambda: a @ b])], lambda: None)
    return 2 * size**3 / (taken["gemm"].median * 1e-3)


def ratios(taken: Mapping[str, Quartiles], ours: str) -> dict[str, float]:
    """Each other contender's median over ours: above 1 ours is faster."""
    return {
        name: found.median / taken[ours].median for name, found in taken.items() if name != ours
    }


def _warm_up(contender: Contender) -> float:
    """Seconds of a run, after compilers and caches have had theirs."""
    for run in (*contender.runs, *contender.runs)[: max(WARM_UPS, len(contender.runs))]:
        run()
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        contender.runs[0]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)
