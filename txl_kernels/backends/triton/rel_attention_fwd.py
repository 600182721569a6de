"""The forward kernel of `rel_attention`: flash attention with the position product in its loop."""

from __future__ import annotations

import triton
import triton.language as tl

from txl_kernels.backends.triton.rel_attention_call import UNSPECIALIZED
from txl_kernels.backends.triton.rel_attention_keys import (
    key_limits,
    mask_tile,
    near_keys,
    query_geometry,
    query_limits,
    tile_keys,
    visible_keys,
)
from txl_kernels.backends.triton.rel_attention_skew import skew
from txl_kernels.backends.triton.rel_attention_tile import (
    biased_queries,
    capped,
    dropout_keep,
    key_block,
    load_block,
    load_position_block,
    load_rows,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rel_attention_fwd_kernel(
    p_q,  # [B, H, Tq, D]
    p_q_pos,  # [B, H, Tq, DP], or None where it is q
    p_k,  # [B, H / GROUP, Ts, D]
    p_v,  # [B, H / GROUP, Ts, DV]
    p_r,  # [1 or B, 1 or H, R, DP]
    p_r_w_bias,  # [H, D]
    p_r_r_bias,  # [H, DP]
    p_mem_k,  # [B, H / GROUP, Tm, D]
    p_mem_v,  # [B, H / GROUP, Tm, DV]
    p_q_start,  # [B]
    p_key_start,  # [B]
    p_key_lens,  # [B]
    p_query_ranges,  # [B, 2, padded_rows(Tq)]
    p_tile_ranges,  # [B, 4, padded_rows(Tq) / 16]
    p_mask,  # [B, H, Tq, Tk]
    p_seed,  # one int64
    p_out,  # [B, H, Tq, DV], contiguous
    p_lse,  # [B, H, Tq], contiguous, float32
    s_q_b, s_q_h, s_q_i,
    s_q_pos_b, s_q_pos_h, s_q_pos_i,
    s_k_b, s_k_h, s_k_j,
    s_v_b, s_v_h, s_v_j,
    s_r_b, s_r_h, s_r_m,
    s_mem_k_b, s_mem_k_h, s_mem_k_j,
    s_mem_v_b, s_mem_v_h, s_mem_v_j,
    s_mask_b, s_mask_h, s_mask_i, s_mask_j,
    H, Tq, Tm, Tk, R, offset, left, right, chunk_size, chunk_left, chunk_phase,
    scale, content_factor, position_factor, softcap, threshold, dropout_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_DP: tl.constexpr,
    GROUP: tl.constexpr,
    CLAMP: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q queries of one (batch, head) and all keys that they attend to.

    Reads its queries once, and keys, values and rows of r once per block of BLOCK_K keys; writes
    out and lse. Each chunk of BLOCK_K rows of r is multiplied once and used for two neighbouring
    blocks of keys. With FAR, blocks in which no pair has a row of r follow in a loop of their own
    without position product. Scores, softmax and sums are float32; probabilities are rounded to the
    inputs' dtype for the product with v. Deterministic: each sum is computed by one program in a
    fixed order.
    """
    n_tiles = tl.cdiv(Tq, BLOCK_Q)
    # The GROUP query heads of a key head are adjacent: they read the same keys at the same time.
    i_group = tl.program_id(0) // GROUP
    i_bh = i_group // n_tiles * GROUP + tl.program_id(0) % GROUP
    # With a causal mask the last queries attend to most keys: the longest programs start first.
    begin_i = (n_tiles - 1 - i_group % n_tiles) * BLOCK_Q
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_kh = i_h // GROUP
    o_i = begin_i + tl.arange(0, BLOCK_Q)
    o_d, o_dv, o_dp = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_DP)
    p_k += i_b * s_k_b + i_kh * s_k_h
    p_v += i_b * s_v_b + i_kh * s_v_h
    p_r += i_b * s_r_b + i_h * s_r_h
    if p_mem_k is not None:
        p_mem_k += i_b * s_mem_k_b + i_kh * s_mem_k_h
        p_mem_v += i_b * s_mem_v_b + i_kh * s_mem_v_h
    if p_mask is not None:
        p_mask += i_b * s_mask_b + i_h * s_mask_h
    b_q = load_rows(p_q + i_b * s_q_b + i_h * s_q_h, o_i, s_q_i, Tq, o_d, D)
    b_q_pos = b_q
    if p_q_pos is not None:
        p_rows = p_q_pos + i_b * s_q_pos_b + i_h * s_q_pos_h
        b_q_pos = load_rows(p_rows, o_i, s_q_pos_i, Tq, o_dp, DP)
    b_qu = biased_queries(b_q, p_r_w_bias, i_h, o_d, D, content_factor)
    b_qv = biased_queries(b_q_pos, p_r_r_bias, i_h, o_dp, DP, position_factor)

    first, last = key_limits(p_key_start, p_key_lens, i_b, Tk)
    lo_shift, hi_shift, first_p, offset = query_geometry(
        p_q_start, i_b, left, right, offset, Tq, Tk, R
    )
    begin, end, all_begin, all_end = tile_keys(
        p_tile_ranges, i_b, begin_i, first, last, lo_shift, hi_shift, first_p, Tq,
        chunk_size, chunk_left, chunk_phase, BLOCK_Q,
    )  # fmt: skip
    b_first, b_last = query_limits(p_query_ranges, i_b, begin_i, first, last, Tq, BLOCK_Q)
    lo, hi = visible_keys(
        o_i, b_first, b_last, lo_shift, hi_shift, first_p, chunk_size, chunk_left, chunk_phase
    )
    factor = scale
    if softcap is not None:
        factor = softcap
    b_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    b_out = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    # Blocks of keys are aligned to the segment's first key: each block is of the memory or of the
    # segment, so that one choice of pointers and strides holds for all its keys.
    begin -= (begin + tl.cdiv(Tm, BLOCK_K) * BLOCK_K - Tm) % BLOCK_K
    near_begin, near_end = begin, end
    if FAR:
        near_begin, near_end = near_keys(begin, end, begin_i, offset, R, BLOCK_Q, BLOCK_K)
    begin_m = near_begin - begin_i + offset - BLOCK_K
    b_r = load_position_block(p_r, s_r_m, begin_m, R, o_dp, DP, CLAMP, BLOCK_K)
    earlier = tl.dot(b_qv, tl.trans(b_r), input_precision="ieee")
    for IS_FAR in tl.static_range(2 if FAR else 1):
        from_j, to_j = near_begin, near_end
        if IS_FAR:  # the blocks before the near ones and those after them
            from_j, to_j = begin, end - (near_end - near_begin)
        for begin_j in tl.range(from_j, to_j, BLOCK_K):
            b_scores = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
            if IS_FAR:
                begin_j += tl.where(begin_j < near_begin, 0, near_end - near_begin)
            else:
                begin_m = begin_j - begin_i + offset
                b_r = load_position_block(p_r, s_r_m, begin_m, R, o_dp, DP, CLAMP, BLOCK_K)
                chunk = tl.dot(b_qv, tl.trans(b_r), input_precision="ieee")
                b_scores = skew(chunk, earlier, BLOCK_Q, BLOCK_K)
                earlier = chunk
            p_rows, s_row, low, high = key_block(
                p_k, s_k_j, p_mem_k, s_mem_k_j, begin_j, p_key_start, first, last, Tm
            )
            b_k = load_block(p_rows, s_row, begin_j, low, high, o_d, D, BLOCK_K)
            b_scores = tl.dot(b_qu, tl.trans(b_k), b_scores, input_precision="ieee")
            if softcap is not None:
                b_scores = capped(b_scores, scale, softcap)
            if (begin_j < all_begin) | (begin_j + BLOCK_K > all_end):
                o_j = begin_j + tl.arange(0, BLOCK_K)
                seen = (o_j[None, :] >= lo[:, None]) & (o_j[None, :] < hi[:, None])
                b_scores = tl.where(seen, b_scores, float("-inf"))
            if p_mask is not None:
                o_j = begin_j + tl.arange(0, BLOCK_K)
                m_seen = mask_tile(p_mask, s_mask_i, s_mask_j, o_i, o_j, Tq, Tk)
                b_scores = tl.where(m_seen, b_scores, float("-inf"))

            # b_scores and b_max lack `factor` > 0. The difference comes first, so that no exponent
            # is positive, however a score times `factor` would be rounded.
            new_max = tl.maximum(b_max, tl.max(b_scores, 1))
            finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            b_probs = tl.exp2((b_scores - finite_max[:, None]) * (factor * LOG2_E))
            shrink = tl.exp2((b_max - finite_max) * (factor * LOG2_E))
            b_sum = b_sum * shrink + tl.sum(b_probs, 1)
            b_max = new_max
            if threshold is not None:
                keep = dropout_keep(p_seed, threshold, i_bh, o_i, begin_j, BLOCK_Q, BLOCK_K)
                b_probs = tl.where(keep, b_probs, 0.0)
            p_rows, s_row, low, high = key_block(
                p_v, s_v_j, p_mem_v, s_mem_v_j, begin_j, p_key_start, first, last, Tm
            )
            b_v = load_block(p_rows, s_row, begin_j, low, high, o_dv, DV, BLOCK_K)
            b_out *= shrink[:, None]
            b_out = tl.dot(b_probs.to(b_v.dtype), b_v, b_out, input_precision="ieee")

    dead = b_sum == 0.0
    b_sum = tl.where(dead, 1.0, b_sum)
    b_lse = tl.where(dead, float("-inf"), b_max * factor + tl.log2(b_sum) * LN_2)
    b_weight = 1.0 / b_sum
    if dropout_scale is not None:
        b_weight *= dropout_scale
    p_row = i_bh.to(tl.int64) * Tq + o_i
    tl.store(p_lse + p_row, b_lse, mask=o_i < Tq)
    inside = (o_i < Tq)[:, None] & (o_dv < DV)[None, :]
    p_tile = p_out + p_row[:, None] * DV + o_dv[None, :]
    tl.store(p_tile, (b_out * b_weight[:, None]).to(p_out.dtype.element_ty), mask=inside)
