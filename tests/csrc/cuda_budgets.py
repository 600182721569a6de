"""What each CUDA kernel may take of a multiprocessor: the one table that the gates go by.

All blocks have 128 threads: a multiprocessor's 65,536 registers hold 512 // registers of them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Kernels by name and template arguments: element type, head size, queries of a warp, alignment.
_ROWS = (
    # kernel, registers, 16-byte loads in flight, 16-byte stores
    (r"rel_shift_kernel<.*>", 80, 8, 4),
    (r"rel_attention_positions_kernel<.*, true>", 128, 8, 0),
    (r"rel_attention_positions_kernel<.*, false>", 128, 0, 0),
    (r"rel_attention_split_kernel<.*, 1, true>", 128, 8, 0),
    (r"rel_attention_split_kernel<.*, 1, false>", 128, 0, 0),
    (r"rel_attention_split_kernel<float, 256, 4, true>", 255, 8, 0),
    (r"rel_attention_split_kernel<.*, 4, true>", 168, 8, 0),
    (r"rel_attention_split_kernel<(float, 64|float, 128), 4, false>", 168, 0, 0),
    (r"rel_attention_split_kernel<.*, 4, false>", 255, 0, 0),
    (r"rel_attention_combine_kernel<.*>", 64, 0, 0),
)
SHARED_BYTES = 100 * 1024  # of a multiprocessor (the least: sm_86), for all its blocks


class Budget(NamedTuple):
    """Registers per thread; and the 16-byte accesses that one run of straight code makes: loads on
    their way before the first is used, stores behind them."""

    registers: int
    loads: int
    stores: int


def budget_of(kernel: str) -> Budget:
    """The first row that fits a kernel's demangled name.

    Raises:
        LookupError: none does.
    """
    for pattern, *numbers in _ROWS:
        if re.search(pattern, kernel):
            return Budget(*numbers)
    raise LookupError(f"no budget for {kernel}: add a row to {__file__}")
