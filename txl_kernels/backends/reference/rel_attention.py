"""Attention with Transformer-XL relative positions in plain PyTorch: the specification.

    p = i + Tk - Tq,  or  i + q_start[b]
    m = j - p + (Tk - Tq) + offset
    score[b,h,i,j] = scale · (q_i + r_w_bias)·k_j + pos_scale · (qp_i + r_r_bias)·r[m]
                     + bias[b,h,i,j],   qp = q_pos or q
    out_i = Σ_j dropout(softmax_j(mask(softcap(score))))_ij · v_j

Materialises [B, H, Tq, Tk]. Differentiable any number of times, on any device.
"""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor

from txl_kernels._rel_attention_call import UNLIMITED, RelAttentionCall, Rules
from txl_kernels.backends.reference.philox import dropout_keep
from txl_kernels.backends.reference.precision import widened, work_dtype
from txl_kernels.backends.reference.rel_shift import rel_shift, within_reach
from txl_kernels.transforms import is_exporting

_FARTHEST = 2**31  # positions on the device beyond it act as it


def rel_attention(
    call: RelAttentionCall,
    *,
    bias: Tensor | None = None,  # broadcastable to [B, H, Tq, Tk]
    dead_uniform: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns out [B, H, Tq, Dv] in q's dtype and lse [B, H, Tq].

    All arithmetic is in `compute_dtype`, by default float64 for float64 and float32 otherwise:
    every input is cast once, so that its gradient is rounded once. The mask need not be expanded.
    """
    optional, rules, numbers = call.optional, call.rules, call.numbers
    dtype, work = call.q.dtype, compute_dtype or work_dtype(call.q.dtype)
    q, k, v, r, r_w_bias, r_r_bias, mem_k, mem_v, q_pos, bias = widened(
        (*call[:4], *optional[:5], bias), work
    )
    group = q.shape[1] // max(k.shape[1], 1)  # query heads of a key head
    keys, values = _joined(mem_k, k, group), _joined(mem_v, v, group)
    Tq, Tk = q.shape[2], keys.shape[2]
    ranges = (optional.key_start, optional.key_lens)
    absent = _outside(Tk, *(x if x is not None and x.ndim == 1 else None for x in ranges))
    if absent is not None:  # [B, 1, Tk]
        # An absent key may hold NaN, which a product with a probability or gradient of 0 keeps.
        keys = keys.masked_fill(absent.mT[:, None], 0.0)
        if not dead_uniform:
            values = values.masked_fill(absent.mT[:, None], 0.0)
        if bias is not None:
            bias = bias.masked_fill(absent[:, None], 0.0)

    content = _plus_head_bias(q, r_w_bias) @ keys.mT
    queries = _plus_head_bias(q if q_pos is None else q_pos, r_r_bias)
    start = _first_position(Tk - Tq, optional.q_start)
    offset = within_reach(rules.offset)
    if optional.q_start is not None:
        offset = offset + (Tk - Tq) - start
    position = rel_shift(queries @ r.mT, Tk, offset, clamp=bool(rules.clamp))
    scores = numbers.scale * content + numbers.pos_scale * position  # [B, H, Tq, Tk]
    if bias is not None:
        scores = scores + bias
    if numbers.softcap > 0:
        scores = numbers.softcap * torch.tanh(scores / numbers.softcap)
    conditions = _conditions(torch.arange(Tq, device=q.device)[:, None] + start, Tk, rules)
    outside = _outside(Tk, *ranges)
    if outside is not None:
        conditions.append(~outside[:, None])
    if optional.mask is not None:
        conditions.append(optional.mask)
    if conditions:
        allowed = functools.reduce(operator.and_, conditions)
        scores = scores.masked_fill(~allowed, -torch.inf)

    dead = (scores.detach() == -torch.inf).all(-1)  # [B, H, Tq]
    scores = scores.masked_fill(dead[..., None], 0.0)
    lse = scores.logsumexp(-1).masked_fill(dead, -torch.inf)
    probs = scores.softmax(-1)
    if not dead_uniform:
        probs = probs.masked_fill(dead[..., None], 0.0)
    if numbers.dropout_p > 0:
        assert optional.dropout_seed is not None
        keep = dropout_keep(optional.dropout_seed, numbers.dropout_p, (*q.shape[:2], Tq, Tk))
        probs = (probs / (1.0 - numbers.dropout_p)).masked_fill(~keep, 0.0)
    return (probs @ values).to(dtype), lse


def _joined(memory: Tensor | None, segment: Tensor, group: int) -> Tensor:
    """Memory and segment, each head repeated for the query heads that read it."""
    joined = segment if memory is None else torch.cat([memory, segment], dim=2)
    return joined if group == 1 else joined.repeat_interleave(group, dim=1)


def _plus_head_bias(q: Tensor, head_bias: Tensor | None) -> Tensor:
    return q if head_bias is None else q + head_bias[:, None]


def _first_position(default: int, q_start: Tensor | None) -> int | Tensor:
    """The position of the first query: a number, or [B, 1, 1, 1]."""
    if q_start is None:
        return default
    return q_start.long().clamp(-_FARTHEST, _FARTHEST)[:, None, None, None]


def _outside(Tk: int, key_start: Tensor | None, key_lens: Tensor | None) -> Tensor | None:
    """bool [B, 1 or Tq, Tk]: not key_start <= j < key_lens; None if neither is given."""
    outside = None
    if key_start is not None:
        outside = torch.arange(Tk, device=key_start.device) < _per_query(key_start)
    if key_lens is not None:
        after = torch.arange(Tk, device=key_lens.device) >= _per_query(key_lens)
        outside = after if outside is None else outside | after
    return outside


def _per_query(ends: Tensor) -> Tensor:
    """[B, 1 or Tq, 1]."""
    return (ends[:, None] if ends.ndim == 1 else ends)[..., None]


def _conditions(p: Tensor, Tk: int, rules: Rules) -> list[Tensor]:
    """bool, broadcastable to [B, H, Tq, Tk]: True where window and chunk let i attend to j.

    Args:
        p: the position of each query, [..., Tq, 1].
    """
    j = torch.arange(Tk, device=p.device)
    conditions: list[Tensor] = []
    if not _is_open(rules.window_left):
        conditions.append(j >= p - within_reach(rules.window_left))
    if not _is_open(rules.window_right):
        conditions.append(j <= p + within_reach(rules.window_right))
    if not isinstance(rules.chunk_size, int) or rules.chunk_size > 0:
        size, left_chunks, phase = rules.chunk_size, rules.chunk_left, rules.chunk_phase
        behind = _chunk_of(p, size, phase) - _chunk_of(j, size, phase)
        conditions.append((behind >= 0) & (behind <= left_chunks))
    return conditions


def _is_open(side: int) -> bool:
    """Whether a side of the window has no limit.

    Comparing a symbolic number would limit the length that it is computed from. Strict export shows
    symbolic numbers as plain ones.
    """
    if is_exporting() and torch.compiler.is_dynamo_compiling():
        return False
    return isinstance(side, int) and side == UNLIMITED


def _chunk_of(position: Tensor, size: int, phase: int) -> Tensor:
    """⌊(position + phase) / size⌋ - ⌊phase / size⌋, without sums that could overflow."""
    return position // size + (position % size >= size - phase % size)
