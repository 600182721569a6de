"""PyTorch's `scaled_dot_product_attention`: with the position scores as a float mask, and bare."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.inputs import AttentionInputs
from benchmarks.peers.eager import rel_shift, with_memory


def with_position_bias(inputs: AttentionInputs, hidden: Tensor | None) -> Tensor:
    """The same attention, its position scores [B, H, Tq, Tk] materialised as the mask.

    `hidden` as `eager.rel_attention` takes it.
    """
    q = inputs.q
    keys, values = with_memory(inputs)
    position = (q + inputs.r_r_bias[:, None]) @ inputs.r.mT  # [B, H, Tq, R]
    bias = rel_shift(position, keys.shape[2]) * q.shape[3] ** -0.5
    if hidden is not None:
        bias = bias.masked_fill(hidden, -torch.inf)
    return scaled_dot_product_attention(q + inputs.r_w_bias[:, None], keys, values, attn_mask=bias)


def plain(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """No positions, no mask, no memory to join: the yardstick, which computes something else."""
    return scaled_dot_product_attention(q, keys, values)
