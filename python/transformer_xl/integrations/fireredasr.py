"""The attention of FireRedASR's Conformer encoder, which contains LayerNorms and the residual.

The score and the mask are those of espnet.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from transformer_xl.integrations import espnet
from transformer_xl.integrations.adapter import Adapter, Lookalike, always


def attention(
    module: Any,
    q: Tensor,  # [B, Tq, d_model]
    k: Tensor,  # [B, Tk, d_model]
    v: Tensor,  # [B, Tk, d_model]
    pos_emb: Tensor,  # [1 or B, 2Tk - 1, d_model]
    mask: Tensor | None = None,  # [1 or B, 1 or Tq, Tk], nonzero = attend
) -> tuple[Tensor, None]:
    """`forward`, with None instead of the probabilities."""
    residual = q
    q, k, v = module.forward_qkv(q, k, v)  # each [B, H, T, d_k]
    keys = espnet.which_keys(mask, len(q))
    out = espnet.attend(module, q, k, v, pos_emb, keys, dropout=module.attention.dropout)
    out = out.view(*out.shape[:2], module.n_head, -1).transpose(1, 2)
    return module.forward_output(out, residual, *residual.shape[:2]), None


def _unserved(
    module: Any, q: Tensor, k: Tensor, v: Tensor, pos_emb: Tensor, mask: Any = None
) -> str | None:
    why = espnet.unserved_table(q.shape[1], k.shape[1], pos_emb.shape[1])
    return why or espnet.unserved_mask(mask)


PARAMETERS = frozenset(
    ["pos_bias_u", "pos_bias_v"]
    + [f"layer_norm_{name}.weight" for name in "qkv"]
    + [f"{name}.weight" for name in ("w_qs", "w_ks", "w_vs", "fc", "linear_pos")]
)

ADAPTERS = (
    Adapter(
        "fireredasr",
        "fireredasr.models.module.conformer_encoder.RelPosMultiHeadAttention",
        ((0, 0), (0, 0)),
        always(attention),
        _unserved,
        lookalike=Lookalike(PARAMETERS, espnet.example),
    ),
)
