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
    """[B, H, Tq, D]; `hidden` comes from `hidden_keys`, made once for all layers of a model."""
    q, r = inputs.q, inputs.r[0]
    keys, values = with_memory(inputs)
    content = torch.einsum("bhid,bhjd->bhij", q + inputs.r_w_bias[:, None], keys)
    position = torch.einsum("bhid,hmd->bhim", q + inputs.r_r_bias[:, None], r)
    scores = (content + rel_shift(position, keys.shape[2])) * q.shape[3] ** -0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), values)


def with_memory(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, Tk, D]: a copy of those of memory and segment."""
    if inputs.mem_k is None or inputs.mem_v is None:
        return inputs.k, inputs.v
    return torch.cat([inputs.mem_k, inputs.k], dim=2), torch.cat([inputs.mem_v, inputs.v], dim=2)


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
