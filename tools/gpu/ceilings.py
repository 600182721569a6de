"""Stage "ceilings": the rates that no kernel on this machine exceeds by much."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tools.gpu.stages import Context


def run(context: Context) -> None:
    """Results: bytes/s of a copy, reads and writes counted, and FLOP/s of a bfloat16 product."""
    rehearsal = context.device.type == "cpu"
    n_bytes, size = (2**20, 64) if rehearsal else (2**30, 8192)
    source = torch.randint(2**31 - 1, (n_bytes // 4,), dtype=torch.int32, device=context.device)
    out = torch.empty_like(source)
    copy = 2 * n_bytes / milliseconds(lambda: out.copy_(source), context.device) * 1e3
    context.results["copy_bytes_per_second"] = copy
    context.save()
    a, b = (torch.randn(size, size, device=context.device).bfloat16() for _ in range(2))
    gemm = 2 * size**3 / milliseconds(lambda: a @ b, context.device) * 1e3
    context.results["gemm_flop_per_second"] = gemm
    context.results["summary"] = [
        f"copy {copy / 1e12:.2f} TB/s; bfloat16 product of {size}³: {gemm / 1e12:.0f} TFLOP/s"
    ]
    context.save()


def milliseconds(call: Callable[[], object], device: torch.device, rep: int = 100) -> float:
    """Median time of a call, by CUDA events and with L2 flushed before each run; on the CPU the
    time of one run."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    from triton.testing import do_bench

    return float(do_bench(call, rep=rep, return_mode="median"))
