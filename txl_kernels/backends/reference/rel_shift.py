"""The relative shift in plain PyTorch: row m = j - i + offset read at query i and key j."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FAR = 2**62  # farther than any two positions; sums with positions still fit an int64


def rel_shift(x: Tensor, n_keys: int, offset: int | Tensor, *, clamp: bool = False) -> Tensor:
    """out[..., i, j] = x[..., i, j - i + offset]: [..., Tq, R] -> [..., Tq, n_keys].

    Rows outside [0, R) read as 0, or as the nearest row with `clamp`. `offset` may be a tensor
    that broadcasts to x and has a last size of 1.
    """
    Tq, R = x.shape[-2:]
    offset = within_reach(offset)
    i = torch.arange(Tq, device=x.device)[:, None]
    j = torch.arange(n_keys, device=x.device)
    m = j - i + offset  # [..., Tq, n_keys]
    inside = m.clamp(0, R - 1)
    shifted = x.gather(-1, inside.expand(*x.shape[:-1], n_keys))
    return shifted if clamp else shifted.masked_fill(m != inside, 0.0)


def within_reach(n: int | Tensor) -> Any:
    """The integer closest to `n` whose sums with positions of queries and keys do not overflow.

    Distances between positions compare with it as with `n`. Symbolic integers of `torch.export`
    and tensors are computed from lengths: no sum with them overflows.
    """
    return n if isinstance(n, (torch.SymInt, Tensor)) else max(-_FAR, min(n, _FAR))
