"""The attention as the original code computes it, step by step in eager PyTorch.

Concatenate the memory, two einsums for the scores, the shift by padding and viewing, scale, mask,
softmax, one einsum for the output. In the layout [B, H, T, D], which is faster than the original's
[T, B, H, D]: the softmax runs over the last dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.inputs import AttentionInputs


def rel_attention(inputs: AttentionInputs, hidden: Tensor | None) -> Tensor:
    """[B, H, Tq, D]; `hidden` is the result of `hidden_keys`, once for all layers of a model."""
    r = inputs.r[0]
    keys, values = with_memory(inputs)
    query, position_query, pos_scale = queries(inputs)
    keys, values = (per_query_head(x, query.shape[1]) for x in (keys, values))
    scale = query.shape[3] ** -0.5
    content = torch.einsum("bhid,bhjd->bhij", query, keys)
    position = torch.einsum("bhid,hmd->bhim", position_query, r)
    position = rel_shift(position, keys.shape[2])
    if pos_scale == scale:
        scores = (content + position) * scale
    else:
        scores = content * scale + position * pos_scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), values)


def queries(inputs: AttentionInputs) -> tuple[Tensor, Tensor, float]:
    """The queries of content and position with their head biases, and the factor of position."""
    q = inputs.q
    if inputs.q_pos is not None:
        return q, inputs.q_pos, 1.0
    assert inputs.r_w_bias is not None
    assert inputs.r_r_bias is not None
    return q + inputs.r_w_bias[:, None], q + inputs.r_r_bias[:, None], q.shape[3] ** -0.5


def with_memory(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hk, Tk, D]: a copy of those of memory and segment."""
    if inputs.mem_k is None or inputs.mem_v is None:
        return inputs.k, inputs.v
    return torch.cat([inputs.mem_k, inputs.k], dim=2), torch.cat([inputs.mem_v, inputs.v], dim=2)


def per_query_head(x: Tensor, n_head: int) -> Tensor:
    """[B, H, T, D] from [B, Hk, T, D]: query head h has key head h // (H // Hk)."""
    n_queries = n_head // x.shape[1]
    return x if n_queries == 1 else x.repeat_interleave(n_queries, dim=1)


def rel_shift(x: Tensor, Tk: int) -> Tensor:
    """out[i, j] = x[i, j - i + Tq - 1] for [..., Tq, R] and j < Tk, by a pad and two views.

    If there are fewer rows R than keys, the last one is distance 0 and the missing ones are 0.
    """
    x = F.pad(x, (max(Tk - x.shape[-1], 0), 0))
    Tq, R = x.shape[-2:]
    padded = F.pad(x, (1, 0)).view(*x.shape[:-2], R + 1, Tq)
    return padded[..., 1:, :].reshape(x.shape)[..., :Tk]


def hidden_keys(
    Tq: int,
    Tk: int,
    key_lens: Tensor | None,
    causal: bool,
    device: torch.device | str = "cpu",
    window: int | None = None,
) -> Tensor | None:
    """bool, True where a query must not attend to a key; broadcastable to [B, H, Tq, Tk].

    `window`: as in `AttentionShape`, for causal shapes.
    """
    hidden = None
    if causal:
        hidden = torch.ones(Tq, Tk, dtype=torch.bool, device=device).triu(1 + Tk - Tq)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(Tk - Tq - window - 1)
    if key_lens is not None:
        padding = torch.arange(Tk, device=device) >= key_lens[:, None, None, None]
        hidden = padding if hidden is None else hidden | padding
    return hidden
