"""PyTorch's `scaled_dot_product_attention`, with the position scores as a float mask or without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import PeerUnavailableError
from benchmarks.inputs import AttentionInputs
from benchmarks.peers.eager import queries, rel_shift, with_memory


def with_position_bias(inputs: AttentionInputs, hidden: Tensor | None) -> Tensor:
    """The same attention, its position scores [B, H, Tq, Tk] materialised as the mask.

    `hidden`: the argument of `eager.rel_attention`.
    """
    keys, values = with_memory(inputs)
    query, position_query, pos_scale = queries(inputs)
    position = position_query @ inputs.r.mT  # [B, H, Tq, R]
    bias = rel_shift(position, keys.shape[2])
    if pos_scale != 1:
        bias = bias * pos_scale
    if hidden is not None:
        bias = bias.masked_fill(hidden, -torch.inf)
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=bias, enable_gqa=keys.shape[1] < query.shape[1]
    )


def plain(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """No positions, no mask, no memory to join: a yardstick, which computes a different result."""
    return scaled_dot_product_attention(q, keys, values)


def causal(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """No positions, causal, as many queries as keys; fewer key heads are not repeated."""
    return scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)


def flash(q: Tensor, keys: Tensor, values: Tensor, *, causal: bool) -> Tensor:
    """torch's flash attention, without positions; the last query attends to all keys."""
    is_grouped = keys.shape[1] < q.shape[1]
    if not can_use_flash_attention(SDPAParams(q, keys, values, None, 0.0, False, is_grouped)):
        raise PeerUnavailableError("torch's flash attention does not support this call")
    # `is_causal` lets the first query attend to the first key alone, also if there are more keys.
    mask: Any = causal_lower_right(q.shape[2], keys.shape[2]) if causal else None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=is_grouped)


def cudnn(q: Tensor, keys: Tensor, values: Tensor, *, causal: bool) -> Tensor:
    """cuDNN's attention, without positions; causal if there are as many queries as keys."""
    is_causal = causal and q.shape[2] == keys.shape[2]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(
            q, keys, values, is_causal=is_causal, enable_gqa=keys.shape[1] < q.shape[1]
        )
