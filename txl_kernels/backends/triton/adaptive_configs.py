"""Which rows of the launch table the adaptive ops' kernels use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from txl_kernels.backends.triton.launch_table import (
    HeadConfig,
    ProductConfig,
    SplitConfig,
    TailConfig,
    find,
)


def product_config(
    device: torch.device, dtype: torch.dtype, row_widths: Sequence[int] = ()
) -> ProductConfig:
    """For both kernels in `adaptive_products`.

    `row_widths` are the widths of the rows that a product of rows reads. 16-bit rows whose length
    is no multiple of 16 bytes are loaded element by element, and the addresses need registers.
    """
    unaligned = any(width * dtype.itemsize % 16 for width in row_widths)
    variants = ["unaligned"] if unaligned else []
    bits = 8 * dtype.itemsize
    return find(ProductConfig, "adaptive_products", device, variants=variants, bits=bits)


def tail_config(
    kernel: str, device: torch.device, dtype: torch.dtype, widths: Sequence[int]
) -> TailConfig:
    """For the kernel "fwd", "dx" or "dweight" of the tails, whose rows have these widths."""
    name, bits = f"adaptive_tails_{kernel}", 8 * dtype.itemsize
    config = find(TailConfig, name, device, bits=bits)
    if any(width > config.MAX_WIDTH and width * dtype.itemsize % 16 for width in widths):
        return find(TailConfig, name, device, variants=["unaligned"], bits=bits)
    return config


def splits(kernel: str, device: torch.device) -> SplitConfig:
    """For "fwd" or "dx" of the tails.

    The rows give about two programs to each multiprocessor of a large GPU, at 64 tokens each.
    """
    return find(SplitConfig, f"adaptive_tails_{kernel}_splits", device)


def head_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for the kernels that read one row of the head's logits."""
    return find(HeadConfig, "adaptive_head", device)._asdict()
