"""The attention of the classes in docs/mappings.md, each in its own convention, with dense scores.

Each function is a class's forward; the first argument has the class's parameters and attributes by
their names. Shapes are those of the classes, with the sizes below.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, T, H, D, M = 3, 11, 3, 8, 5  # M: frames of memory
C = H * D
DISTANCE = torch.arange(T)[:, None] - torch.arange(T)  # from query i back to key j
Module = Any


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1)).transpose(-3, -2)


def position_scores(q: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """q_i · table[rows[i, j]], 0 where no row exists; table [..., R, D]."""
    exists = (rows >= 0) & (rows < table.shape[-2])
    chosen = table[..., rows.clamp(0, table.shape[-2] - 1), :]  # [..., T, Tk, D]
    return (q[..., None, :] * chosen).sum(-1) * exists


def attend(scores: Tensor, mask: Tensor, v: Tensor, dropout: nn.Module | None = None) -> Tensor:
    """[B, T, H * D]; a row without keys is 0."""
    probs = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0.0)
    out: Tensor = (dropout(probs) if dropout is not None else probs) @ v
    return out.transpose(1, 2).flatten(2)


def fastspeech2_conformer(
    m: Module, hidden_states: Tensor, attention_mask: Tensor, pos_emb: Tensor
) -> Tensor:
    q, k, v = (heads(f(hidden_states)) for f in (m.linear_q, m.linear_k, m.linear_v))
    r = heads(m.linear_pos(pos_emb))
    positions = position_scores(q + m.pos_bias_v[:, None], r, T - 1 - DISTANCE)
    scores = ((q + m.pos_bias_u[:, None]) @ k.mT + positions) / math.sqrt(D)
    return m.linear_out(attend(scores, attention_mask[:, None].bool(), v, m.dropout))


def speechbrain(m: Module, x: Tensor, pos_embs: Tensor, key_padding_mask: Tensor) -> Tensor:
    weights = m.in_proj_weight.view(H, 3, D, C)  # q, k, v of each head
    q, k, v = (torch.einsum("btc,hdc->bhtd", x, weights[:, n]) for n in range(3))
    v = v + m.value_bias_weight.view(H, 1, D)
    u, w = m.pos_bias_u.flatten().view(H, 1, D), m.pos_bias_v.flatten().view(H, 1, D)
    positions = position_scores(q + w, heads(m.linear_pos(pos_embs)), T - 1 - DISTANCE)
    scores = ((q + u) @ k.mT + positions) / math.sqrt(C)
    return m.out_proj(attend(scores, ~key_padding_mask[:, None, None], v, m.dropout_att))


def icefall_conformer(m: Module, x: Tensor, pos_emb: Tensor, key_padding_mask: Tensor) -> Tensor:
    q, k, v = (heads(y) for y in m.in_proj(x.transpose(0, 1)).split(C, -1))
    r = heads(m.linear_pos(pos_emb))
    positions = position_scores(q + m.pos_bias_v[:, None], r, T - 1 - DISTANCE)
    scores = ((q + m.pos_bias_u[:, None]) @ k.mT + positions) / math.sqrt(D)
    dropout = nn.Dropout(m.dropout).train(m.training)
    out = attend(scores, ~key_padding_mask[:, None, None], v, dropout)
    return m.out_proj(out).transpose(0, 1)


def _gemma(m: Module, x: Tensor, table: Tensor, key_scale: float, mask: Tensor) -> Tensor:
    q, k, v = (heads(f(x)) for f in (m.q_proj, m.k_proj, m.v_proj))
    q = q * m.q_scale * F.softplus(m.per_dim_scale)
    rows = m.max_past_horizon - DISTANCE
    cap = m.attention_logits_soft_cap
    scores = q @ (key_scale * k).mT + position_scores(q, heads(table), rows)
    return attend(cap * (scores / cap).tanh(), mask, v)


def gemma3n_audio(m: Module, hidden_states: Tensor, mask: Tensor) -> Tensor:
    """Two frames before a query, one after it."""
    distances = torch.tensor([[2, 1, 0, -1]])
    features = m.relative_position_embedding._get_timing_signal_1d_pos
    table = m.relative_position_embedding.pos_proj(features(distances, hidden_states.dtype))
    near = (DISTANCE <= 2) & (DISTANCE >= -1)
    out = _gemma(m, hidden_states, table, 1.0, near & ~mask[:, None, None])
    return out.unflatten(2, (H, D))


def gemma4_audio(
    m: Module, hidden_states: Tensor, position_embeddings: Tensor, n_valid: Tensor
) -> Tensor:
    """Two frames before a query and one after it are in the table; one less are attended to."""
    near = (DISTANCE <= 1) & (DISTANCE >= 0)
    mask = near & (torch.arange(T) < n_valid[:, None])[:, None, None]
    table = m.relative_k_proj(position_embeddings)
    return m.post(_gemma(m, hidden_states, table, m.k_scale, mask))


def funnel(m: Module, x: Tensor, attention_inputs: Any) -> Tensor:
    table, same_segment, attention_mask, cls_mask = attention_inputs
    q, k, v = (heads(f(x)) for f in (m.q_head, m.k_head, m.v_head))
    q, u, w, s = (y * m.scale for y in (q, m.r_w_bias, m.r_r_bias, m.r_s_bias))
    r = torch.einsum("td,dnh->nth", table[m.block_index][0], m.r_kernel)
    positions = position_scores(q + w[:, None], r, T - DISTANCE)
    kind = torch.einsum("bnid,snd->bnis", q + s[:, None], m.seg_embed)
    segments = torch.where(same_segment[:, None], kind[..., 1:], kind[..., :1])
    scores = (q + u[:, None]) @ k.mT + (positions + segments) * cls_mask
    out = attend(scores, attention_mask[:, None, None] > 0, v, m.attention_dropout)
    return m.layer_norm(x + m.hidden_dropout(m.post_proj(out)))


def enformer(m: Module, x: Tensor, positions: Tensor) -> Tensor:
    q, k, v = (heads(f(x)) for f in (m.to_q, m.to_k, m.to_v))
    q, r = q * m.scale, heads(m.to_rel_k(m.pos_dropout(positions)))
    scores = (q + m.rel_content_bias) @ k.mT
    scores = scores + position_scores(q + m.rel_pos_bias, r, T - 1 - DISTANCE)
    return m.to_out(attend(scores, torch.ones(T, T, dtype=torch.bool), v, m.attn_dropout))


def rllib_gtrxl(m: Module, inputs: Tensor, memory: Tensor) -> Tensor:
    x = m._input_layernorm(torch.cat([memory.detach(), inputs], 1))
    q, k, v = (heads(y) for y in m._qkv_layer(x).split(C, -1))
    r = heads(m._pos_proj(m._rel_pos_embedding(M + T))[:, 0])
    distance = M + torch.arange(T)[:, None] - torch.arange(M + T)
    q = q[:, :, M:]
    positions = position_scores(q + m._vvar[:, None], r, M + T - 1 - distance)
    scores = ((q + m._uvar[:, None]) @ k.mT + positions) / math.sqrt(D)
    return m._linear_layer(attend(scores, distance >= 0, v))


def torchrl_gtrxl(
    m: Module, current: Tensor, memory: Tensor, valid: Tensor, is_init: Tensor
) -> Tensor:
    x = m.norm1(torch.cat([memory, current], 1))
    k, v = (heads(y) for y in m.kv(x).split(C, -1))
    q, r = heads(m.q(x[:, M:])), heads(m.relative(m.positions))
    distance = M + torch.arange(T)[:, None] - torch.arange(M + T)
    episode = is_init.long().cumsum(1)
    same = torch.cat([valid[:, None] & (episode == 0)[..., None], _same(episode)], -1)
    mask = (same & (distance >= 0) & (distance <= M))[:, None]
    positions = position_scores(q + m.position_bias[:, None], r, M - distance)
    scores = ((q + m.content_bias[:, None]) @ k.mT + positions) / math.sqrt(D)
    out = m.dropout(m.out(attend(scores, mask, v, m.dropout)).relu())
    y = m.attention_gate(current, out)
    return m.mlp_gate(y, m.dropout(m.mlp(m.norm2(y)).relu()))


def _same(episode: Tensor) -> Tensor:
    return episode[:, :, None] == episode[:, None]


def wenet(m: Module, x: Tensor, mask: Tensor, pos_emb: Tensor) -> Tensor:
    q, k, v = (heads(f(x)) for f in (m.linear_q, m.linear_k, m.linear_v))
    p = heads(m.linear_pos(pos_emb))
    scores = (q + m.pos_bias_u[:, None]) @ k.mT + (q + m.pos_bias_v[:, None]) @ p.mT
    return m.linear_out(attend(scores / math.sqrt(D), mask[:, None].bool(), v, m.dropout))
