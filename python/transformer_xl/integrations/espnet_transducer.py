"""The attention of ESPnet2's streaming transducers, and FunASR's copy of it.

The score is that of espnet.py. The keys start `left_context` frames before the queries; the table
has at least Tk + Tq - 1 rows. With `simplified_attention_score` the position term does not depend
on the query: score_ij = (q_i·k_j + r[j - i + Tq - 1]) / √d_k, where r has one number for each head.
The masks [B, Tk] and [Tq, Tk] are True for keys that a query does not attend to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformer_xl.integrations import espnet
from transformer_xl.integrations.adapter import Adapter, Lookalike, always


def attention(
    module: Any,
    query: Tensor,  # [B, Tq, d_model]
    key: Tensor,  # [B, Tk, d_model]
    value: Tensor,  # [B, Tk, d_model]
    pos_enc: Tensor,  # [1 or B, R, d_model]
    mask: Tensor,  # bool [B, Tk]
    chunk_mask: Tensor | None = None,  # bool [Tq, Tk]
    left_context: int = 0,
) -> Tensor:
    """`forward`."""
    q, k, v = module.forward_qkv(query, key, value)  # each [B, H, T, d_k]
    keys = espnet.which_keys(mask, len(query), marks_padding=True)
    if chunk_mask is not None:
        allowed = ~chunk_mask[None, None]
        keys["mask"] = allowed & keys["mask"] if "mask" in keys else allowed
    out = espnet.attend(module, q, k, v, pos_enc, keys)
    return module.linear_out(out)  # type: ignore[no-any-return]


def _unserved(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_enc: Tensor,
    mask: Tensor,
    chunk_mask: Tensor | None = None,
    left_context: int = 0,
) -> str | None:
    Tq, Tk = query.shape[1], key.shape[1]
    if left_context != Tk - Tq:
        return "left_context is not the number of keys before the queries"
    if pos_enc.shape[1] < Tk + Tq - 1:
        return "the position table has fewer than Tk + Tq - 1 rows"
    if any(x is not None and (x.dim() != 2 or x.dtype != torch.bool) for x in (mask, chunk_mask)):
        return "a mask is no bool tensor of two dimensions"
    return espnet.unserved_hook(module)


def _example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    T, left, d_model = 5, 2, module.linear_q.in_features
    x = torch.randn(2, left + T, d_model)
    mask = torch.arange(left + T) >= torch.tensor([[left + T], [4]])
    chunk_mask = torch.arange(left + T) > torch.arange(T)[:, None] + left + 1
    table = torch.randn(1, 2 * T + left - 1, d_model)
    return (x[:, left:], x, x, table, mask, chunk_mask, left), {}


_LOOKALIKE = Lookalike(espnet.PARAMETERS, _example)

ADAPTERS = (
    Adapter(
        "espnet",
        "espnet2.asr_transducer.encoder.modules.attention.RelPositionMultiHeadedAttention",
        espnet.VERSIONS,
        always(attention),
        _unserved,
        lookalike=_LOOKALIKE,
        distribution="espnet",
    ),
)
FUNASR_ADAPTERS = (
    Adapter(
        "funasr",
        "funasr.models.transformer.attention.RelPositionMultiHeadedAttentionChunk",
        espnet.FUNASR_VERSIONS,
        always(attention),
        _unserved,
        lookalike=_LOOKALIKE,
    ),
)
