"""Hugging Face's Parakeet encoder, which is also the encoder of Canary, Cohere ASR and Nemotron-H
Omni.

    score_ij = ((q_i + bias_u)·k_j + (q_i + bias_v)·r[j - i + T - 1]) / √d_head

The table has 2T - 1 rows, from distance T - 1 (keys to the left) down to -(T - 1). Its rows are
equal for the whole batch, so they are projected once.

The function `encoder` follows the forward of the class in Hugging Face's transformers (Copyright
The HuggingFace Team, Apache License 2.0); it makes ranges of keys instead of a mask Tq x Tk.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from transformer_xl.integrations import hugging_face, subsampling
from transformer_xl.integrations.adapter import Adapter, Forward, Lookalike, always
from transformer_xl.integrations.position_tables import kept, project
from txl_kernels import rel_attention

_MODULE = "transformers.models.parakeet.modeling_parakeet"


def attention(
    module: Any,
    hidden_states: Tensor,  # [B, T, d_model]
    position_embeddings: Tensor,  # [1 or B, R, d_model]
    attention_mask: Tensor | None = None,
    cache: Any = None,
    key_ranges: Tensor | None = None,
    chunk: tuple[int, int, int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`forward` of the attention of Parakeet and, with a cache, of Nemotron streaming.

    Args:
        attention_mask: bool, broadcastable to [B, 1, Tq, Tk].
        key_ranges: int64 [2, B] or [2, B, T], key_start and key_lens; then attention_mask is not
            read.
        chunk: of `rel_attention`.
    """
    B, T, _ = hidden_states.shape
    heads = (B, T, -1, module.head_dim)
    projections = (module.q_proj, module.k_proj, module.v_proj)
    q, k, v = (proj(hidden_states).view(heads).transpose(1, 2) for proj in projections)
    if cache is not None:
        k, v = cache.update(k, v, module.layer_idx, kwargs=options)
    r = project(module.relative_k_proj, position_embeddings, q.shape[1])  # [1 or B, H, R, d_head]
    mask = attention_mask if key_ranges is None else key_ranges
    out = rel_attention(
        q,
        k,
        v,
        r,
        r_w_bias=module.bias_u,
        r_r_bias=module.bias_v,
        scale=module.scaling,
        chunk=chunk,
        dropout_p=module.attention_dropout if module.training else 0.0,
        **hugging_face.which_keys(mask, 0, {}),
    )
    return module.o_proj(out.transpose(1, 2).reshape(B, T, -1)), None


def encoder(
    module: Any,
    input_features: Tensor,  # [B, T, n_mel]
    attention_mask: Tensor | None = None,  # [B, T]
    output_attention_mask: bool = True,
    **options: Any,
) -> Any:
    """The body of `ParakeetEncoder.forward` with [B, 1, 1, T] instead of [B, 1, T, T] as mask."""
    hidden_states = module.subsampling(input_features, attention_mask) * module.input_scale
    hidden_states = nn.functional.dropout(hidden_states, p=module.dropout, training=module.training)
    positions = position_table(module, hidden_states)
    T = hidden_states.shape[1]
    lengths = valid = None
    if attention_mask is not None:
        lengths = module._get_output_attention_mask(attention_mask, target_length=T)
        options["key_ranges"] = ranges_of_valid(lengths)
        valid = lengths[:, None, None]  # for the convolutions, which set padded frames to 0
    for layer in module.layers:
        if module.training and module.layerdrop > 0.0 and torch.rand([]) < module.layerdrop:
            continue
        hidden_states = layer(
            hidden_states, attention_mask=valid, position_embeddings=positions, **options
        )
    is_returned = lengths is not None and output_attention_mask
    library: Any = sys.modules[_MODULE]
    return library.ParakeetEncoderModelOutput(
        last_hidden_state=hidden_states,
        attention_mask=lengths.int() if is_returned and lengths is not None else None,
    )


def ranges_of_valid(valid: Tensor) -> Tensor:
    """[2, B, T] from bool [B, T]: the valid frames come first and see each other only."""
    ends = valid.sum(1, keepdim=True) * valid
    return torch.stack([torch.zeros_like(ends), ends])


def position_table(module: Any, hidden_states: Tensor, **options: Any) -> Tensor:
    """[1, R, d_model] from the model's own `encode_positions`, or [B, R, d_model] with dropout.

    Dropout gives each row of the batch other zeros.
    """
    p = module.dropout_positions if module.training else 0.0
    if p > 0.0:
        return nn.functional.dropout(module.encode_positions(hidden_states, **options), p=p)
    encode, x = module.encode_positions, hidden_states[:1]
    key = (x.shape[1], x.dtype, x.device, *options.items())
    table: Tensor = kept(encode, key, tuple(encode.buffers()), lambda: encode(x, **options))
    return table


def unserved(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    **options: Any,
) -> str | None:
    if position_embeddings is None:
        return "no position embeddings are given"
    return hugging_face.unserved(module, attention_mask, options)


def _unserved_encoder(module: Any, *args: Any, **options: Any) -> str | None:
    attentions = [layer.self_attn for layer in module.layers]
    return hugging_face.unserved_model(attentions, module, *args, **options)


def example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a small call of an attention, to compare a class with this adapter."""
    T, d_model = 7, module.q_proj.in_features
    tensors = (torch.randn(2, T, d_model), torch.randn(1, 2 * T - 1, d_model).expand(2, -1, -1))
    return tensors, {"attention_mask": torch.ones(2, 1, T, T, dtype=torch.bool)}


def _build_encoder(original: Forward) -> Forward:
    return hugging_face.with_body(original, encoder)


PARAMETERS = frozenset(
    ["bias_u", "bias_v"]
    + [f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "relative_k_proj")]
)

ADAPTERS = (
    Adapter(
        "parakeet",
        f"{_MODULE}.ParakeetEncoderAttention",
        hugging_face.VERSIONS,
        always(attention),
        unserved,
        lookalike=Lookalike(PARAMETERS, example),
    ),
    Adapter(
        "parakeet",
        f"{_MODULE}.ParakeetEncoder",
        hugging_face.VERSIONS,
        _build_encoder,
        _unserved_encoder,
    ),
    Adapter(
        "parakeet",
        f"{_MODULE}.ParakeetEncoderSubsamplingConv2D",
        hugging_face.VERSIONS,
        subsampling.build,
        subsampling.unserved,
        subsampling.refuse,
    ),
)
