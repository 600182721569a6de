"""Time and memory on a GPU: CUDA events, several sets of inputs in turn, L2 flushed before runs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Timed, sample, stopwatch
from txl_kernels import BackendUnavailableError, resolve

INPUT_SETS = 2
_FLUSH_BYTES, _FILLS = 2**28, 12  # more than L2 holds


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    """One for all timers."""
    return torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)


def timer(runs: Sequence[Callable[[], object]], device: torch.device) -> Timed:
    """Returns the seconds of one run; the runs are the same work on different inputs, in turn.

    Writes to a buffer flush L2. They take about a millisecond, in which the host enqueues the run
    that follows, so that the events enclose no launch latency.
    """
    turns = itertools.cycle(runs)
    if device.type != "cuda":
        return stopwatch(lambda: next(turns)())
    buffer = _flush_buffer(device)

    def timed() -> float:
        run = next(turns)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_FILLS):
            buffer.fill_(1)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return timed


def preferred_backend(op: str, device: str, **call: Any) -> str:
    """The backend that "auto" prefers for a call, given as the arguments of `resolve`. A backend
    requested by name never falls back. BackendUnavailableError if no kernel runs on a GPU."""
    if device == "cpu":
        return "auto"
    backend, reason = resolve(op, device=device, **call)
    if backend is None or reason is not None:
        raise BackendUnavailableError(f"{op}: {reason}")
    return backend


def peak_mib(run: Callable[[], object]) -> float:
    """Growth of the GPU's allocated memory at its peak during one run, in MiB; without CUDA 0."""
    if not torch.cuda.is_available():
        run()
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of torch's product of two square matrices of normal numbers."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device)


def copy_rate(device: torch.device) -> float:
    """Bytes/s of a copy of 1 GiB, on a CPU of 1 MiB; reads and writes counted."""
    n_bytes = 2**30 if device.type == "cuda" else 2**20
    source = torch.randint(2**31 - 1, (n_bytes // 4,), dtype=torch.int32, device=device)
    out = torch.empty_like(source)
    return 2 * n_bytes / _seconds(lambda: out.copy_(source), device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    timed = timer([run], device)
    timed()
    return sample(timed, min_seconds=0.02)
