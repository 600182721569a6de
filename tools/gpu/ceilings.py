"""Stage "ceilings": the rates of memory and of the tensor cores, which bound every kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.device import timer
from benchmarks.measure import sample
from tools.gpu.stages import Context


def run(context: Context) -> None:
    """Results: bytes/s of a copy, reads and writes counted, and FLOP/s of a bfloat16 product."""
    n_bytes, size = (2**20, 64) if context.is_rehearsal else (2**30, 8192)

    def rate(work: int, call: Callable[[], object]) -> float:
        timed = timer([call], context.device)
        timed()
        return work / sample(timed, min_seconds=0.05)

    source = torch.randint(2**31 - 1, (n_bytes // 4,), dtype=torch.int32, device=context.device)
    out = torch.empty_like(source)
    copy = context.results["copy_bytes_per_second"] = rate(2 * n_bytes, lambda: out.copy_(source))
    a, b = (torch.randn(size, size, device=context.device).bfloat16() for _ in range(2))
    gemm = context.results["gemm_flop_per_second"] = rate(2 * size**3, lambda: a @ b)
    context.results["summary"] = [
        f"copy {copy / 1e12:.2f} TB/s; bfloat16 product of {size}³: {gemm / 1e12:.0f} TFLOP/s"
    ]
