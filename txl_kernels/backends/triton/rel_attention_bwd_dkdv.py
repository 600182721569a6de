"""The backward kernel of `rel_attention` that owns keys: dk, dv and those of the memory."""

from __future__ import annotations

import triton
import triton.language as tl

from txl_kernels.backends.triton.rel_attention_call import UNSPECIALIZED
from txl_kernels.backends.triton.rel_attention_tile import (
    biased_queries,
    dropout_keep,
    key_limits,
    load_keys,
    load_lse_and_delta,
    load_positions,
    load_rows,
    mask_tile,
    probs_and_dscores,
    seeing_queries,
    skew_transposed,
    visible_keys,
)


@triton.jit
def _store_keys(p_segment, p_memory, tile, i_bh, o_j, Tm, Tk, o_d, D: tl.constexpr):
    """Rows o_j of [memory; segment], contiguous and each where it belongs; None is not wanted."""
    tile = tile.to(p_segment.dtype.element_ty if p_segment is not None else p_memory.dtype.element_ty)
    columns = (o_d < D)[None, :]
    if p_segment is not None:
        o_row = i_bh * (Tk - Tm) + (o_j - Tm)
        inside = ((o_j >= Tm) & (o_j < Tk))[:, None] & columns
        tl.store(p_segment + o_row[:, None] * D + o_d[None, :], tile, mask=inside)
    if p_memory is not None:
        o_row = i_bh * Tm + o_j
        inside = (o_j < Tm)[:, None] & columns
        tl.store(p_memory + o_row[:, None] * D + o_d[None, :], tile, mask=inside)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "first_tile", "n_tiles"])
def _rel_attention_bwd_dkdv_kernel(
    p_q,  # [B, H, Tq, D]
    p_k,  # [B, H, Ts, D]
    p_v,  # [B, H, Ts, DV]
    p_r,  # [1 or B, 1 or H, R, D]
    p_r_w_bias,  # [H, D]
    p_r_r_bias,  # [H, D]
    p_mem_k,  # [B, H, Tm, D]
    p_mem_v,  # [B, H, Tm, DV]
    p_key_start,  # [B]
    p_key_lens,  # [B]
    p_mask,  # [B, H, Tq, Tk]
    p_seed,  # one int64
    p_dout,  # [B, H, Tq, DV]
    p_lse,  # [B, H, Tq], contiguous, float32
    p_delta,  # [B, H, Tq], contiguous, float32
    p_dk,  # [B, H, Ts, D], contiguous; None where not wanted, as the three below
    p_dv,  # [B, H, Ts, DV]
    p_dmem_k,  # [B, H, Tm, D]
    p_dmem_v,  # [B, H, Tm, DV]
    s_q_b, s_q_h, s_q_i,
    s_k_b, s_k_h, s_k_j,
    s_v_b, s_v_h, s_v_j,
    s_r_b, s_r_h, s_r_m,
    s_mem_k_b, s_mem_k_h, s_mem_k_j,
    s_mem_v_b, s_mem_v_h, s_mem_v_j,
    s_mask_b, s_mask_h, s_mask_i, s_mask_j,
    s_dout_b, s_dout_h, s_dout_i,
    H, Tq, Tm, Tk, R, offset, left, right, chunk_size, chunk_left, chunk_phase,
    scale, sign, softcap, threshold, dropout_scale, first_tile, n_tiles,
    D: tl.constexpr,
    DV: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_K keys of one (batch, head) and all queries that see some of them.

    Recomputes probabilities from lse, block by block of BLOCK_Q queries, as tiles [keys, queries]:
    so they are left operands of the products that sum over queries, as they come out of the products
    before. Two chunks of r are multiplied per block, for the queries change with every block.
    Accumulates dk and dv in float32 in registers and writes them once. Deterministic: every sum is
    one program's, in a fixed order.
    """
    NEEDS_DK: tl.constexpr = (p_dk is not None) or (p_dmem_k is not None)
    NEEDS_DV: tl.constexpr = (p_dv is not None) or (p_dmem_v is not None)
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    # With a causal mask the first keys are seen by most queries: the longest programs start first.
    begin_j = (first_tile + tl.program_id(0) % n_tiles) * BLOCK_K
    i_b, i_h = i_bh // H, i_bh % H
    o_j = begin_j + tl.arange(0, BLOCK_K)
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    p_q += i_b * s_q_b + i_h * s_q_h
    p_dout += i_b * s_dout_b + i_h * s_dout_h
    p_r += i_b * s_r_b + i_h * s_r_h
    p_lse += i_bh * Tq
    p_delta += i_bh * Tq
    p_k += i_b * s_k_b + i_h * s_k_h
    p_v += i_b * s_v_b + i_h * s_v_h
    if p_mem_k is not None:
        p_mem_k += i_b * s_mem_k_b + i_h * s_mem_k_h
        p_mem_v += i_b * s_mem_v_b + i_h * s_mem_v_h
    if p_mask is not None:
        p_mask += i_b * s_mask_b + i_h * s_mask_h
    first, last = key_limits(p_key_start, p_key_lens, i_b, Tk)
    b_k = load_keys(p_k, s_k_j, p_mem_k, s_mem_k_j, o_j, Tm, last, o_d, D)
    b_v = load_keys(p_v, s_v_j, p_mem_v, s_mem_v_j, o_j, Tm, last, o_dv, DV)
    begin, end = seeing_queries(
        begin_j, tl.minimum(begin_j + BLOCK_K, Tk),
        first, last, Tq, Tk, left, right, chunk_size, chunk_left, chunk_phase,
    )  # fmt: skip

    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    for begin_i in tl.range(begin, end, BLOCK_Q):
        o_i = begin_i + tl.arange(0, BLOCK_Q)
        b_q = load_rows(p_q, o_i, s_q_i, Tq, o_d, D)
        b_qu = biased_queries(b_q, p_r_w_bias, i_h, o_d, D, sign)
        b_qv = biased_queries(b_q, p_r_r_bias, i_h, o_d, D, sign)
        o_m = o_j - begin_i + offset
        b_r = load_positions(p_r, s_r_m, o_m, R, o_d, D, CLAMP)
        chunk = tl.dot(b_r, tl.trans(b_qv), input_precision="ieee")
        b_r = load_positions(p_r, s_r_m, o_m - BLOCK_K, R, o_d, D, CLAMP)
        earlier = tl.dot(b_r, tl.trans(b_qv), input_precision="ieee")
        b_scores = skew_transposed(chunk, earlier, BLOCK_K, BLOCK_Q)
        b_scores = tl.dot(b_k, tl.trans(b_qu), b_scores, input_precision="ieee")
        b_dout = load_rows(p_dout, o_i, s_dout_i, Tq, o_dv, DV)
        b_dprobs = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
        lo, hi = visible_keys(
            o_i, first, last, Tq, Tk, left, right, chunk_size, chunk_left, chunk_phase
        )
        seen = (o_j[:, None] >= lo[None, :]) & (o_j[:, None] < hi[None, :])
        if p_mask is not None:
            seen &= mask_tile(p_mask, s_mask_j, s_mask_i, o_j, o_i, Tk, Tq)
        keep = None
        if threshold is not None:
            keep = dropout_keep(
                p_seed, threshold, i_bh.to(tl.int32), o_i, begin_j, BLOCK_Q, BLOCK_K
            )
            keep = tl.trans(keep)
        b_lse, b_delta = load_lse_and_delta(p_lse, p_delta, o_i, Tq)
        b_probs, b_dscores = probs_and_dscores(
            b_scores, b_dprobs, b_lse[None, :], b_delta[None, :], seen, keep,
            scale, softcap, dropout_scale,
        )  # fmt: skip
        if NEEDS_DV:
            b_dv = tl.dot(b_probs.to(b_dout.dtype), b_dout, b_dv, input_precision="ieee")
        if NEEDS_DK:
            b_dk = tl.dot(b_dscores.to(b_k.dtype), b_qu, b_dk, input_precision="ieee")
    if NEEDS_DK:
        _store_keys(p_dk, p_dmem_k, b_dk * scale, i_bh, o_j, Tm, Tk, o_d, D)
    if NEEDS_DV:
        _store_keys(p_dv, p_dmem_v, b_dv, i_bh, o_j, Tm, Tk, o_dv, DV)
