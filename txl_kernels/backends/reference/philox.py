"""Dropout's random bits: Philox4x32-10 counted by (batch, head, query, key), in int64 tensors.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW32 = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds of Philox4x32 on broadcastable int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW32, (k1 + _WEYL[1]) & _LOW32
    return c0, c1, c2, c3


def dropout_keep(seed: Tensor, p: float, shape: tuple[int, int, int, int]) -> Tensor:
    """Which attention probabilities dropout keeps.

    Element (b, h, i, j) is kept where word j mod 4 of Philox4x32-10 with key = (low, high 32 bits
    of the seed) and counter = (⌊j/4⌋, i, b·H + h, 0) is at least ⌊p·2³²⌋.

    Args:
        seed: int64, one element, on the device of the result.
        p: probability of dropping, in [0, 1).
        shape: (B, H, Tq, Tk).

    Returns:
        bool [B, H, Tq, Tk], True where kept.
    """
    B, H, Tq, Tk = shape
    device = seed.device
    seed = seed.reshape(())
    block = torch.arange((Tk + 3) // 4, device=device)
    i = torch.arange(Tq, device=device)[:, None]
    row = torch.arange(B * H, device=device)[:, None, None]
    counter = (block, i, row, torch.zeros_like(block))
    words = philox4x32(counter, (seed & _LOW32, (seed >> 32) & _LOW32))
    drawn = torch.stack(words, dim=-1)  # [B·H, Tq, ⌈Tk/4⌉, 4]
    return drawn.flatten(-2)[..., :Tk].reshape(shape) >= int(p * 2**32)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b; the product itself would overflow int64."""
    high = (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16
    return high, (a * b) & _LOW32
