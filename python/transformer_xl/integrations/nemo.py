"""NVIDIA NeMo's Conformer encoders (FastConformer, Parakeet, Canary, …), whose attention is
Transformer-XL's or, in the local attention, has a table of left + right + 1 distances.

    score_ij = ((q_i + pos_bias_u)·k_j + (q_i + pos_bias_v)·r[j - i + Tq - 1]) / √d_k

Whatever the `att_context_style`, a frame attends to one range of frames. The patched encoder
therefore makes int64 [B, Tk, 2], the first frame and the end of the range of each frame, where the
library makes a mask [B, Tk, Tk]; the layers return neither.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from transformer_xl.integrations.adapter import Adapter, Forward, adapter_of, nothing_to_refuse
from transformer_xl.integrations.position_tables import project
from txl_kernels import rel_attention

_ASR = "nemo.collections.asr"
_MODULE = f"{_ASR}.parts.submodules.multi_head_attention"
_ADAPTER = f"{_ASR}.parts.submodules.adapters.multi_head_attention_adapter_module"
_VERSIONS = ((3, 0), (3, 0))
_STYLES = ("regular", "chunked_limited", "chunked_limited_with_rc")
# Encoders whose forward uses the masks only as arguments of the layers, and slices the queries.
_ENCODERS = ("ConformerEncoder", "ConformerEncoderUNet")
_UNLIMITED = 10_000  # chunks of the left context, the library's number


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
        dropout_p=module.dropout.p if module.training else 0.0,
        **options,
    )
    projected: Tensor = module.linear_out(out.transpose(1, 2).flatten(2))
    return projected


def local_table(r: Tensor, left: int, right: int) -> Tensor:
    """The rows that the local attention reads at the distances left, …, -right.

    They are those of `r` [1 or B, H, left + right + 1, d_k] if left = right. Otherwise the library
    adds the position scores of the shorter side to columns that are `gap` farther out, so that
    `gap` distances next to the longer side have no position score.
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


def ranges_of_frames(
    style: str, context: Sequence[int], T: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """[T] each: the first frame that a frame attends to, and the end; also outside [0, T].

    Args:
        style: the `att_context_style`.
        context: left and right context, or left context, size of a chunk and right context; -1
            means unlimited.
    """
    frame = torch.arange(T, device=device)
    left, right = context[0], context[-1]
    if style == "chunked_limited_with_rc" and sum(context) != -3:
        begin = frame // context[1] * context[1]
        return begin - left, begin + context[1] + right
    if style == "chunked_limited" and right != -1:
        size = right + 1
        begin = frame // size * size
        n_chunk = left // size if left >= 0 else _UNLIMITED
        return begin - n_chunk * size, begin + size
    first = frame - left if left >= 0 else torch.zeros_like(frame)
    return first, frame + right + 1 if right >= 0 else torch.full_like(frame, T)


def build_masks(original: Forward) -> Forward:
    """`_create_masks` of the encoder, given its own."""

    def masks(
        module: Any,
        att_context_size: Sequence[int],
        padding_length: Tensor,  # [B]
        max_audio_length: int,
        offset: Tensor | None,  # [B]
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        if module.self_attention_model == "rel_pos_local_attn":  # has no mask [B, T, T]
            own: tuple[Tensor, Tensor] = original(
                module, att_context_size, padding_length, max_audio_length, offset, device
            )
            return own
        T = max_audio_length
        frame = torch.arange(T, device=device)
        end = padding_length[:, None].to(frame.dtype)
        start = torch.zeros_like(end) if offset is None else offset[:, None].to(frame.dtype)
        valid = (frame >= start) & (frame < end)  # [B, T]
        first, last = ranges_of_frames(module.att_context_style, att_context_size, T, device)
        ranges = [torch.maximum(first, start), torch.where(valid, torch.minimum(last, end), 0)]
        return ~valid, torch.stack(ranges, dim=-1)

    return masks


def _which_keys(mask: Tensor | None, Tk: int, n_row: int) -> dict[str, Any]:
    """The arguments of `rel_attention` that determine which keys a query attends to."""
    if mask is None:
        return {}
    if mask.dtype == torch.bool:
        return {"mask": ~mask[:, None]}
    if n_row != 2 * Tk - 1:
        raise ValueError(
            f"nemo: expected a cache of {(n_row + 1) // 2} frames together with the new ones, as "
            f"the encoder's streaming_cfg has it, got {Tk}."
        )
    return {"key_start": mask[..., 0], "key_lens": mask[..., 1]}


def _autocast() -> AbstractContextManager[Any]:
    """The library's own context: no float16 under autocast, but bfloat16 or float32."""
    context: AbstractContextManager[Any] = sys.modules[_MODULE].avoid_float16_autocast_context()
    return context


def _upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in tensors) if torch.is_autocast_enabled() else tensors


def _is_traced() -> str | None:
    is_traced = torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
    return "it is traced by torch.jit, for example for ONNX" if is_traced else None


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
    if pos_emb.shape[1] < query.shape[1] + Tk - 1:
        return "the position table has fewer rows than there are distances"
    return _is_traced()


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
    return _is_traced()


def _refuse_local(module: Any) -> str | None:
    return "it has global tokens" if module.global_tokens > 0 else None


def _refuse_encoder(module: Any) -> str | None:
    model, style = module.self_attention_model, module.att_context_style
    if model not in ("rel_pos", "rel_pos_local_attn"):
        return f"its self_attention_model is {model!r}"
    if style not in _STYLES:
        return f"its att_context_style is {style!r}"
    if type(module).forward_internal.__qualname__.partition(".")[0] not in _ENCODERS:
        return "its class has another forward_internal than ConformerEncoder"
    return None


def _unserved_masks(module: Any, *args: Any, **options: Any) -> str | None:
    """The ranges are made for all attentions of the layers, NeMo's adapters included."""
    library: Any = sys.modules[_MODULE]
    attentions = [m for m in module.layers.modules() if isinstance(m, library.MultiHeadAttention)]
    if any(adapter_of(attention) is None for attention in attentions):
        return "not all of its attention layers are patched"
    return _is_traced()


def _build_attention(original: Forward) -> Forward:
    return attention


def _build_local_attention(original: Forward) -> Forward:
    return local_attention


def _build_adapter(original: Forward) -> Forward:
    """The forward of NeMo's attention adapters, which normalise their input."""

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> Any:
        normed = (module.pre_norm(x) for x in (query, key, value))
        return attention(module, *normed, *args, **options)

    return forward


def _adapter(path: str, build: Any, unserved: Any, refuse: Any, method: str = "forward") -> Adapter:
    return Adapter(
        "nemo", path, _VERSIONS, build, unserved, refuse, distribution="nemo_toolkit", method=method
    )


ADAPTERS = (
    _adapter(
        f"{_MODULE}.RelPositionMultiHeadAttention", _build_attention, _unserved, nothing_to_refuse
    ),
    _adapter(
        f"{_MODULE}.RelPositionMultiHeadAttentionLongformer",
        _build_local_attention,
        _unserved_local,
        _refuse_local,
    ),
    _adapter(
        f"{_ADAPTER}.RelPositionMultiHeadAttentionAdapter",
        _build_adapter,
        _unserved,
        nothing_to_refuse,
    ),
    _adapter(
        f"{_ASR}.modules.conformer_encoder.ConformerEncoder",
        build_masks,
        _unserved_masks,
        _refuse_encoder,
        "_create_masks",
    ),
)
