"""Hugging Face's Inkling 2, also with layers that run several times (Inkling-2-Mini).

As Inkling, with one more logit per query and head in the softmax, whose value is 0 (a sink), and
with scale 1/√d_head. The projections compute the clipping and tau themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from transformer_xl.integrations import growing_cache, hugging_face
from transformer_xl.integrations.adapter import Adapter, Forward, always
from transformer_xl.integrations.hugging_face import (
    causal_ranges,
    which_keys,
    with_bool_masks,
    with_helpers,
)
from transformer_xl.integrations.inkling import is_loaded_late, position_table, query_start
from txl_kernels import rel_attention_with_lse, with_sink


def attention(
    module: Any,
    hidden_states: Tensor,  # [B, T, d_model]
    key_hidden_states: Tensor | None,
    value_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    relative_distance: int | Tensor,
    conv_mask: Tensor | None = None,
    cache: Any = None,
    cache_offset: int = 0,
    **options: Any,
) -> tuple[Tensor, None]:
    """`forward` of both attention classes; attention_mask as in hugging_face.py.

    Args:
        relative_distance: the index of query 0 among the keys, or the library's own distances
            [Tq, Tk], whose first element is that index.
    """
    B, T, _ = hidden_states.shape
    position_ids = options["position_ids"]
    kv_options = {"cache": cache, "conv_mask": conv_mask, "cache_offset": cache_offset, **options}
    for_keys = hidden_states if key_hidden_states is None else key_hidden_states
    for_values = hidden_states if value_hidden_states is None else value_hidden_states
    q = module.q_proj(hidden_states, position_ids)  # [B, H, T, d_head]
    k = module.k_proj(for_keys, **kv_options)
    v = module.v_proj(for_values, **kv_options)
    bias = module.relative_position_bias
    rel = bias.linear(hidden_states).view(B, T, module.num_heads, -1)
    rel = bias.norm(rel, position_ids).transpose(1, 2)

    first_key, layer_idx = 0, module.layer_idx + cache_offset
    if cache is not None:
        _, first_key = cache.get_mask_sizes(T, layer_idx)
        k, v = growing_cache.update(cache, k, v, layer_idx, options)
    first_query = relative_distance
    if isinstance(first_query, Tensor) and first_query.dim() == 2:
        first_query = first_query[0, 0]

    Tk, R = k.shape[2], module.rel_extent
    rules: dict[str, Any] = {"causal": True}
    if module.is_sliding:
        rules["window"] = (module.sliding_window - 1, None)
    out, lse = rel_attention_with_lse(
        q,
        k,
        v,
        position_table(bias),
        q_pos=rel,
        scale=module.scaling,
        pos_scale=1.0,
        offset=R - 1 - (Tk - T),
        q_start=query_start(first_query, B, T, Tk, q.device),
        dropout_p=module.attention_dropout if module.training else 0.0,
        **which_keys(attention_mask, first_key, rules),
    )
    sink = module.sink_proj(hidden_states).transpose(1, 2)  # [B, H, T]
    out, _ = with_sink(out, lse, sink)
    return module.o_proj(out.transpose(1, 2).reshape(B, T, -1), hidden_states), None


def sliding_attention(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    relative_distance: int | Tensor,
    conv_mask: Tensor | None = None,
    cache: Any = None,
    key_hidden_states: Tensor | None = None,
    value_hidden_states: Tensor | None = None,
    cache_offset: int = 0,
    **options: Any,
) -> tuple[Tensor, None]:
    """`attention` with the argument order of the sliding class."""
    return attention(
        module,
        hidden_states,
        key_hidden_states,
        value_hidden_states,
        attention_mask,
        relative_distance,
        conv_mask,
        cache,
        cache_offset,
        **options,
    )


def first_query_among_keys(distances: Callable[..., Tensor]) -> Callable[..., int | Tensor]:
    """Replaces `get_relative_distance`: returns the first distance instead of all Tq · Tk."""

    def first(inputs_embeds: Tensor, cache: Any, is_sliding: bool) -> int | Tensor:
        if cache is None:
            return 0
        is_kind = [
            sliding if is_sliding else not (sliding or linear or dummy)
            for sliding, linear, dummy in zip(
                cache.is_sliding, cache.is_linear, cache.is_dummy, strict=True
            )
        ]
        layer_idx = is_kind.index(True) if True in is_kind else 0
        _, first_key = cache.get_mask_sizes(inputs_embeds.shape[1], layer_idx)
        position: int | Tensor = cache.get_query_offset(layer_idx) - first_key
        return position

    return first


def _unserved(module: Any, *args: Any, **options: Any) -> str | None:
    late = is_loaded_late(module.relative_position_bias)
    if late is not None:
        return late
    if args[1:]:  # the layers give all arguments but the hidden states by name
        return "masks are given by position"
    return hugging_face.unserved(module, options.get("attention_mask"), options)


def _unserved_model(module: Any, *args: Any, **options: Any) -> str | None:
    attentions = [layer.self_attn for layer in module.layers]
    biases = [attention.relative_position_bias for attention in attentions]
    late = next(filter(None, map(is_loaded_late, biases)), None)
    return late or hugging_face.unserved_model(attentions, module, *args, **options)


def _build_model(original: Forward) -> Forward:
    names = ("create_causal_mask", "create_sliding_window_causal_mask")
    masks = dict.fromkeys(names, causal_ranges)
    helpers = {**masks, "get_relative_distance": first_query_among_keys}
    return with_bool_masks(with_helpers(original, helpers))


def _adapters(prefix: str) -> tuple[Adapter, ...]:
    versions = hugging_face.VERSIONS
    return (
        Adapter(
            "inkling2", f"{prefix}SlidingAttention", versions, always(sliding_attention), _unserved
        ),
        Adapter("inkling2", f"{prefix}FullAttention", versions, always(attention), _unserved),
        Adapter("inkling2", f"{prefix}TextModel", versions, _build_model, _unserved_model),
    )


ADAPTERS = (
    *_adapters("transformers.models.inkling2.modeling_inkling2.Inkling2"),
    *_adapters("transformers.models.inkling2_loop.modeling_inkling2_loop.Inkling2Loop"),
)
