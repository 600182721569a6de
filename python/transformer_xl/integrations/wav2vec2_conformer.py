"""Hugging Face's Wav2Vec2-Conformer and the speech encoder of SeamlessM4T (version 1).

The score is that of Parakeet with other names; the table [1, 2T - 1, d_model] is the model's own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from transformer_xl.integrations import hugging_face
from transformer_xl.integrations.adapter import Adapter, Forward, always
from transformer_xl.integrations.hugging_face import (
    bidirectional_ranges,
    which_keys,
    with_helpers,
)
from transformer_xl.integrations.position_tables import project
from txl_kernels import rel_attention


def attention(
    module: Any,
    hidden_states: Tensor,  # [B, T, d_model]
    attention_mask: Tensor | None = None,
    relative_position_embeddings: Any = None,  # [1, 2T - 1, d_model]
    **options: Any,
) -> tuple[Tensor, None]:
    """`forward` with position_embeddings_type "relative"; attention_mask as in hugging_face.py."""
    q, k, v = project_qkv(module, hidden_states)
    r = project(module.linear_pos, relative_position_embeddings, module.num_heads)
    out = rel_attention(
        q,
        k,
        v,
        r,
        r_w_bias=module.pos_bias_u,
        r_r_bias=module.pos_bias_v,
        scale=module.scaling,
        dropout_p=module.dropout.p if module.dropout.training else 0.0,
        **which_keys(attention_mask, 0, {}),
    )
    return module.linear_out(out.transpose(1, 2).flatten(2)), None


def project_qkv(module: Any, hidden_states: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, each [B, H, T, d_head]."""
    heads = (*hidden_states.shape[:2], -1, module.head_size)
    layers = (module.linear_q, module.linear_k, module.linear_v)
    return tuple(layer(hidden_states).view(heads).transpose(1, 2) for layer in layers)


def unserved(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    relative_position_embeddings: Any = None,
    **options: Any,
) -> str | None:
    if relative_position_embeddings is None:
        return "no position embeddings are given"
    return hugging_face.unserved(module, attention_mask, options)


def refuse(module: Any) -> str | None:
    kind = module.position_embeddings_type
    return None if kind == "relative" else f"its position_embeddings_type is {kind!r}"


def refuse_encoder(module: Any) -> str | None:
    return next((why for layer in module.layers if (why := refuse(layer.self_attn))), None)


def unserved_encoder(
    module: Any, hidden_states: Any, attention_mask: Any = None, **options: Any
) -> str | None:
    attentions = [layer.self_attn for layer in module.layers]
    options["attention_mask"] = attention_mask
    return hugging_face.unserved_model(attentions, module, **options)


def build_encoder(original: Forward) -> Forward:
    return with_helpers(original, {"create_bidirectional_mask": bidirectional_ranges})


def _adapters(family: str, prefix: str) -> tuple[Adapter, ...]:
    versions = hugging_face.VERSIONS
    return (
        Adapter(family, f"{prefix}SelfAttention", versions, always(attention), unserved, refuse),
        Adapter(
            family, f"{prefix}Encoder", versions, build_encoder, unserved_encoder, refuse_encoder
        ),
    )


ADAPTERS = _adapters(
    "wav2vec2_conformer",
    "transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer.Wav2Vec2Conformer",
)
SEAMLESS_ADAPTERS = _adapters(
    "seamless_m4t", "transformers.models.seamless_m4t.modeling_seamless_m4t.SeamlessM4TConformer"
)
