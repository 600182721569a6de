"""fairseq's copy of ESPnet's attention, for its wav2vec 2.0 and S2T Conformers.

The score is that of espnet.py. Tensors are [T, B, d_model], the table [2T - 1, 1 or B, d_model].
The mask [B, Tk] is nonzero for padding. fairseq gives NaN to rows that see no key.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from transformer_xl.integrations import espnet
from transformer_xl.integrations.adapter import Adapter, Lookalike, always


def attention(
    module: Any,
    query: Tensor,  # [Tq, B, d_model]
    key: Tensor,  # [Tk, B, d_model]
    value: Tensor,  # [Tk, B, d_model]
    pos_emb: Tensor,  # [2Tk - 1, 1 or B, d_model]
    key_padding_mask: Tensor | None = None,  # [B, Tk], nonzero = padding
    **options: Any,
) -> tuple[Tensor, None]:
    """`forward`; it reads no other options."""
    query, key, value, pos_emb = (x.transpose(0, 1) for x in (query, key, value, pos_emb))
    q, k, v = module.forward_qkv(query, key, value)  # each [B, H, T, d_k]
    keys = espnet.which_keys(key_padding_mask, len(query), marks_padding=True)
    out = espnet.attend(module, q, k, v, pos_emb, keys)
    return module.linear_out(out).transpose(0, 1), None


def _unserved(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_emb: Tensor,
    key_padding_mask: Any = None,
    **options: Any,
) -> str | None:
    if key_padding_mask is not None and key_padding_mask.dim() != 2:
        return "the mask has not two dimensions"
    why = espnet.unserved_table(len(query), len(key), len(pos_emb))
    return why or espnet.unserved_hook(module)


def _example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs, _ = espnet.example(module)
    *tensors, keep = inputs
    return (*(x.transpose(0, 1) for x in tensors), ~keep[:, 0]), {}


ADAPTERS = (
    Adapter(
        "fairseq",
        "fairseq.modules.espnet_multihead_attention.RelPositionMultiHeadedAttention",
        ((0, 12), (0, 12)),
        always(attention),
        _unserved,
        lookalike=Lookalike(espnet.PARAMETERS, _example),
    ),
)
