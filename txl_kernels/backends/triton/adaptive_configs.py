"""Launch configurations of the adaptive ops' kernels: a table, never a measurement at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from txl_kernels.backends.triton.rel_attention_config import architecture


class ProductConfig(NamedTuple):
    """Tokens, columns and inner width of a tile of `adaptive_products`."""

    BLOCK_ROWS: int
    BLOCK_OUT: int
    BLOCK_IN: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """As keyword arguments of a launch."""
        return self._asdict()


class TailConfig(NamedTuple):
    """A tile of tokens and columns; how much of a row it holds; how a tail's columns are split."""

    BLOCK_ROWS: int
    BLOCK_V: int
    MAX_WIDTH: int  # rows up to this wide are held whole, wider ones in pieces of BLOCK_WIDTH
    BLOCK_WIDTH: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """As keyword arguments of a launch."""
        return self._asdict()


class Splits(NamedTuple):
    """Rows of partial results beside one per token, and the least columns to each."""

    N_PARTIALS: int
    MIN_COLUMNS: int


# By architecture and whether inputs have 16 bits.
PRODUCT: dict[tuple[str, bool], ProductConfig] = {
    ("interpreter", True): ProductConfig(16, 16, 16, 4, 1),
    ("interpreter", False): ProductConfig(16, 16, 16, 4, 1),
    ("sm_80", True): ProductConfig(64, 64, 64, 4, 3),
    ("sm_80", False): ProductConfig(32, 32, 32, 4, 2),
    ("sm_90", True): ProductConfig(64, 64, 64, 4, 3),
    ("sm_90", False): ProductConfig(32, 32, 32, 4, 2),
}
# By kernel, architecture and whether inputs have 16 bits.
TAIL: dict[tuple[str, str, bool], TailConfig] = {
    ("fwd", "sm_80", True): TailConfig(64, 128, 256, 32, 8, 2),
    ("fwd", "sm_80", False): TailConfig(32, 32, 64, 32, 8, 2),
    ("fwd", "sm_90", True): TailConfig(64, 128, 256, 64, 8, 2),
    ("fwd", "sm_90", False): TailConfig(32, 32, 64, 32, 8, 2),
    ("dx", "sm_80", True): TailConfig(64, 32, 256, 32, 8, 2),
    ("dx", "sm_80", False): TailConfig(32, 32, 64, 32, 8, 2),
    ("dx", "sm_90", True): TailConfig(64, 64, 256, 32, 8, 2),
    ("dx", "sm_90", False): TailConfig(32, 32, 64, 32, 8, 2),
    ("dweight", "sm_80", True): TailConfig(64, 64, 256, 32, 8, 2),
    ("dweight", "sm_80", False): TailConfig(32, 32, 64, 32, 8, 2),
    ("dweight", "sm_90", True): TailConfig(64, 64, 256, 64, 8, 2),
    ("dweight", "sm_90", False): TailConfig(32, 32, 64, 32, 8, 2),
}
# 16-bit rows that are no multiple of 16 bytes are loaded one by one, and addresses take the
# registers.
_UNALIGNED_PRODUCT = ProductConfig(64, 32, 32, 4, 2)
# The same, of tails whose rows are wider than MAX_WIDTH.
_UNALIGNED: dict[tuple[str, str, bool], TailConfig] = {
    ("dx", "sm_80", True): TailConfig(64, 64, 128, 64, 8, 2),
    ("dx", "sm_90", True): TailConfig(64, 64, 128, 64, 8, 2),
}
_INTERPRETED_TAIL = TailConfig(16, 16, 32, 16, 4, 1)
# About two programs to each of a large GPU's 132 multiprocessors, at 64 tokens each.
_SPLITS = {"fwd": Splits(16384, 1024), "dx": Splits(8192, 1024)}
_INTERPRETED_SPLITS = Splits(64, 32)


def product_config(
    device: torch.device, dtype: torch.dtype, row_widths: Sequence[int] = ()
) -> ProductConfig:
    """Of both kernels in `adaptive_products`; `row_widths`: of what a product of rows reads."""
    arch, is_16_bit = architecture(device), dtype != torch.float32
    if arch != "interpreter" and is_16_bit and any(width % 8 for width in row_widths):
        return _UNALIGNED_PRODUCT
    return PRODUCT[arch, is_16_bit]


def tail_config(
    kernel: str, device: torch.device, dtype: torch.dtype, widths: Sequence[int]
) -> TailConfig:
    """Of "fwd", "dx" or "dweight" of the tails."""
    arch = architecture(device)
    if arch == "interpreter":
        return _INTERPRETED_TAIL
    key = kernel, arch, dtype != torch.float32
    config = TAIL[key]
    if any(width > config.MAX_WIDTH and width * dtype.itemsize % 16 for width in widths):
        return _UNALIGNED.get(key, config)
    return config


def splits(kernel: str, device: torch.device) -> Splits:
    """Of "fwd" or "dx" of the tails."""
    return _INTERPRETED_SPLITS if architecture(device) == "interpreter" else _SPLITS[kernel]


def head_options(device: torch.device) -> dict[str, int]:
    """Of the kernels that go over one row of the head's logits."""
    if architecture(device) == "interpreter":
        return {"BLOCK_V": 64}
    return {"BLOCK_V": 4096, "num_warps": 8}
