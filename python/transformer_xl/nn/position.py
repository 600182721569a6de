"""The sinusoid R of the paper, by distance: which rows a block of queries needs, and how query and
key find theirs. No parameters, no state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from txl_kernels.ops.checks import check_int

Window = tuple[int | None, int | None]


class RelativePositions(NamedTuple):
    """Where keys stand to a block of queries; the same for all layers, so computed once.

    `embedding` [R, d_model]: row m stands for distance left - m (query position minus key position,
    in tokens). `offset` and `clamp` find the row of a query and a key, `causal` and `window` say
    which keys a query sees; all four as `txl_kernels.rel_attention` takes them.
    """

    embedding: Tensor
    offset: int
    clamp: bool
    causal: bool
    window: Window | None


class SinusoidalPositions(nn.Module):
    """R = [sin | cos] of distance / 10000^(2k / d_model), for exactly the distances that occur.

    Args:
        d_model: width of a row, even.
        causal: no distances below 0, no key after the query.
        window: (left, right), the farthest distances seen in tokens; a side None is open.
        clamp_len: distances beyond it share one row; 0 or less: no clamp.

    `causal`, `window` and `clamp_len` are plain attributes and may change between calls.

    Precision: positions and sinusoid in float32 (float64 for float64), whatever the parameters are:
    float16 would tell only some 2,500 of 3,000 distances apart.
    Source: Dai et al. 2019, section 3.3; `clamp_len` is the released code's.
    """

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = True,
        window: Window | None = None,
        clamp_len: int = -1,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        d_model = check_int(op, "d_model", d_model)
        if d_model <= 0 or d_model % 2:
            raise ValueError(f"d_model: expected a positive even number, got {d_model}")
        self.d_model = d_model
        self.causal = causal
        self.window = window
        self.clamp_len = check_int(op, "clamp_len", clamp_len)

    def forward(
        self, n_queries: int, n_keys: int, *, dtype: torch.dtype, device: torch.device
    ) -> RelativePositions:
        """Positions of the last `n_queries` of `n_keys` tokens, the embedding in `dtype`.

        Lengths may be symbolic: nothing here branches on one.
        """
        left_window, right_window = self.window or (None, None)
        left = self._nearest(n_keys - 1, left_window)
        right = 0 if self.causal else self._nearest(n_queries - 1, right_window)

        precise = torch.promote_types(dtype, torch.float32)
        distance = torch.arange(left, -right - 1, -1, dtype=precise, device=device)  # [R]
        exponent = torch.arange(0, self.d_model, 2, dtype=precise, device=device) / self.d_model
        angle = distance[:, None] / 10000**exponent  # [R, d_model / 2]
        return RelativePositions(
            embedding=torch.cat([angle.sin(), angle.cos()], dim=-1).to(dtype),
            offset=left - (n_keys - n_queries),
            clamp=self.clamp_len > 0,
            causal=self.causal,
            window=self.window,
        )

    def _nearest(self, farthest: int, window: int | None) -> int:
        """The farthest distance that needs a row of its own."""
        clamp_len = self.clamp_len if self.clamp_len > 0 else None
        for limit in (window, clamp_len):
            if limit is None:
                continue
            # As in `Memory.update`: torch 2.11's compiler takes no sym_min of known lengths.
            if isinstance(farthest, int):
                farthest = min(farthest, limit)
            else:
                farthest = torch.sym_min(farthest, limit)
        return farthest
