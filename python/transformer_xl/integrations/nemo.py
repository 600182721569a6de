"""NVIDIA NeMo's Conformer encoders (FastConformer, Parakeet, Canary, …), whose attention is
Transformer-XL's or, in the local attention, has a table of left + right + 1 distances.

    score_ij = ((q_i + pos_bias_u)·k_j + (q_i + pos_bias_v)·r[j - i + Tq - 1]) / √d_k

A mask is bool, as the library makes it, or the ranges of frames of a patched encoder
(nemo_masks.py).
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from transformer_xl.integrations import nemo_masks
from transformer_xl.integrations.adapter import Adapter, Forward, always, nothing_to_refuse
from transformer_xl.integrations.nemo_masks import ASR, ATTENTIONS
from transformer_xl.integrations.position_tables import project
from txl_kernels import rel_attention

_ADAPTER = f"{ASR}.parts.submodules.adapters.multi_head_attention_adapter_module"
_VERSIONS = ((3, 0), (3, 0))


def attention(
    module: Any,
    query: Tensor,  # [B, Tq, d_model]
    key: Tensor,  # [B, Tq, d_model]
    value: Tensor,
    mask: Tensor | None,
    pos_emb: Tensor,  # [1 or B, R, d_model]
    cache: Tensor | None = None,  # [B, C, d_model], the hidden states before `key`
) -> Any:
    """`forward` of the attention over all frames.

    Args:
        mask: bool [1 or B, Tq, Tk], True = masked out, or int64 [B, Tq, 2], the first key and the
            end of the keys of each query.

    Returns:
        [B, Tq, d_model], and with a cache also the next cache.
    """
    key, value, query, cache = module.update_cache(key=key, value=value, query=query, cache=cache)
    with _autocast():
        q, k, v = module.forward_qkv(*_upcast(query, key, value))
        out = _attend(module, q, k, v, pos_emb, **_which_keys(mask, k.shape[2], pos_emb.shape[1]))
    return out if cache is None else (out, cache)


def local_attention(
    module: Any,
    query: Tensor,  # [B, T, d_model]
    key: Tensor,
    value: Tensor,
    pad_mask: Tensor,  # bool [B, T], True = padding
    pos_emb: Tensor,  # [1 or B, left + right + 1, d_model]
    cache: None = None,
) -> Tensor:
    """`forward` of the local attention."""
    left, right = module.att_context_size
    T = query.shape[1]
    with _autocast():
        q, k, v = module.forward_qkv(*_upcast(query, key, value))
        return _attend(
            module,
            q,
            k,
            v,
            pos_emb,
            context=(left, right),
            window=(left, right),
            offset=left,
            mask=~pad_mask[:, None, None],
            key_lens=torch.where(pad_mask, 0, T),  # padded queries see nothing
        )


def _attend(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_emb: Tensor,
    context: tuple[int, int] | None = None,
    **options: Any,
) -> Tensor:
    # Only torch's sdpa, which some modules call, ignores the mode of the dropout layer.
    in_training = module.training if module.use_pytorch_sdpa else module.dropout.training
    r = project(module.linear_pos, pos_emb, module.h)
    if context is not None:
        r = local_table(r, *context)
    out = rel_attention(
        q,
        k,
        v,
        r,
        r_w_bias=module.pos_bias_u,
        r_r_bias=module.pos_bias_v,
        scale=1.0 / module.s_d_k,
        dropout_p=module.dropout.p if in_training else 0.0,
        **options,
    )
    projected: Tensor = module.linear_out(out.transpose(1, 2).flatten(2))
    return projected


def local_table(r: Tensor, left: int, right: int) -> Tensor:
    """The rows that the local attention reads at the distances left, …, -right.

    Distance d reads one row of `r` [1 or B, H, left + right + 1, d_k]; "none" means that no
    position score is added. With gap = |left - right|:

        left = right    left - d
        left > right    left - d if d > 0;     none if 0 >= d > -gap;   left - gap - d if d <= -gap
        left < right    right - d if d > gap;  none if gap >= d > 0;    left - d if d <= 0
    """
    gap = abs(left - right)
    if gap == 0:
        return r
    if left > right:
        kept = r[:, :, : left + max(0, right + 1 - gap)]
        n_zero, at = min(gap, right + 1), left
    else:
        kept = r[:, :, min(gap, left) :]
        n_zero, at = min(gap, left), max(0, left - gap)
    zeros = r.new_zeros(()).expand(*r.shape[:2], n_zero, r.shape[3])
    return torch.cat([kept[:, :, :at], zeros, kept[:, :, at:]], dim=2)


def _which_keys(mask: Tensor | None, Tk: int, n_row: int) -> dict[str, Any]:
    """The arguments of `rel_attention` that determine which keys a query attends to."""
    if mask is None:
        return {}
    if mask.dtype == torch.bool:
        return {"mask": ~mask[:, None]}
    if n_row != 2 * Tk - 1:
        raise ValueError(
            f"nemo: expected {(n_row + 1) // 2} frames in the cache and the block together, as in "
            f"the encoder's streaming_cfg, got {Tk}."
        )
    return {"key_start": mask[..., 0], "key_lens": mask[..., 1]}


def _autocast() -> AbstractContextManager[Any]:
    """The library's own context: no float16 under autocast, but bfloat16 or float32."""
    context: AbstractContextManager[Any] = sys.modules[ATTENTIONS].avoid_float16_autocast_context()
    return context


def _upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in tensors) if torch.is_autocast_enabled() else tensors


def _unserved(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    pos_emb: Tensor,
    cache: Tensor | None = None,
) -> str | None:
    Tk = key.shape[1] + (0 if cache is None else cache.shape[1])
    is_library_mask = mask is None or mask.dtype == torch.bool
    if is_library_mask and pos_emb.shape[1] < query.shape[1] + Tk - 1:
        return "the position table has fewer rows than there are distances"
    return None


def _unserved_local(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad_mask: Tensor,
    pos_emb: Tensor,
    cache: Tensor | None = None,
) -> str | None:
    if cache is not None:
        return "a cache is given to the local attention"
    if pos_emb.shape[1] != sum(module.att_context_size) + 1:
        return "the position table is not that of the local context"
    return None


def _refuse_local(module: Any) -> str | None:
    return "it has global tokens" if module.global_tokens > 0 else None


def _build_adapter(original: Forward) -> Forward:
    """The forward of NeMo's attention adapters, which normalise their input."""

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> Any:
        normed = (module.pre_norm(x) for x in (query, key, value))
        return attention(module, *normed, *args, **options)

    return forward


def _adapter(
    path: str,
    build: Any,
    unserved: Any,
    refuse: Any = nothing_to_refuse,
    method: str = "forward",
) -> Adapter:
    return Adapter(
        "nemo", path, _VERSIONS, build, unserved, refuse, distribution="nemo_toolkit", method=method
    )


ADAPTERS = (
    _adapter(
        f"{ATTENTIONS}.RelPositionMultiHeadAttention",
        always(attention),
        _unserved,
    ),
    _adapter(
        f"{ATTENTIONS}.RelPositionMultiHeadAttentionLongformer",
        always(local_attention),
        _unserved_local,
        _refuse_local,
    ),
    _adapter(
        f"{_ADAPTER}.RelPositionMultiHeadAttentionAdapter",
        _build_adapter,
        _unserved,
    ),
    _adapter(
        ".".join(nemo_masks.ENCODERS[0]),
        nemo_masks.build,
        nemo_masks.unserved,
        nemo_masks.refuse,
        "_create_masks",
    ),
)
