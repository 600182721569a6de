"""The valid frames of a padded block: moved to the front of each row, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from txl_kernels.ops.checks import check_given, check_shape


class ValidFrames(NamedTuple):
    """Row b's valid frames are first[b] <= t < first[b] + length[b]; both int64 [B]."""

    first: Tensor
    length: Tensor

    @classmethod
    def between(
        cls, caller: str, x: Tensor, starts: Tensor | None, lengths: Tensor | None
    ) -> ValidFrames:
        """The frames starts[b] <= t < lengths[b] of `x` [B, T, d], which default to 0 and T.

        Raises:
            TypeError, ValueError: not int32 or int64 [B] on x's device; `caller` begins the
                message.
        """
        B, T, _ = x.shape
        given = {"starts": starts, "lengths": lengths}
        check_given(caller, given, (torch.int32, torch.int64), x.device)
        for name, tensor in given.items():
            if tensor is not None:
                check_shape(caller, name, tensor, (B,))
        first, end = (
            torch.full((B,), default, device=x.device) if tensor is None else tensor.long()
            for tensor, default in ((starts, 0), (lengths, T))
        )
        first, end = first.clamp(0, T), end.clamp(0, T)
        return cls(first, (end - first).clamp(min=0))

    def to_front(self, x: Tensor) -> Tensor:
        """[B, T, d] to the same: the valid frames of each row first, zeros after them."""
        t = torch.arange(x.shape[1], device=x.device)
        return _gathered(x, t + self.first[:, None], t < self.length[:, None])

    def from_front(self, x: Tensor) -> Tensor:
        """The inverse of `to_front`: [B, T, d] with zeros at all other frames."""
        t = torch.arange(x.shape[1], device=x.device) - self.first[:, None]  # [B, T]
        return _gathered(x, t, (t >= 0) & (t < self.length[:, None]))


def _gathered(x: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """x[b, index[b, t]] where valid[b, t], else 0, in the gradient too: [B, T, d]."""
    index = index.clamp(0, max(x.shape[1] - 1, 0))
    return x.take_along_dim(index[..., None], dim=1).masked_fill(~valid[..., None], 0)
