"""FlexAttention whose score function reads position scores that were computed before it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.inputs import AttentionInputs, AttentionShape
from benchmarks.peers.eager import queries, with_memory


def attend(
    attention: Callable[..., Any], shape: AttentionShape, block_mask: Any, inputs: AttentionInputs
) -> Tensor:
    """[B, H, Tq, D]; `attention` is `flex_attention`, compiled or not."""
    keys, values = with_memory(inputs)
    scale, offset, n_rows = shape.D**-0.5, shape.offset, shape.n_rows
    query, position_query, pos_scale = queries(inputs)
    position = position_query @ inputs.r.mT * pos_scale  # [B, H, Tq, R]

    def add_position(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        m = j - i + offset
        row = torch.clamp(m, 0, n_rows - 1)
        return score + torch.where(m == row, position[b, h, i, row], 0.0)

    is_grouped = keys.shape[1] < query.shape[1]
    options = {"score_mod": add_position, "block_mask": block_mask, "enable_gqa": is_grouped}
    out: Tensor = attention(query, keys, values, scale=scale, **options)
    return out


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """`attend` with compiled FlexAttention, without its first argument."""
    torch._dynamo.config.recompile_limit = 100  # each shape is compiled; by default 8 are
    attention = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return functools.partial(attend, attention)


def block_mask(shape: AttentionShape, device: torch.device) -> Any:
    """The mask of a causal shape; None for a shape whose queries attend to all keys."""
    if not shape.causal:
        return None
    left = shape.n_keys if shape.window is None else shape.window

    def sees(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i + shape.Tm) & (j >= i + shape.Tm - left)

    return create_block_mask(sees, None, None, shape.Tq, shape.n_keys, device=str(device))
