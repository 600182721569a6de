"""Hugging Face's XLNet: content and query streams, memory, segments.

    score_ij = ((q_i + r_w_bias)·k_j + (q_i + r_r_bias)·r[j - i + Tq] + (q_i + r_s_bias)·e_ij) / √d

The rows of the table go from distance Tk down to -(Tq - 1), or to 0 with attn_type "uni". e_ij is
`seg_embed[0]` if the query and the key are in the same segment, else `seg_embed[1]`. This bias has
a low rank: the head gets one more column per segment. A query's columns are its products with the
two embeddings, a key's columns are 1 for its own segment and 0 for others (docs/mathematics.md).

Both streams attend to the same keys, those of the content stream h and of the memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transformer_xl.integrations import hugging_face, xlnet_model
from transformer_xl.integrations.adapter import Adapter, Forward, always
from transformer_xl.integrations.hugging_face import which_keys
from transformer_xl.integrations.position_tables import kept
from txl_kernels import merge_attention, rel_attention_with_lse


class Keys(NamedTuple):
    """The keys and values of both streams; with segments, k and mem_k have their columns."""

    k: Tensor  # [B, H, T, d_head + S]
    v: Tensor  # [B, H, T, d_head]
    mem_k: Tensor | None  # [B, H, Tm, d_head + S]
    mem_v: Tensor | None  # [B, H, Tm, d_head]
    r: Tensor  # [1 or B, H, R, d_head]
    segments: Tensor | None  # bool [B, 1, Tk, S]


def attention(
    module: Any,
    h: Tensor,  # [T, B, d_model]
    g: Tensor | None,  # [n_predict, B, d_model]
    attn_mask_h: Tensor | None,
    attn_mask_g: Tensor | None,
    r: Tensor,  # [R, 1 or B, d_model]
    seg_mat: Tensor | None,
    mems: Tensor | None = None,  # [Tm, B, d_model]
    target_mapping: Tensor | None = None,  # [n_predict, T, B]
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`XLNetRelativeAttention.forward`.

    Args:
        attn_mask_h, attn_mask_g: as in xlnet_model.py.
        seg_mat: bool [Tk, B, S], True for the segment of each key; S segments in the batch.
    """
    keys = _keys(module, h, r, seg_mat, mems)
    out = _attend(module, _heads(h, module.q), keys, attn_mask_h, is_content=True)
    output_h = module.post_attention(h, out)
    if g is None:
        return output_h, None
    q = _heads(g, module.q)
    if target_mapping is not None:
        q = torch.einsum("bnmd,mlb->bnld", q, target_mapping)
    out = _attend(module, q, keys, attn_mask_g, is_content=False)
    if target_mapping is not None:
        out = torch.einsum("lbnd,mlb->mbnd", out, target_mapping)
    return output_h, module.post_attention(g, out)


def _heads(x: Tensor, weight: Tensor) -> Tensor:
    """[B, H, T, d_head] from [T, B, d_model] and a weight [d_model, H, d_head]."""
    return torch.einsum("ibh,hnd->bnid", x, weight)


def _keys(module: Any, h: Tensor, r: Tensor, seg_mat: Tensor | None, mems: Tensor | None) -> Keys:
    k, v = _heads(h, module.k), _heads(h, module.v)
    mem_k = mem_v = segments = None
    if mems is not None and mems.dim() > 1:
        mem_k, mem_v = _heads(mems, module.k), _heads(mems, module.v)
    if seg_mat is not None:
        segments = seg_mat.transpose(0, 1)[:, None]
        columns = segments.to(k.dtype).expand(-1, k.shape[1], -1, -1)
        n_memory = len(seg_mat) - len(h)
        k = torch.cat([k, columns[:, :, n_memory:]], dim=-1)
        if mem_k is not None:
            mem_k = torch.cat([mem_k, columns[:, :, :n_memory]], dim=-1)
    return Keys(k, v, mem_k, mem_v, _positions(module, r), segments)


def _positions(module: Any, r: Tensor) -> Tensor:
    """[1 or B, H, R, d_head]; a table that was expanded for the batch is projected once."""
    if r.shape[1] > 1 and r.stride(1) == 0:
        r = r[:, :1]

    def make() -> Tensor:
        return _heads(r.to(module.r.dtype), module.r)

    return make() if r.shape[1] > 1 else kept(module, tuple(r.shape), (r, module.r), make)


def _attend(
    module: Any,
    q: Tensor,  # [B, H, T, d_head]
    keys: Keys,
    mask: Tensor | None,
    *,
    is_content: bool,
) -> Tensor:
    """[T, B, H, d_head]: the attention of one stream, the content stream or the query stream."""
    content, r_w_bias = _with_columns(module, q, keys.segments)
    out, lse = rel_attention_with_lse(
        content,
        keys.k,
        keys.v,
        keys.r,
        r_w_bias=r_w_bias,
        r_r_bias=module.r_r_bias,
        mem_k=keys.mem_k,
        mem_v=keys.mem_v,
        q_pos=None if keys.segments is None else q,
        offset=q.shape[2],
        scale=module.scale,
        dropout_p=module.dropout.p if module.dropout.training else 0.0,
        **which_keys(mask, 0, {}),
    )
    if is_content and mask is not None and mask.dim() == 2:
        own = keys.r[:, :, q.shape[2] + _length(keys.mem_k), None]  # [1 or B, H, 1, d_head]
        terms = ((content, r_w_bias, keys.k), (q, module.r_r_bias, own))
        scores = sum(_product(x, bias, y, lse.dtype) for x, bias, y in terms) * module.scale
        out = _with_own_key(module, out, lse, scores, keys, mask)
    if not is_content and mask is not None and mask.dim() != 3:  # "uni" includes the own key
        out = _mean_without_keys(out, keys, mask)
    return out.permute(2, 0, 1, 3)


def _with_columns(module: Any, q: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """q and r_w_bias of the content product, with the columns of segments: [B, H, T, d_head + S]
    and [H, d_head + S]."""
    if segments is None:
        return q, module.r_w_bias
    scores = torch.einsum("bnid,snd->bnis", q + module.r_s_bias[:, None], module.seg_embed)
    same, different = scores.unsqueeze(-2).unbind(-1)  # [B, H, T, 1] each
    columns = torch.where(segments[:, :, -q.shape[2] :], same, different)
    bias = nn.functional.pad(module.r_w_bias, (0, columns.shape[-1]))
    return torch.cat([q, columns], dim=-1), bias


def _product(q: Tensor, bias: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, T]: (q + bias)·key of each query and the key at its place."""
    return ((q.to(dtype) + bias[:, None]) * key).sum(-1)


def _with_own_key(
    module: Any,
    out: Tensor,  # [B, H, T, d_head]
    lse: Tensor,  # [B, H, T]
    scores: Tensor,  # [B, H, T], of each query and its own key
    keys: Keys,
    ranges: Tensor,  # [2, B]
) -> Tensor:
    """Adds the own keys of padded tokens, which their ranges do not contain."""
    position = torch.arange(out.shape[2], device=out.device) + _length(keys.mem_k)
    first, end = ranges[:, :, None]
    is_valid = (position >= first) & (position < end)
    scores = scores.masked_fill(is_valid[:, None], -torch.inf)
    v = keys.v * module.dropout(torch.ones_like(scores)).to(keys.v.dtype)[..., None]
    return merge_attention([out, v.to(out.dtype)], [lse, scores])[0]


def _mean_without_keys(out: Tensor, keys: Keys, mask: Tensor) -> Tensor:
    """A query that sees no key gets the mean of all values, as in the original: the first one of a
    permutation, whose token is predicted, or one in a row of padding alone."""
    v = keys.v if keys.mem_v is None else torch.cat([keys.mem_v, keys.v], dim=2)
    sees = (
        mask.any(-1, keepdim=True) if mask.dim() == 4 else (mask[1] > mask[0])[:, None, None, None]
    )
    return torch.where(sees, out, v.mean(2, keepdim=True).to(out.dtype))


def _length(memory: Tensor | None) -> int:
    return 0 if memory is None else memory.shape[2]


def _unserved(
    module: Any,
    h: Tensor,
    g: Any,
    attn_mask_h: Any,
    attn_mask_g: Any,
    r: Tensor,
    seg_mat: Any,
    mems: Any = None,
    target_mapping: Any = None,
    output_attentions: bool = False,
) -> str | None:
    if output_attentions:
        return "attention weights are requested"
    dense = (attn_mask_h, attn_mask_g, seg_mat)
    if any(isinstance(x, Tensor) and x.is_floating_point() for x in dense):
        return "its model, which is not patched or runs the original code, made dense masks"
    return None


def _build_model(original: Forward) -> Forward:
    return hugging_face.with_body(original, xlnet_model.model)


ADAPTERS = (
    Adapter(
        "xlnet",
        f"{xlnet_model.MODULE}.XLNetRelativeAttention",
        hugging_face.VERSIONS,
        always(attention),
        _unserved,
    ),
    Adapter(
        "xlnet",
        f"{xlnet_model.MODULE}.XLNetModel",
        hugging_face.VERSIONS,
        _build_model,
        xlnet_model.unserved,
    ),
)
