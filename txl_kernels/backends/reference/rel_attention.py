"""Attention with Transformer-XL relative positions in plain PyTorch: the specification.

    score[b,h,i,j] = scale · ((q_i + r_w_bias)·k_j + (q_i + r_r_bias)·r[m]) + bias[b,h,i,j]
    out_i = Σ_j dropout(softmax_j(mask(softcap(score))))_ij · v_j,   m = j - i + offset

Materialises [B, H, Tq, Tk]. Differentiable any number of times, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from txl_kernels.backends.reference.philox import dropout_keep
from txl_kernels.backends.reference.precision import widened, work_dtype
from txl_kernels.backends.reference.rel_shift import rel_shift, within_reach


def rel_attention(
    q: Tensor,  # [B, H, Tq, D]
    k: Tensor,  # [B, H, Ts, D]
    v: Tensor,  # [B, H, Ts, Dv]
    r: Tensor,  # [1 or B, 1 or H, R, D or Dp]
    *,
    r_w_bias: Tensor | None = None,  # [H, D]
    r_r_bias: Tensor | None = None,  # [H, D or Dp]
    mem_k: Tensor | None = None,  # [B, H, Tm, D]
    mem_v: Tensor | None = None,  # [B, H, Tm, Dv]
    q_pos: Tensor | None = None,  # [B, H, Tq, Dp]
    key_start: Tensor | None = None,  # [B]
    key_lens: Tensor | None = None,  # [B]
    mask: Tensor | None = None,  # bool, broadcastable to [B, H, Tq, Tk]
    bias: Tensor | None = None,  # broadcastable to [B, H, Tq, Tk]
    dropout_seed: Tensor | None = None,
    offset: int,
    clamp: bool = False,
    causal: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    chunk: Sequence[int] = (),  # or size, left, phase
    scale: float,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dead_uniform: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns out [B, H, Tq, Dv] in q's dtype and lse [B, H, Tq], without gradient.

    The arguments are those of the op's schema, with the same names. All arithmetic is in
    `compute_dtype`, by default float64 for float64 and float32 otherwise: every input is cast
    once, so that its gradient is rounded once.
    """
    dtype, work = q.dtype, compute_dtype or work_dtype(q.dtype)
    q, k, v, r, r_w_bias, r_r_bias, mem_k, mem_v, q_pos, bias = widened(
        (q, k, v, r, r_w_bias, r_r_bias, mem_k, mem_v, q_pos, bias), work
    )
    keys, values = _joined(mem_k, k), _joined(mem_v, v)
    Tq, Tk = q.shape[2], keys.shape[2]
    present = _present_keys(Tk, key_start, key_lens)
    if present is not None:
        # An absent key may hold NaN, which a product with a probability or gradient of 0 keeps.
        absent = ~present  # [B, Tk]
        keys = keys.masked_fill(absent[:, None, :, None], 0.0)
        if not dead_uniform:
            values = values.masked_fill(absent[:, None, :, None], 0.0)
        if bias is not None:
            bias = bias.masked_fill(absent[:, None, None, :], 0.0)

    content = _plus_head_bias(q, r_w_bias) @ keys.transpose(-1, -2)
    queries = _plus_head_bias(q if q_pos is None else q_pos, r_r_bias)
    position = queries @ r.transpose(-1, -2)
    scores = scale * (content + rel_shift(position, Tk, offset, clamp=clamp))  # [B, H, Tq, Tk]
    if bias is not None:
        scores = scores + bias
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = _allowed_keys(
        Tq, Tk, q.device, causal, window_left, window_right, chunk, present, mask
    )
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)

    lse = scores.detach().logsumexp(-1)  # [B, H, Tq]
    dead = (lse == -torch.inf)[..., None]
    probs = scores.masked_fill(dead, 0.0).softmax(-1)
    if not dead_uniform:
        probs = probs.masked_fill(dead, 0.0)
    if dropout_p > 0:
        assert dropout_seed is not None
        keep = dropout_keep(dropout_seed, dropout_p, (q.shape[0], q.shape[1], Tq, Tk))
        probs = (probs / (1.0 - dropout_p)).masked_fill(~keep, 0.0)
    return (probs @ values).to(dtype), lse


def _joined(memory: Tensor | None, segment: Tensor) -> Tensor:
    return segment if memory is None else torch.cat([memory, segment], dim=2)


def _plus_head_bias(q: Tensor, head_bias: Tensor | None) -> Tensor:
    return q if head_bias is None else q + head_bias[:, None]


def _present_keys(Tk: int, key_start: Tensor | None, key_lens: Tensor | None) -> Tensor | None:
    """bool [B, Tk]: key_start <= j < key_lens; None if neither is given."""
    present = None
    if key_start is not None:
        present = torch.arange(Tk, device=key_start.device) >= key_start[:, None]
    if key_lens is not None:
        before_end = torch.arange(Tk, device=key_lens.device) < key_lens[:, None]
        present = before_end if present is None else present & before_end
    return present


def _allowed_keys(
    Tq: int,
    Tk: int,
    device: torch.device,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    chunk: Sequence[int],
    present: Tensor | None,  # bool [B, Tk]
    mask: Tensor | None,
) -> Tensor | None:
    """bool, broadcastable to [B, H, Tq, Tk]: True where all conditions let i attend to j.

    None if there is no condition.
    """
    j = torch.arange(Tk, device=device)
    p = torch.arange(Tq, device=device)[:, None] + (Tk - Tq)  # the key position of each query
    conditions: list[Tensor] = []
    if causal:
        conditions.append(j <= p)
    if window_left is not None:
        conditions.append(j >= p - within_reach(window_left))
    if window_right is not None:
        conditions.append(j <= p + within_reach(window_right))
    if chunk:
        size, left_chunks, phase = chunk
        behind = _chunk_of(p, size, phase) - _chunk_of(j, size, phase)
        conditions.append((behind >= 0) & (behind <= left_chunks))
    if present is not None:
        conditions.append(present[:, None, None, :])
    if mask is not None:
        conditions.append(mask)
    if not conditions:
        return None
    allowed = conditions[0]
    for condition in conditions[1:]:
        allowed = allowed & condition
    return allowed


def _chunk_of(position: Tensor, size: int, phase: int) -> Tensor:
    """⌊(position + phase) / size⌋ - ⌊phase / size⌋, without sums that could overflow."""
    return position // size + (position % size >= size - phase % size)
