"""The sinusoid R of the paper, by distance: the rows that a block of queries needs, and the row of
each query and key. No parameters, no state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from transformer_xl.memory import bounded
from txl_kernels.ops.checks import check_int, checked_window

Window = tuple[int | None, int | None]


class RelativePositions(NamedTuple):
    """Positions of keys relative to a block of queries; equal for all layers, so computed once.

    `embedding` [R, d_model]: row m belongs to distance left - m (query position minus key position,
    in tokens). `offset` and `clamp` select the row of a query and a key, `causal` and `window`
    restrict the keys of a query; all four are arguments of `txl_kernels.rel_attention`.
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
        window: (left, right), the largest distances in tokens; None in place of a number is no
            limit.
        clamp_len: distances beyond it share one row; 0 or less: no clamp.

    `causal`, `window` and `clamp_len` are plain attributes and may change between calls.

    Precision: positions and sinusoid in float32 (float64 for float64) for every dtype of the
    parameters: in float16 only some 2,500 of 3,000 distances would differ from each other.
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
        self.window = None if window is None else checked_window(op, window)
        self.clamp_len = check_int(op, "clamp_len", clamp_len)

    def forward(
        self,
        n_queries: int,
        n_keys: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        anywhere: bool = False,
    ) -> RelativePositions:
        """Positions of the last `n_queries` of `n_keys` tokens, the embedding in `dtype`.

        Lengths may be 0 or symbolic; no branch depends on a symbolic one.

        Args:
            anywhere: the queries may be any of the tokens (`q_start`), so that keys may be up to
                n_keys - 1 tokens to their right.
        """
        left_window, right_window = self.window or (None, None)
        left = self._farthest(n_keys - 1, left_window)
        rightmost = n_keys - 1 if anywhere else n_queries - 1
        right = 0 if self.causal else self._farthest(rightmost, right_window)

        precise = torch.promote_types(dtype, torch.float32)
        distance = torch.arange(left, -right - 1, -1, dtype=precise, device=device)  # [R]
        exponent = torch.arange(0, self.d_model, 2, dtype=precise, device=device) / self.d_model
        angle = distance[:, None] / 10000**exponent  # [R, d_model / 2]
        return RelativePositions(
            embedding=torch.cat([angle.sin(), angle.cos()], dim=-1).to(dtype),
            offset=left - (n_keys - n_queries),
            clamp=bool(self.clamp_len > 0),  # of a NumPy integer too
            causal=self.causal,
            window=self.window,
        )

    def _farthest(self, distance: int, window: int | None) -> int:
        """The largest distance with a row of its own: `distance`, limited by window and clamp;
        distance 0 always has one, so that empty input has a table too."""
        clamp_len = self.clamp_len if self.clamp_len > 0 else None
        for limit in (window, clamp_len):
            distance = bounded(distance, at_most=limit)
        return bounded(distance, at_least=0)
