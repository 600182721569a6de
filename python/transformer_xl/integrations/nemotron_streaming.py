"""Hugging Face's Nemotron streaming encoder: Parakeet's attention in chunks, with a cache.

A query sees its own chunk of `num_lookahead_tokens + 1` frames and the chunks of the left context;
borders of chunks are counted from the first frame of the stream.

The function `encoder` follows the forward of the class in Hugging Face's transformers (Copyright
The HuggingFace Team, Apache License 2.0); it makes ranges of keys instead of a mask Tq x Tk.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from transformer_xl.integrations import hugging_face, subsampling
from transformer_xl.integrations.adapter import Adapter, Forward, always
from transformer_xl.integrations.parakeet import attention, position_table

_MODULE = "transformers.models.nemotron_asr_streaming.modeling_nemotron_asr_streaming"
_EAGER = "transformers 5.24 inverts the mask of this class under attn_implementation 'eager'"


def encoder(
    module: Any,
    input_features: Tensor,  # [B, T, n_mel]
    attention_mask: Tensor | None = None,  # [B, T]
    position_ids: Any = None,
    cache: Any = None,
    output_attention_mask: bool = True,
    use_cache: bool | None = None,
    padding_cache: Any = None,
    num_lookahead_tokens: int | None = None,
    **options: Any,
) -> Any:
    """The body of the encoder's forward; no mask [B, 1, Tq, Tk] is made."""
    library: Any = sys.modules[_MODULE]
    if use_cache:
        cache = library.DynamicCache(config=module.config) if cache is None else cache
        if padding_cache is None:
            padding_cache = library.NemotronAsrStreamingEncoderCausalConvPaddingCache()
    hidden_states = module.subsampling(input_features, attention_mask, padding_cache=padding_cache)
    hidden_states = hidden_states * module.input_scale
    T = hidden_states.shape[1]
    Tk, first_key = (T, 0) if cache is None else cache.get_mask_sizes(T, 0)
    hidden_states = nn.functional.dropout(hidden_states, p=module.dropout, training=module.training)
    positions = position_table(module, hidden_states, cached_frames=Tk - T)

    left, lookahead = module._resolve_attn_context(num_lookahead_tokens)
    size = lookahead + 1
    chunk = (size, left // size if left >= 0 else 10_000, first_key)
    valid = sees_nothing = None
    if attention_mask is not None:
        valid = module._get_output_attention_mask(attention_mask, target_length=T)
        options["key_ranges"] = _ranges(valid, first_key)
        sees_nothing = _sees_nothing(options["key_ranges"], chunk, T, Tk)
    for layer in module.layers:
        if module.training and module.layerdrop > 0.0 and torch.rand([]) < module.layerdrop:
            continue
        hidden_states = layer(
            hidden_states,
            all_masked_rows=sees_nothing,
            position_embeddings=positions,
            cache=cache,
            padding_cache=padding_cache,
            use_cache=use_cache,
            chunk=chunk,
            **options,
        )
    is_returned = valid is not None and output_attention_mask
    return library.NemotronAsrStreamingEncoderModelOutput(
        last_hidden_state=hidden_states,
        attention_mask=valid.int() if is_returned and valid is not None else None,
        cache=cache,
        padding_cache=padding_cache,
    )


def _ranges(valid: Tensor, first_key: int) -> Tensor:
    """[2, B]: the valid keys; the library counts them from the first frame of the stream."""
    ends = valid.sum(1) - first_key
    return torch.stack([torch.zeros_like(ends), ends])


def _sees_nothing(ranges: Tensor, chunk: tuple[int, int, int], T: int, Tk: int) -> Tensor:
    """Bool [B, 1, T]: True for queries whose chunks have no valid key."""
    size, left, phase = chunk
    position = torch.arange(T, device=ranges.device) + (Tk - T) + phase
    first = ((position // size - left) * size - phase).clamp(min=0)  # [T], a key
    return (first >= ranges[1][:, None])[:, None]


def _unserved(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    cache: Any = None,
    **options: Any,
) -> str | None:
    if position_embeddings is None:
        return "no position embeddings are given"
    if (getattr(module.config, "_attn_implementation", None) or "eager") == "eager":
        return _EAGER
    return hugging_face.unserved(module, attention_mask, options)


def _unserved_encoder(module: Any, *args: Any, **options: Any) -> str | None:
    if (getattr(module.config, "_attn_implementation", None) or "eager") == "eager":
        return _EAGER
    attentions = [layer.self_attn for layer in module.layers]
    return hugging_face.unserved_model(attentions, module, *args, **options)


def _build_encoder(original: Forward) -> Forward:
    return hugging_face.with_body(original, encoder)


ADAPTERS = (
    Adapter(
        "nemotron_streaming",
        f"{_MODULE}.NemotronAsrStreamingEncoderAttention",
        hugging_face.VERSIONS,
        always(attention),
        _unserved,
    ),
    Adapter(
        "nemotron_streaming",
        f"{_MODULE}.NemotronAsrStreamingEncoder",
        hugging_face.VERSIONS,
        _build_encoder,
        _unserved_encoder,
    ),
    Adapter(
        "nemotron_streaming",
        f"{_MODULE}.NemotronAsrStreamingEncoderSubsamplingConv2D",
        hugging_face.VERSIONS,
        subsampling.build,
        subsampling.unserved,
        subsampling.refuse,
    ),
)
