"""Hugging Face's Wav2Vec2-BERT and the speech encoder of SeamlessM4T v2.

    score_ij = q_i·(k_j + e[clamp(j - i, -left, right) + left]) / √d_head

One table `e` of left + right + 1 rows serves all heads. The library gathers it to [T, T, d_head].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformer_xl.integrations import hugging_face, wav2vec2_conformer
from transformer_xl.integrations.adapter import Adapter, always
from transformer_xl.integrations.hugging_face import which_keys
from transformer_xl.integrations.wav2vec2_conformer import project_qkv
from txl_kernels import rel_attention


def attention(
    module: Any,
    hidden_states: Tensor,  # [B, T, d_model]
    attention_mask: Tensor | None = None,
    relative_position_embeddings: None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`forward` with position_embeddings_type "relative_key"; attention_mask as in
    hugging_face.py."""
    q, k, v = project_qkv(module, hidden_states)
    left, right = module.left_max_position_embeddings, module.right_max_position_embeddings
    rows = module.distance_embedding(torch.arange(left + right + 1, device=q.device))
    out = rel_attention(
        q,
        k,
        v,
        rows.to(q.dtype)[None, None],  # [1, 1, left + right + 1, d_head]
        scale=module.scaling,
        offset=left,
        clamp=True,
        dropout_p=module.dropout.p if module.dropout.training else 0.0,
        **which_keys(attention_mask, 0, {}),
    )
    return module.linear_out(out.transpose(1, 2).flatten(2)), None


def _unserved(
    module: Any, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **options: Any
) -> str | None:
    return hugging_face.unserved(module, attention_mask, options)


def _refuse(module: Any) -> str | None:
    kind = module.position_embeddings_type
    return None if kind == "relative_key" else f"its position_embeddings_type is {kind!r}"


def _refuse_encoder(module: Any) -> str | None:
    return next((why for layer in module.layers if (why := _refuse(layer.self_attn))), None)


def _adapters(family: str, prefix: str) -> tuple[Adapter, ...]:
    versions = hugging_face.VERSIONS
    build, unserved = wav2vec2_conformer.build_encoder, wav2vec2_conformer.unserved_encoder
    return (
        Adapter(family, f"{prefix}SelfAttention", versions, always(attention), _unserved, _refuse),
        Adapter(family, f"{prefix}Encoder", versions, build, unserved, _refuse_encoder),
    )


ADAPTERS = _adapters(
    "wav2vec2_bert", "transformers.models.wav2vec2_bert.modeling_wav2vec2_bert.Wav2Vec2Bert"
)
SEAMLESS_ADAPTERS = _adapters(
    "seamless_m4t_v2",
    "transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2.SeamlessM4Tv2Conformer",
)
