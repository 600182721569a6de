"""Dropout whose masks are cheap on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from txl_kernels.ops.checks import check_number


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws four elements' bits at once on a CPU.

    torch draws one serial random number per element there, which is up to 17% of a training step
    of this model; four 16-bit fields of one 64-bit number take a quarter of the time. The
    probability is rounded to a multiple of 2^-16, and what is kept is divided by the share kept.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__(check_number(type(self).__name__, "p", p), inplace)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape and floating dtype, to the same."""
        dropped = round(self.p * 2**16)
        if not self.training or x.device.type != "cpu" or dropped in (0, 2**16):
            return F.dropout(x, self.p, self.training)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        fields = draws.view(torch.int16)[: x.numel()].view(x.shape)
        keep = (fields >= dropped - 2**15).to(x.dtype)
        return x * keep.mul_(2**16 / (2**16 - dropped))
