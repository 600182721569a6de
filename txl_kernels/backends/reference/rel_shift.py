"""The relative shift in plain PyTorch: row m = j - i + offset read at query i and key j."""

from __future__ import annotations

import torch
from torch import Tensor


def rel_shift(x: Tensor, n_keys: int, offset: int, *, clamp: bool = False) -> Tensor:
    """out[..., i, j] = x[..., i, j - i + offset]: [..., Tq, R] -> [..., Tq, n_keys].

    Rows outside [0, R) read as 0, or as the nearest row with `clamp`.
    """
    Tq, R = x.shape[-2:]
    i = torch.arange(Tq, device=x.device)[:, None]
    j = torch.arange(n_keys, device=x.device)
    m = j - i + offset  # [Tq, n_keys]
    inside = m.clamp(0, R - 1)
    shifted = x.gather(-1, inside.expand(*x.shape[:-1], n_keys))
    return shifted if clamp else shifted.masked_fill(m != inside, 0.0)
