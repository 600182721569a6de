"""Stage "ceilings": the rates of memory and of the tensor cores, which bound every kernel."""

from __future__ import annotations

import torch

from benchmarks.device import copy_rate, matmul_rate
from tools.gpu.stages import Context


def run(context: Context) -> None:
    """Results: bytes/s of a copy, reads and writes counted, and FLOP/s of a bfloat16 product."""
    n_bytes, size = (2**20, 64) if context.is_rehearsal else (2**30, 8192)
    copy = copy_rate(context.device, n_bytes)
    context.results["copy_bytes_per_second"] = copy
    context.save()
    gemm = matmul_rate(context.device, torch.bfloat16, size)
    context.results["gemm_flop_per_second"] = gemm
    context.results["summary"] = [
        f"copy {copy / 1e12:.2f} TB/s; bfloat16 product of {size}³: {gemm / 1e12:.0f} TFLOP/s"
    ]
