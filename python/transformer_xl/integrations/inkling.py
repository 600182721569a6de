"""Hugging Face's Inkling: sliding and global layers, training and generation with a cache.

    score_ij = q_i·k_j / d_head + rel_i · proj[:, p_i - p_j]    the bias is 0 beyond proj's columns

`proj` is [d_rel, R]; in rel_attention it is a table whose row m is distance R - 1 - m, with `rel`
as the position query. In global layers tau_i multiplies q_i and rel_i.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformer_xl.integrations import growing_cache, hugging_face
from transformer_xl.integrations.adapter import Adapter, Forward, always
from transformer_xl.integrations.hugging_face import (
    causal_ranges,
    which_keys,
    with_bool_masks,
    with_helpers,
)
from transformer_xl.integrations.position_tables import kept
from txl_kernels import rel_attention

_MODULE = "transformers.models.inkling.modeling_inkling"


def position_table(owner: Any) -> Tensor:
    """[1, 1, R, d_rel]: row m is distance R - 1 - m.

    Args:
        owner: the module whose parameter `proj` is [d_rel, R].
    """
    proj: Tensor = owner.proj
    return kept(owner, (), (proj,), lambda: proj.T.flip(0)[None, None].contiguous())


def query_start(first: int | Tensor, n_row: int, Tq: int, Tk: int, device: Any) -> Tensor | None:
    """The argument `q_start`, [B], from the index of query 0 among the keys."""
    if isinstance(first, Tensor):
        return first.reshape(1).to(device).expand(n_row)
    return None if first == Tk - Tq else torch.full((n_row,), first, device=device)


def attention(
    module: Any,
    hidden_states: Tensor,  # [B, T, d_model]
    attention_mask: Tensor | None,
    conv_mask: Tensor | None = None,
    cache: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`InklingAttention.forward`; attention_mask as in hugging_face.py."""
    B, T, _ = hidden_states.shape
    heads = (B, T, -1, module.head_dim)
    q = module.q_norm(module.q_proj(hidden_states).view(heads)).transpose(1, 2)
    k = module.k_sconv(module.k_proj(hidden_states), cache=cache, conv_mask=conv_mask)
    v = module.v_sconv(module.v_proj(hidden_states), cache=cache, conv_mask=conv_mask)
    k = module.k_norm(k.view(heads)).transpose(1, 2)  # [B, Hk, T, d_head]
    v = v.view(heads).transpose(1, 2)
    rel = module.r_proj(hidden_states).view(B, T, module.num_heads, -1).transpose(1, 2)

    first_query: int | Tensor = 0
    first_key = distance_error = 0
    counted_from: int | Tensor = 0
    if cache is not None:
        _, first_key = cache.get_mask_sizes(T, module.layer_idx)
        counted_from = cache.get_query_offset(module.layer_idx)
        first_query = counted_from - first_key  # a new tensor, before update changes the counter
        k, v = growing_cache.update(cache, k, v, module.layer_idx, options)
        # A StaticCache returns its counter itself, to which `update` has added T: transformers 5.24
        # counts distances and tau from there, and so must a patched model.
        if isinstance(counted_from, Tensor) and _is_counter(cache, module.layer_idx, counted_from):
            distance_error = T

    if not module.is_sliding and _has_tau(module.config, counted_from, T):
        tau = _tau(module.config, torch.arange(T, device=q.device) + counted_from)
        q, rel = ((x.float() * tau).to(x.dtype) for x in (q, rel))

    Tk, R = k.shape[2], module.rel_extent
    rules: dict[str, Any] = {"causal": True}
    if module.is_sliding:
        rules["window"] = (module.sliding_window - 1, None)
    out = rel_attention(
        q,
        k,
        v,
        position_table(module.rel_logits_proj),
        q_pos=rel,
        scale=module.scaling,
        pos_scale=1.0,
        offset=R - 1 - distance_error - (Tk - T),
        q_start=query_start(first_query, B, T, Tk, q.device),
        dropout_p=module.attention_dropout if module.training else 0.0,
        **which_keys(attention_mask, first_key, rules),
    )
    return module.o_proj(out.transpose(1, 2).reshape(B, T, -1)), None


def _is_counter(cache: Any, layer_idx: int, counted_from: Tensor) -> bool:
    return getattr(cache.layers[layer_idx], "cumulative_length", None) is counted_from


def _has_tau(config: Any, counted_from: int | Tensor, T: int) -> bool:
    """False where tau is 1 for T queries, so that products with it would change nothing.

    A compiled program may run for any length, so it always computes tau.
    """
    n_floor = config.log_scaling_n_floor
    if n_floor is None or isinstance(counted_from, Tensor) or torch.compiler.is_compiling():
        return n_floor is not None
    return bool(counted_from + T > n_floor)


def _tau(config: Any, positions: Tensor) -> Tensor:
    """[T, 1]: the factor of global layers, float32."""
    n = (positions + 1).float() / config.log_scaling_n_floor
    tau: Tensor = 1.0 + config.log_scaling_alpha * n.clamp(min=1.0).log()
    return tau[:, None]


def is_loaded_late(owner: Any) -> str | None:
    """The reason where a parameter exists only during the forward of its module, `owner`."""
    if "forward" in owner.__dict__:
        return f"another library loads the weights of {type(owner).__name__} in its forward"
    return None


def _unserved(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Any,
    conv_mask: Any = None,
    cache: Any = None,
    **options: Any,
) -> str | None:
    late = is_loaded_late(module.rel_logits_proj)
    return late or hugging_face.unserved(module, attention_mask, options)


def _unserved_model(module: Any, *args: Any, **options: Any) -> str | None:
    attentions = [layer.self_attn for layer in module.layers]
    late = next(filter(None, (is_loaded_late(a.rel_logits_proj) for a in attentions)), None)
    return late or hugging_face.unserved_model(attentions, module, *args, **options)


def _build_model(original: Forward) -> Forward:
    names = ("create_causal_mask", "create_sliding_window_causal_mask")
    return with_bool_masks(with_helpers(original, dict.fromkeys(names, causal_ranges)))


ADAPTERS = (
    Adapter(
        "inkling",
        f"{_MODULE}.InklingAttention",
        hugging_face.VERSIONS,
        always(attention),
        _unserved,
    ),
    Adapter(
        "inkling",
        f"{_MODULE}.InklingTextModel",
        hugging_face.VERSIONS,
        _build_model,
        _unserved_model,
    ),
)
