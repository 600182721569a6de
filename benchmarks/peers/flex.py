"""FlexAttention whose score function reads position scores that were computed before it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.inputs import AttentionInputs, AttentionShape
from benchmarks.peers.eager import with_memory


def attend(
    attention: Callable[..., Any], shape: AttentionShape, block_mask: Any, inputs: AttentionInputs
) -> Tensor:
    """[B, H, Tq, D]; `attention` is `flex_attention`, compiled or not."""
    keys, values = with_memory(inputs)
    scale, offset, n_rows = shape.D**-0.5, shape.offset, shape.n_rows
    position = (inputs.q + inputs.r_r_bias[:, None]) @ inputs.r.mT * scale  # [B, H, Tq, R]

    def add_position(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        m = j - i + offset
        row = torch.clamp(m, 0, n_rows - 1)
        return score + torch.where(m == row, position[b, h, i, row], 0.0)

    queries = inputs.q + inputs.r_w_bias[:, None]
    out: Tensor = attention(
        queries, keys, values, score_mod=add_position, block_mask=block_mask, scale=scale
    )
    return out


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """`attend` with compiled FlexAttention, without its first argument."""
    return functools.partial(attend, torch.compile(flex_attention, dynamic=False))


def block_mask(shape: AttentionShape, device: torch.device) -> Any:
    """The mask of a causal shape; None for one that attends to all keys."""
    if not shape.causal:
        return None
    left = shape.n_keys if shape.window is None else shape.window

    def sees(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i + shape.Tm) & (j >= i + shape.Tm - left)

    return create_block_mask(sees, None, None, shape.Tq, shape.n_keys, device=str(device))
