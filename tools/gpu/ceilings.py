"""Stage "ceilings": the rates of memory and of the tensor cores, which bound every kernel."""

from __future__ import annotations

import torch

from benchmarks.device import copy_rate, matmul_rate
from tools.gpu.stages import Context


def run(context: Context) -> None:
    """Results: bytes/s of a copy, FLOP/s of a bfloat16 product."""
    n_bytes, size = (2**20, 64) if context.is_rehearsal else (2**30, 8192)
    copy = copy_rate(context.device, n_bytes)
    product = matmul_rate(context.device, torch.bfloat16, size)
    context.results |= {"copy_bytes_per_second": copy, "matmul_flop_per_second": product}
    line = f"copy {copy / 1e12:.2f} TB/s; bfloat16 product of {size}³: {product / 1e12:.0f} TFLOP/s"
    context.results["summary"] = [line]
