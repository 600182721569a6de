"""Tile sizes, warps and pipeline stages of the adaptive ops' kernels: a static table."""

from __future__ import annotations

import torch

Config = tuple[dict[str, int], dict[str, int]]

_PRODUCT_16: Config = (
    {"BLOCK_ROWS": 64, "BLOCK_OUT": 64, "BLOCK_IN": 64},
    {"num_warps": 4, "num_stages": 3},
)
_PRODUCT_32: Config = (
    {"BLOCK_ROWS": 32, "BLOCK_OUT": 32, "BLOCK_IN": 32},
    {"num_warps": 4, "num_stages": 2},
)


def product_config(dtype: torch.dtype) -> Config:
    """Of both kernels in `adaptive_products`: BLOCK_ROWS counts tokens."""
    return _PRODUCT_32 if dtype == torch.float32 else _PRODUCT_16


_TAIL = {"MAX_WIDTH": 256, "BLOCK_WIDTH": 64}
_TAIL_16: dict[str, Config] = {
    "fwd": (
        {"BLOCK_ROWS": 64, "BLOCK_V": 128, "N_PARTIALS": 16384, "MIN_COLUMNS": 1024, **_TAIL},
        {"num_warps": 4, "num_stages": 2},
    ),
    "dx": (
        {"BLOCK_ROWS": 64, "BLOCK_V": 64, "N_PARTIALS": 8192, "MIN_COLUMNS": 1024, **_TAIL},
        {"num_warps": 8, "num_stages": 2},
    ),
    "dweight": (
        {"BLOCK_ROWS": 64, "BLOCK_V": 64, **_TAIL},
        {"num_warps": 8, "num_stages": 2},
    ),
}
_TAIL32 = {"MAX_WIDTH": 64, "BLOCK_WIDTH": 32}
_TAIL_32: dict[str, Config] = {
    "fwd": (
        {"BLOCK_ROWS": 32, "BLOCK_V": 64, "N_PARTIALS": 16384, "MIN_COLUMNS": 1024, **_TAIL32},
        {"num_warps": 4, "num_stages": 2},
    ),
    "dx": (
        {"BLOCK_ROWS": 32, "BLOCK_V": 32, "N_PARTIALS": 8192, "MIN_COLUMNS": 1024, **_TAIL32},
        {"num_warps": 4, "num_stages": 2},
    ),
    "dweight": (
        {"BLOCK_ROWS": 32, "BLOCK_V": 32, **_TAIL32},
        {"num_warps": 4, "num_stages": 2},
    ),
}


def tail_config(kernel: str, dtype: torch.dtype) -> Config:
    """Of "fwd", "dx" or "dweight" of the tails."""
    return (_TAIL_32 if dtype == torch.float32 else _TAIL_16)[kernel]
