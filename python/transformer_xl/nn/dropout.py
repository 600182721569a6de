"""Dropout whose masks are cheap on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from txl_kernels.ops.checks import check_number
from txl_kernels.transforms import inside_transform


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws the bits of four elements at once on a CPU.

    torch draws one random number per element there, one after the other, which takes up to 17% of
    a training step of this model; four 16-bit fields of one 64-bit number take a quarter of that
    time. The probability is rounded to a multiple of 2^-16, and the kept elements are divided by
    the rounded probability of keeping. Other devices and `torch.vmap`, which controls the random
    numbers itself, use torch's dropout.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__(check_number(type(self).__name__, "p", p), inplace)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape and floating dtype, to the same."""
        if not self.training:
            return x
        dropped = round(self.p * 2**16)
        is_fast = x.device.type == "cpu" and not inside_transform("vmap")
        if not is_fast or dropped in (0, 2**16):
            return F.dropout(x, self.p)
        n_draws = (x.numel() + 3) // 4
        draws = torch.empty(n_draws, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        fields = draws.view(torch.int16)[: x.numel()].view(x.shape)
        keep = (fields >= dropped - 2**15).to(x.dtype)
        return x * keep.mul_(2**16 / (2**16 - dropped))
