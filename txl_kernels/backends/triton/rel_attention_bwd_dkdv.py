"""The backward kernel of `rel_attention` for keys: dk, dv and the memory's dmem_k, dmem_v."""

from __future__ import annotations

import triton
import triton.language as tl

from txl_kernels.backends.triton.rel_attention_call import UNSPECIALIZED
from txl_kernels.backends.triton.rel_attention_keys import (
    key_limits,
    mask_tile,
    near_queries,
    padded_rows,
    queries_in_range,
    query_geometry,
    query_limits,
    seeing_queries,
    visible_keys,
)
from txl_kernels.backends.triton.rel_attention_skew import skew_transposed
from txl_kernels.backends.triton.rel_attention_tile import (
    dropout_keep,
    exponents,
    key_block,
    load_block,
    load_padded,
    load_position_block,
    probs_and_dscores,
)


@triton.jit
def _store_keys(
    p_segment, p_memory, tile, i_key_head, begin_j, Tm, Tk, o_d, D: tl.constexpr, ROWS: tl.constexpr
):
    """Writes a tile of keys to the segment's or memory's gradient, [B, Hk, T, D], if not None."""
    o_j = begin_j + tl.arange(0, ROWS)
    columns = (o_d < D)[None, :]
    if p_segment is not None:
        if begin_j >= Tm:
            o_row = i_key_head * (Tk - Tm) + o_j - Tm
            p_tile = p_segment + o_row[:, None] * D + o_d[None, :]
            b_tile = tile.to(p_segment.dtype.element_ty)
            tl.store(p_tile, b_tile, mask=(o_j < Tk)[:, None] & columns)
    if p_memory is not None:
        if begin_j < Tm:
            o_row = i_key_head * Tm + o_j
            p_tile = p_memory + o_row[:, None] * D + o_d[None, :]
            b_tile = tile.to(p_memory.dtype.element_ty)
            tl.store(p_tile, b_tile, mask=(o_j >= 0)[:, None] & columns)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "first_tile", "n_tiles"])
def _rel_attention_bwd_dkdv_kernel(
    p_qu,  # [B, H, padded_rows(Tq), BLOCK_D], contiguous: q + r_w_bias with its factor, and 0
    p_qv,  # [B, H, padded_rows(Tq), BLOCK_DP], the same of the position query and r_r_bias
    p_k,  # [B, Hk, Ts, D]
    p_v,  # [B, Hk, Ts, DV]
    p_r,  # [1 or B, 1 or H, R, DP]
    p_mem_k,  # [B, Hk, Tm, D]
    p_mem_v,  # [B, Hk, Tm, DV]
    p_q_start,  # [B]
    p_key_start,  # [B]
    p_key_lens,  # [B]
    p_query_ranges,  # [B, 2, padded_rows(Tq)]
    p_tile_ranges,  # [B, 4, padded_rows(Tq) / 16]
    p_mask,  # [B, H, Tq, Tk]
    p_seed,  # one int64
    p_dout,  # [B, H, Tq, DV]
    p_padded_lse,  # [B, H, padded_rows(Tq)], contiguous, float32; infinite without keys
    p_delta,  # the same
    p_dk,  # [B, Hk, Ts, D], contiguous; None if not requested, as the three below
    p_dv,  # [B, Hk, Ts, DV]
    p_dmem_k,  # [B, Hk, Tm, D]
    p_dmem_v,  # [B, Hk, Tm, DV]
    s_k_b, s_k_h, s_k_j,
    s_v_b, s_v_h, s_v_j,
    s_r_b, s_r_h, s_r_m,
    s_mem_k_b, s_mem_k_h, s_mem_k_j,
    s_mem_v_b, s_mem_v_h, s_mem_v_j,
    s_mask_b, s_mask_h, s_mask_i, s_mask_j,
    s_dout_b, s_dout_h, s_dout_i,
    H, Tq, Tm, Tk, R, offset, left, right, chunk_size, chunk_left, chunk_phase,
    scale, softcap, threshold, dropout_scale, first_tile, n_tiles,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    GROUP: tl.constexpr,
    CLAMP: tl.constexpr,
    FAR: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DP: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_K keys of one (batch, key head) and all queries that attend to some.

    Recomputes probabilities from lse, a block of BLOCK_Q queries at a time, as tiles [keys,
    queries]: the products that sum over queries read them as left operands without a transposition.
    Two chunks of r are multiplied per block, because the queries change with each block; with FAR,
    none in a block without a row of r. Accumulates dk and dv of the GROUP query heads in float32 in
    registers and writes them once. Deterministic: each sum is computed by one program in a fixed
    order.
    """
    NEEDS_DK: tl.constexpr = (p_dk is not None) or (p_dmem_k is not None)
    NEEDS_DV: tl.constexpr = (p_dv is not None) or (p_dmem_v is not None)
    i_key_head = (tl.program_id(0) // n_tiles).to(tl.int64)
    # With a causal mask most queries attend to the first keys: the longest programs start first.
    # Tiles are aligned to the segment's first key: each is of the memory or of the segment.
    begin_j = (first_tile + tl.program_id(0) % n_tiles - tl.cdiv(Tm, BLOCK_K)) * BLOCK_K + Tm
    i_b, i_hk = i_key_head // (H // GROUP), i_key_head % (H // GROUP)
    o_j = begin_j + tl.arange(0, BLOCK_K)
    o_d, o_dp, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DP), tl.arange(0, BLOCK_DV)
    p_k += i_b * s_k_b + i_hk * s_k_h
    p_v += i_b * s_v_b + i_hk * s_v_h
    if p_mem_k is not None:
        p_mem_k += i_b * s_mem_k_b + i_hk * s_mem_k_h
        p_mem_v += i_b * s_mem_v_b + i_hk * s_mem_v_h
    first, last = key_limits(p_key_start, p_key_lens, i_b, Tk)
    lo_shift, hi_shift, first_p, offset = query_geometry(
        p_q_start, i_b, left, right, offset, Tq, Tk, R
    )
    p_rows, s_row, low, high = key_block(
        p_k, s_k_j, p_mem_k, s_mem_k_j, begin_j, p_key_start, first, last, Tm
    )
    b_k = load_block(p_rows, s_row, begin_j, low, high, o_d, D, BLOCK_K)
    p_rows, s_row, low, high = key_block(
        p_v, s_v_j, p_mem_v, s_mem_v_j, begin_j, p_key_start, first, last, Tm
    )
    b_v = load_block(p_rows, s_row, begin_j, low, high, o_dv, DV, BLOCK_K)
    begin, end = seeing_queries(
        begin_j, begin_j + BLOCK_K, first, last, lo_shift, hi_shift, first_p, Tq,
        chunk_size, chunk_left, chunk_phase,
    )  # fmt: skip
    if p_tile_ranges is not None:
        first_i, end_i = queries_in_range(p_tile_ranges, i_b, begin_j, begin_j + BLOCK_K, Tq)
        begin, end = tl.maximum(begin, first_i), tl.minimum(end, end_i)
    # Blocks of queries are aligned; the padding of the queries completes the last one.
    end = tl.where(begin < end, end, 0)
    begin = begin // BLOCK_Q * BLOCK_Q
    if FAR:
        near_begin, near_end = near_queries(begin, end, begin_j, offset, R, BLOCK_Q, BLOCK_K)

    # In a loop with this attribute Triton also prefetches operands of products within a branch.
    STAGES: tl.constexpr = NUM_STAGES if FAR else None
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    for i_member in tl.range(GROUP):
        i_h = i_hk * GROUP + i_member
        i_bh = i_b * H + i_h
        o_rows = i_bh * padded_rows(Tq)
        p_qu_h, p_qv_h = p_qu + o_rows * BLOCK_D, p_qv + o_rows * BLOCK_DP
        p_lse_h, p_delta_h = p_padded_lse + o_rows, p_delta + o_rows
        p_dout_h = p_dout + i_b * s_dout_b + i_h * s_dout_h
        p_r_h = p_r + i_b * s_r_b + i_h * s_r_h
        p_mask_h = None
        if p_mask is not None:
            p_mask_h = p_mask + i_b * s_mask_b + i_h * s_mask_h
        for begin_i in tl.range(begin, end, BLOCK_Q, num_stages=STAGES):
            begin_i = tl.multiple_of(begin_i, BLOCK_Q)
            o_i = begin_i + tl.arange(0, BLOCK_Q)
            b_qu = load_padded(p_qu_h, begin_i, BLOCK_Q, BLOCK_D)
            b_qv = load_padded(p_qv_h, begin_i, BLOCK_Q, BLOCK_DP)
            begin_m = begin_j - begin_i + offset
            b_r = load_position_block(p_r_h, s_r_m, begin_m, R, o_dp, DP, CLAMP, BLOCK_K)
            begin_m -= BLOCK_K
            if FAR:
                b_before = load_position_block(p_r_h, s_r_m, begin_m, R, o_dp, DP, CLAMP, BLOCK_K)
                b_scores = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
                if (begin_i >= near_begin) & (begin_i < near_end):
                    chunk = tl.dot(b_r, tl.trans(b_qv), input_precision="ieee")
                    earlier = tl.dot(b_before, tl.trans(b_qv), input_precision="ieee")
                    b_scores = skew_transposed(chunk, earlier, BLOCK_K, BLOCK_Q)
            else:
                chunk = tl.dot(b_r, tl.trans(b_qv), input_precision="ieee")
                b_r = load_position_block(p_r_h, s_r_m, begin_m, R, o_dp, DP, CLAMP, BLOCK_K)
                earlier = tl.dot(b_r, tl.trans(b_qv), input_precision="ieee")
                b_scores = skew_transposed(chunk, earlier, BLOCK_K, BLOCK_Q)
            b_scores = tl.dot(b_k, tl.trans(b_qu), b_scores, input_precision="ieee")
            b_dout = load_block(p_dout_h, s_dout_i, begin_i, 0, Tq, o_dv, DV, BLOCK_Q)
            b_dprobs = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
            b_lse, b_delta = tl.load(p_lse_h + o_i), tl.load(p_delta_h + o_i)
            b_exponents, b_tanh = exponents(b_scores, scale, softcap, b_lse)
            _, all_end = visible_keys(
                begin_i, first, last, lo_shift, hi_shift, first_p,
                chunk_size, chunk_left, chunk_phase,
            )  # fmt: skip
            all_begin, _ = visible_keys(
                begin_i + BLOCK_Q - 1, first, last, lo_shift, hi_shift, first_p,
                chunk_size, chunk_left, chunk_phase,
            )  # fmt: skip
            if p_query_ranges is not None:
                all_begin = Tk  # the range of each query counts
            if (begin_j < all_begin) | (begin_j + BLOCK_K > all_end):
                b_first, b_last = query_limits(
                    p_query_ranges, i_b, begin_i, first, last, Tq, BLOCK_Q
                )
                lo, hi = visible_keys(
                    o_i, b_first, b_last, lo_shift, hi_shift, first_p,
                    chunk_size, chunk_left, chunk_phase,
                )  # fmt: skip
                seen = (o_j[:, None] >= lo[None, :]) & (o_j[:, None] < hi[None, :])
                b_exponents = tl.where(seen, b_exponents, float("-inf"))
            if p_mask is not None:
                seen = mask_tile(p_mask_h, s_mask_j, s_mask_i, o_j, o_i, Tk, Tq)
                b_exponents = tl.where(seen, b_exponents, float("-inf"))
            keep = None
            if threshold is not None:
                i_row = i_bh.to(tl.int32)
                keep = dropout_keep(p_seed, threshold, i_row, o_i, begin_j, BLOCK_Q, BLOCK_K)
                keep = tl.trans(keep)
            b_probs, b_dscores = probs_and_dscores(
                b_exponents, b_tanh, b_dprobs, b_delta, keep, softcap, dropout_scale
            )
            if NEEDS_DV:
                b_dv = tl.dot(b_probs.to(b_dout.dtype), b_dout, b_dv, input_precision="ieee")
            if NEEDS_DK:
                b_dk = tl.dot(b_dscores.to(b_k.dtype), b_qu, b_dk, input_precision="ieee")
    if NEEDS_DK:
        _store_keys(p_dk, p_dmem_k, b_dk * scale, i_key_head, begin_j, Tm, Tk, o_d, D, BLOCK_K)
    if NEEDS_DV:
        _store_keys(p_dv, p_dmem_v, b_dv, i_key_head, begin_j, Tm, Tk, o_dv, DV, BLOCK_K)
