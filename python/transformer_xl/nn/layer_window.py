"""One layer's part of a `KeyValueWindow`: the buffer of its keys and values, and the places of a
segment in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transformer_xl.nn.position import RelativePositions
from transformer_xl.nn.streaming import Options, Projected


class Placement(NamedTuple):
    """Where a segment of T tokens is in the buffers; equal for all layers.

    `rows`: int64 [B · 2 · n_kv_head · T], the rows of its keys and values among all rows of a
    buffer. `options`: its first position and its keys. `positions`: the row of `r` of each query
    and key.
    """

    rows: Tensor
    options: Options
    positions: RelativePositions


class LayerWindow(NamedTuple):
    """Argument `layer_memory` of `RelativeMultiHeadAttention` and `DecoderLayer`, without gradient.

    `kv` [B, 2 · n_kv_head, capacity, d_head]: the keys of each head, then the values; `extended`
    writes those of the segment into it. `r` [1, n_head, R, d_head]: the projected positions, in the
    dtype of `kv`.
    """

    kv: Tensor
    r: Tensor
    placement: Placement

    def extended(self, projected: Projected) -> Projected:
        """The segment's queries, and the keys and values of the buffer with the segment's."""
        q, k, v, *_ = projected
        new = torch.cat([k, v], dim=1).to(self.kv.dtype)  # [B, 2 · n_kv_head, T, d_head]
        d_head = self.kv.shape[3]
        self.kv.view(-1, d_head).index_copy_(0, self.placement.rows, new.view(-1, d_head))
        n_kv_head = k.shape[1]
        keys, values = self.kv[:, :n_kv_head], self.kv[:, n_kv_head:]
        return Projected(q.to(self.kv.dtype), keys, values, r=self.r)
